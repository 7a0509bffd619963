"""What was asked, answered and scored, row by row: one Parquet file a task, read back without being held.

The same file is what an interrupted evaluation goes on from, what is scored again without a model, and what
comparisons and reports read.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ingot.errors import IngotError

ROWS_PER_GROUP = 1_000
Output = dict[str, Any]
"""What a model gave for one row, as plain values for JSON: enough to score the row again."""


@dataclass(frozen=True)
class Item:
    """One thing to ask: `prompt` for people, `request` for the model, and the answers that would be right.

    `id` says where the row stands. `content`: all that is asked, where `prompt` shows only a part. Rows of one `group`
    (of one passage, subject or user) are no independent measurements; `slices` name the parts of the set that it
    belongs to, e.g. `{"language": "de"}`.
    """

    id: str
    prompt: str
    references: list[str]
    request: Any = field(default=None, compare=False, repr=False)
    content: str = field(default="", repr=False)
    group: str | None = None
    slices: dict[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """Hash of what is asked and expected, 16 hex digits; not of the place where it stands."""
        everything = json.dumps([self.prompt, self.references, self.content], ensure_ascii=True)
        return hashlib.sha256(everything.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sample:
    """One row of a finished evaluation. `numbers`: metric -> its numbers of this row, as `Statistic.rows` holds them.

    `prediction` is what people read as the answer. Tokens and `seconds` (of its share of the batch) are None where
    they were not counted.
    """

    id: str
    document: str
    prompt: str
    references: list[str]
    output: Output
    prediction: str
    numbers: dict[str, list[float]]
    group: str | None = None
    slices: dict[str, str] = field(default_factory=dict)
    n_prompt_tokens: int | None = None
    n_output_tokens: int | None = None
    seconds: float | None = None


_TEXT, _COUNT = pa.string(), pa.int32()
_SCHEMA = pa.schema(
    [
        ("id", _TEXT),
        ("document", _TEXT),
        ("prompt", _TEXT),
        ("references", pa.list_(_TEXT)),
        ("output", _TEXT),  # JSON
        ("prediction", _TEXT),
        ("group", _TEXT),
        ("slices", pa.map_(_TEXT, _TEXT)),
        ("n_prompt_tokens", _COUNT),
        ("n_output_tokens", _COUNT),
        ("seconds", pa.float64()),
        ("numbers", pa.map_(_TEXT, pa.list_(pa.float64()))),
    ]
)
_JSON = ("prompt", "prediction", "references")


def write_samples(path: Path, samples: Iterable[Sample], about: dict[str, Any]) -> None:
    """Write `samples` to `path` in one step, with `about` (plain values) in the file's own description."""
    schema = _SCHEMA.with_metadata({"ingot": json.dumps(about)})
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            rows = (_plain(sample) for sample in samples)
            while some := list(islice(rows, ROWS_PER_GROUP)):
                writer.write_table(pa.Table.from_pylist(some, schema))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class Samples(Sequence[Sample]):
    """The rows of a file that `write_samples` wrote. A thousand at a time are in memory.

    Raises IngotError when the file is missing or is not such a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path, pre_buffer=False)
            self.about: dict[str, Any] = json.loads(self._file.schema_arrow.metadata[b"ingot"])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise IngotError(f"{path} holds no samples of an evaluation ({error}); evaluate again") from error
        sizes = [self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._held: tuple[int, list[Sample]] = (-1, [])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Sample]:
        for number in range(self._file.num_row_groups):
            yield from self._group(number)

    @overload
    def __getitem__(self, index: int, /) -> Sample: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[Sample]: ...
    def __getitem__(self, index: int | slice, /) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._group(number)[place - int(self._starts[number])]

    def numbers(self, metric: str) -> "np.ndarray[Any, np.dtype[Any]]":
        """A metric's numbers of all rows [N, K] float64."""
        rows = [dict(row)[metric] for row in self._column("numbers")]
        return np.asarray(rows, dtype=np.float64)

    def _column(self, name: str) -> Iterator[Any]:
        for number in range(self._file.num_row_groups):
            yield from self._file.read_row_group(number, columns=[name])[name].to_pylist()

    def _group(self, number: int) -> list[Sample]:
        if self._held[0] != number:
            self._held = number, [_sample(row) for row in self._file.read_row_group(number).to_pylist()]
        return self._held[1]


def _plain(sample: Sample) -> dict[str, Any]:
    row = asdict(sample) | {"output": json.dumps(sample.output)}
    return row | {name: _storable(row[name]) for name in _JSON}


def _storable(value: Any) -> Any:
    """Text that UTF-8 can hold: half of a character, which a model may well write, becomes a question mark in a box."""
    if isinstance(value, list):
        return [_storable(one) for one in value]
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _sample(row: dict[str, Any]) -> Sample:
    maps = {name: dict(row[name] or ()) for name in ("slices", "numbers")}
    return Sample(**{**row, **maps, "output": json.loads(row["output"])})
