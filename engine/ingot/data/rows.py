"""Encoded rows, whatever holds them: lengths and numbers of targets of all at hand, ids of one when it is asked for."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ingot.data.template import Encoded


class EncodedRows(Protocol):
    """What plans and batches are made of. `lengths` [rows] int64 in tokens; `targets` [rows] int64, see `n_targets`."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    @property
    def targets(self) -> NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Encoded: ...


class ListRows:
    """Rows in memory."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self._rows = rows
        self.lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
        self.targets = np.array([n_targets(row) for row in rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Encoded:
        return self._rows[index]

    def __iter__(self) -> Iterator[Encoded]:
        return iter(self._rows)


def n_targets(row: Encoded) -> int:
    """Trainable targets of a row: its class, or its trainable tokens that have something before them."""
    return 1 if row.label is not None else sum(row.trainable[1:])
