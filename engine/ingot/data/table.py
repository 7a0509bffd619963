"""Rows as Arrow tables: encoded ones in memory or mapped from a file, and texts that are sorted without being held."""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from ingot.data.encoded import Encoded

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("trainable", pa.list_(pa.bool_())),
        ("labels", pa.list_(pa.int32())),
        ("where", pa.string()),
        ("parts", pa.list_(pa.int32())),
        ("terms", pa.int32()),
    ]
)
TEXTS_PER_BATCH = 10_000

Ints = NDArray[np.int64]


class ArrowRows:
    """`EncodedRows` over Arrow batches: a row is copied out of them when it is asked for, and nothing else is."""

    def __init__(self, batches: Sequence[Any], lengths: Ints, targets: Ints) -> None:
        self.lengths, self.targets = lengths, targets
        self._batches = batches
        self._starts: list[int] = np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist()
        if not self._starts[-1] == len(lengths) == len(targets):
            raise ValueError(f"{self._starts[-1]} rows, but {len(lengths)} lengths and {len(targets)} targets")

    @classmethod
    def mapped(cls, path: Path) -> "ArrowRows":
        """Rows that `RowWriter` wrote to `path`. Raises OSError or ValueError for a file that is not whole."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if reader.schema != SCHEMA:
                raise ValueError(f"{path.name} has other columns: {reader.schema.names}")
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except pa.ArrowException as error:
            raise ValueError(f"{path.name}: {error}") from error
        return cls(batches, *(_mapped_numbers(_beside(path, name)) for name in ("lengths", "targets")))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> Encoded:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        ids, trainable, labels, where, parts, terms = self._batches[number].columns
        place = index - self._starts[number]
        return Encoded(
            _list_at(ids, place),
            _list_at(trainable, place),
            labels[place].as_py(),
            where[place].as_py(),
            tuple(parts[place].as_py()),
            terms[place].as_py(),
        )

    def __iter__(self) -> Iterator[Encoded]:
        return (self[index] for index in range(len(self)))


class RowWriter:
    """Takes encoded rows, many at a time, into Arrow batches: of the file `path`, or of the memory when it is None.

    Beside the file stand `<stem>.lengths.npy` and `<stem>.targets.npy`, int64 [rows]. Raises OSError when the disk
    fails.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._batches: list[Any] = []
        self._lengths, self._targets = array("q"), array("q")
        self._sink = pa.OSFile(str(path), "wb") if path else None
        self._file = pa.ipc.new_file(self._sink, SCHEMA) if path else None

    def add(self, rows: Sequence[Encoded]) -> None:
        """Append `rows`."""
        if not rows:
            return
        self._lengths.extend(len(row.ids) for row in rows)
        self._targets.extend(row.n_targets for row in rows)
        batch = _batch(rows)
        if self._file is None:
            self._batches.append(batch)
        else:
            self._file.write_batch(batch)

    def rows(self) -> ArrowRows:
        """Everything so far; of a file, once it is closed."""
        if self._path is not None:
            return ArrowRows.mapped(self._path)
        return ArrowRows(self._batches, *map(_numbers, (self._lengths, self._targets)))

    def close(self) -> None:
        """Finish the file; nothing to do for the memory."""
        if self._path is None or self._file is None or self._sink is None:
            return
        self._file.close()
        self._sink.close()
        for name, values in (("lengths", self._lengths), ("targets", self._targets)):
            np.save(_beside(self._path, name), _numbers(values))


class Digests:
    """Numbers for the groups of equal texts, in no order; 8 bytes a text."""

    def __init__(self) -> None:
        self._digests = array("Q")

    def add(self, text: str) -> None:
        """Append a text of valid Unicode."""
        self._digests.append(digest(text))

    def groups(self) -> Ints:
        """[texts]: equal texts share a number."""
        found = np.array(self._digests, dtype=np.uint64)
        return np.unique(found, return_inverse=True)[1].astype(np.int64)


class Texts:
    """Numbers for the groups of equal texts, in the texts' order.

    Until then the texts are in a file of `folder`, where nobody else writes; in memory when it is None.
    """

    def __init__(self, folder: Path | None) -> None:
        self._digests = array("Q")
        self._pending: list[str] = []
        self._path = folder / "texts.arrow" if folder else None
        self._sink: Any = pa.OSFile(str(self._path), "wb") if self._path else pa.BufferOutputStream()
        self._schema = pa.schema([("text", pa.large_string())])
        self._writer = pa.ipc.new_stream(self._sink, self._schema)

    def add(self, text: str) -> None:
        """Append a text of valid Unicode."""
        self._digests.append(digest(text))
        self._pending.append(text)
        if len(self._pending) == TEXTS_PER_BATCH:
            self._flush()

    def groups(self) -> Ints:
        """[texts]: equal texts share a number, and numbers are in the order of the texts (by code point)."""
        self._flush()
        self._writer.close()
        if self._path is None:
            source = self._sink.getvalue()
        else:
            self._sink.close()
            source = pa.memory_map(str(self._path))
        column = pa.ipc.open_stream(source).read_all()["text"]
        # Bytes of UTF-8 sort as the code points do. Neighbours are compared by digest: no text is copied.
        order = pyarrow.compute.sort_indices(column).to_numpy()
        digests = np.frombuffer(self._digests, dtype=np.uint64) if self._digests else np.zeros(0, np.uint64)
        fresh = np.diff(digests[order], prepend=~digests[order[:1]]) != 0
        groups = np.empty(len(order), dtype=np.int64)
        groups[order] = np.cumsum(fresh) - 1
        if self._path is not None:
            self._path.unlink()
        return groups

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(pa.record_batch([pa.array(self._pending, pa.large_string())], self._schema))
            self._pending = []


def digest(text: str) -> int:
    """64 bits of `text`: of a million texts, two differing ones share them once in 37 million data sets."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def _batch(rows: Sequence[Encoded]) -> Any:
    lengths = np.array([len(row.ids) for row in rows])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    total = int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(row.ids for row in rows), np.int32, total)
    trainable = np.fromiter(chain.from_iterable(row.trainable for row in rows), np.bool_, total)
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(ids)),
        pa.ListArray.from_arrays(offsets, pa.array(trainable)),
        pa.array([row.labels for row in rows], pa.list_(pa.int32())),
        pa.array([row.where for row in rows], pa.string()),
        pa.array([row.parts for row in rows], pa.list_(pa.int32())),
        pa.array([row.terms for row in rows], pa.int32()),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _list_at(column: Any, place: int) -> list[Any]:
    found: list[Any] = column[place].values.to_numpy(zero_copy_only=False).tolist()
    return found


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}.{name}.npy")


def _numbers(values: "array[int]") -> Ints:
    return np.array(values, dtype=np.int64)


def _mapped_numbers(path: Path) -> Ints:
    numbers: Ints = np.load(path, mmap_mode="r", allow_pickle=False)
    if numbers.dtype != np.int64 or numbers.ndim != 1:
        raise ValueError(f"{path.name} holds {numbers.dtype} of {numbers.ndim} dimensions")
    return numbers
