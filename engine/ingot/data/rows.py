"""Encoded rows, whatever holds them: lengths and numbers of targets of all at hand, ids of one when it is asked for."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ingot.data.encoded import Encoded


class EncodedRows(Protocol):
    """What plans and batches are made of. `lengths` [rows] int64 in tokens; `targets` [rows] int64: loss terms."""

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
        self.targets = np.array([row.n_targets for row in rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Encoded:
        return self._rows[index]

    def __iter__(self) -> Iterator[Encoded]:
        return iter(self._rows)
