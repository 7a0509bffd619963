"""Part files of a batch: JSONL, CSV or Parquet, each there whole or not at all."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import IO, Any

from ingot.errors import MissingPackage
from ingot.train.manifest import sync

Record = dict[str, Any]
FORMATS = ("jsonl", "parquet", "csv")
TEXT, JSON = "text", "json"


def kind_of(value: Any) -> str | None:
    """What a column of such values is: "text", "bool", "int", "float" or "json"; None says nothing."""
    if value is None:
        return None
    named = {str: TEXT, bool: "bool", int: "int", float: "float"}.get(type(value), JSON)
    return JSON if named == "int" and not -(2**63) <= value < 2**63 else named


def merged(one: str | None, other: str | None) -> str | None:
    """The kind of a column that holds values of both."""
    if one is None or other is None or one == other:
        return one or other
    return "float" if {one, other} == {"int", "float"} else JSON


def storable(text: str) -> str:
    """`text` as UTF-8 can hold it: half of a character becomes a replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def plain(value: Any) -> Any:
    """`value` for a cell: lists and objects as their JSON, what no cell holds (dates, decimals, bytes) as its text."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, (list, dict)):
        return storable(json_text(value))
    return str(value) if kind_of(value) == JSON else value


def json_text(value: Any) -> str:
    """`value` as JSON: dates and the like as their text, NaN and infinities, which JSON does not have, as null."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)
        return json.dumps(finite, ensure_ascii=False)


def json_line(record: Record) -> bytes:
    """One line of JSONL. Half of a character stays what it is, as an escape."""
    return (json_text(record) + "\n").encode("utf-8", "backslashreplace")


def write_part(path: Path, records: Sequence[Record], kinds: dict[str, str]) -> str:
    """Write `records` to `path` in one step, in the format of its ending; returns the SHA-256 of the file.

    `kinds`: column -> kind, for columns whose kind is decided over more than these records. Raises OSError when the
    disk fails: what was at `path` before is untouched.
    """
    write = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[path.suffix]
    return written(path, lambda file: write(file, records, kinds))


def written(path: Path, write: Callable[[IO[bytes]], None]) -> str:
    """A file in one step: beside its place, synced, renamed. Returns its SHA-256. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = file_digest(file, "sha256").hexdigest()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)
    return digest


def _jsonl(file: IO[bytes], records: Sequence[Record], kinds: dict[str, str]) -> None:
    for record in records:
        file.write(json_line(record))


def _csv(file: IO[bytes], records: Sequence[Record], kinds: dict[str, str]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, _columns(records))
    writer.writeheader()
    for record in records:
        cells = {name: plain(value) for name, value in record.items()}
        writer.writerow({name: str(cell).lower() if isinstance(cell, bool) else cell for name, cell in cells.items()})
    text.flush()
    text.detach()


def _parquet(file: IO[bytes], records: Sequence[Record], kinds: dict[str, str]) -> None:
    pa, pq = _pyarrow()
    types = {TEXT: pa.string(), JSON: pa.string(), "bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
    columns, fields = [], []
    for name in _columns(records):
        values = [record.get(name) for record in records]
        kind = kinds.get(name) or _common(values)
        cells = [plain(value) for value in values]
        if kind in (TEXT, JSON):
            cells = [cell if cell is None or isinstance(cell, str) else json_text(cell) for cell in cells]
        elif kind == "float":  # pyarrow refuses integers that a float cannot hold exactly
            cells = [None if cell is None else float(cell) for cell in cells]
        fields.append(pa.field(name, types[kind]))
        columns.append(pa.array(cells, types[kind]))
    pq.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields)), file, compression="zstd")


def check_format(name: str) -> None:
    """Raise MissingPackage where the package for a format is missing."""
    if name == "parquet":
        _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage("pyarrow", "writing Parquet files") from error
    return pyarrow, pyarrow.parquet


def _columns(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record))


def _common(values: Iterable[Any]) -> str:
    kind: str | None = None
    for value in values:
        kind = merged(kind, kind_of(value))
    return kind or TEXT


def rows_in(path: Path) -> int:
    """How many records a part file holds, counted in the file itself. Raises OSError."""
    if path.suffix == ".parquet":
        return int(_pyarrow()[1].ParquetFile(path).metadata.num_rows)
    if path.suffix == ".csv":
        csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is shorter than what a cell may hold
        with path.open(encoding="utf-8", newline="") as file:
            return sum(1 for _ in csv.reader(file)) - 1
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
