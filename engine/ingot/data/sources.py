"""Rows out of files, generated sets and Hugging Face data sets (`hub.py`).

Every row knows where it stands (`file:line`, or `file#row` where lines mean nothing), so that a message can send
the reader there. A row that cannot be read is a `BadRow` in the stream; a file that cannot be read is a `DataError`.
"""

import csv
import difflib
import glob
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TextIO

from ingot.data import hub
from ingot.errors import DataError, MissingPackage
from ingot.recipe import Source

EXTENSIONS: dict[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".conll": "conll",
    ".txt": "text",
}
GENERATED = "ingot://"
NOT_JSON = (ValueError, RecursionError)
"""What `json.loads` raises; `why_not_json` says it in words."""
# Undecodable bytes are read as lone surrogates (PEP 383), so that one bad line does not hide the good ones after it.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One row as the file holds it: column name -> value."""

    values: dict[str, Any]
    where: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str


def read_rows(
    source: Source, folder: Path, field: str = "data.train", *, streaming: bool = False
) -> Iterator[Row | BadRow]:
    """Yield the rows of `source` in file order. Relative paths start at `folder`; `field` is named in errors.

    Rows are read as they are asked for, except those of a `.json` file. `streaming`: a data set of the hub is not
    downloaded first. Raises `DataError` for a file, folder or data set that is missing, of unknown format or unreadable
    as a whole.
    """
    if _is_generated(source):
        yield from _generated(source, field)
        return
    if hub.is_dataset(source, folder):
        rows, name = hub.open_split(source, folder, field, streaming=streaming)
        for number, values in enumerate(rows):
            yield Row(dict(values), f"{name}#{number}")
        return
    for path in files_of(source, folder, field):
        name = shown(path, folder)
        file_format = _format_of(path, source, field)
        if file_format == "text-pair":
            yield from _text_pair(path, name, source, folder, field)
            continue
        try:
            yield from _READERS[file_format](path, name, field)
        except (OSError, EOFError) as error:  # gzip raises both; a vanished or forbidden file raises OSError
            raise DataError(f"{field}.uri", source.uri, f"cannot be read: {error}", where=name) from error


def fingerprint(source: Source, folder: Path, field: str) -> list[str]:
    """What decides the rows of `source`: names and SHA-256 of files, the fingerprint of a Hugging Face data set, or the
    name of a generated one (which this package's code decides). Raises what `read_rows` raises.
    """
    settings = [f"format {source.format}", f"split {source.split}", f"config {source.config}"]
    if _is_generated(source):
        return [*settings, f"generated {source.uri}"]
    if hub.is_dataset(source, folder):
        rows, name = hub.open_split(source, folder, field)
        return [*settings, f"{name} {rows._fingerprint}"]
    paths = files_of(source, folder, field)
    if source.pair is not None and (folder / source.pair).is_file():
        paths.append(folder / source.pair)
    try:
        return [*settings, *(f"{shown(path, folder)} {file_sha256(path)}" for path in paths)]
    except OSError as error:
        raise DataError(f"{field}.uri", source.uri, f"cannot be read: {error}") from error


def require_lazy(source: Source, folder: Path, field: str) -> None:
    """Raise `DataError` when `source` holds a file that can only be read as a whole."""
    if _is_generated(source) or hub.is_dataset(source, folder):
        return
    for path in files_of(source, folder, field):
        if _format_of(path, source, field) == "json":
            fix = "is one JSON value, which cannot be read row by row; write one object a line (.jsonl)"
            raise DataError(f"{field}.uri", source.uri, fix, where=shown(path, folder))


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def has_broken_characters(text: str) -> bool:
    """True when `text` holds lone surrogates: bytes that were not UTF-8, or half an escaped pair."""
    return _SURROGATE.search(text) is not None


def why_not_json(error: Exception) -> str:
    """What is wrong by an error of `json.loads`."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else "an integer has too many digits"


# --- which files -----------------------------------------------------------------------------------------------


def files_of(source: Source, folder: Path, field: str) -> list[Path]:
    """The files of `source`, by name. Raises `DataError` where there are none."""
    target = folder / source.uri
    if target.is_file():
        return [target]
    if target.is_dir():
        wanted = [path for path in sorted(target.iterdir()) if path.is_file() and not path.name.startswith(".")]
        if source.format == "auto":
            wanted = [path for path in wanted if _extension(path) in EXTENSIONS]
        if not wanted:
            raise DataError(f"{field}.uri", source.uri, f"the folder holds no data file ({', '.join(EXTENSIONS)})")
        return wanted
    if glob.has_magic(source.uri):
        found = [Path(name) for name in sorted(glob.glob(str(target), recursive=True)) if Path(name).is_file()]
        if not found:
            raise DataError(f"{field}.uri", source.uri, f"no file matches; patterns start at {folder}")
        return found
    raise DataError(f"{field}.uri", source.uri, _missing_file_fix(target))


def _missing_file_fix(target: Path) -> str:
    if not target.parent.is_dir():
        return f"no such file, and the folder {target.parent} does not exist either; write an existing path"
    names = sorted(path.name for path in target.parent.iterdir())
    close = difflib.get_close_matches(target.name, names, n=1, cutoff=0.5)
    if close:
        return f"no such file in {target.parent}; did you mean {close[0]!r}?"
    return f"no such file in {target.parent}; write an existing path"


def _extension(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _format_of(path: Path, source: Source, field: str) -> str:
    if source.format != "auto":
        if source.format == "hf":
            raise DataError(
                f"{field}.uri", source.uri, f"format hf needs {hub.HUB}ID or a folder saved by save_to_disk"
            )
        return source.format
    if source.pair is not None:
        return "text-pair"
    extension = _extension(path)
    if extension not in EXTENSIONS:
        known = ", ".join(sorted(set(EXTENSIONS.values())))
        raise DataError(f"{field}.format", "auto", f"{path.name} has no known extension; set format to one of: {known}")
    return EXTENSIONS[extension]


def shown(path: Path, folder: Path) -> str:
    """`path` as the reader of a message knows it: relative to the recipe's folder where it lies inside."""
    try:
        return str(path.resolve().relative_to(folder.resolve()))
    except ValueError:
        return str(path)


# --- text formats ----------------------------------------------------------------------------------------------


def _open(path: Path, newline: str | None = None) -> TextIO:
    opener: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    stream: TextIO = opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    return stream


def _jsonl(path: Path, name: str, field: str) -> Iterator[Row | BadRow]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{name}:{number}"
            if has_broken_characters(line):
                yield BadRow(where, "not UTF-8")
                continue
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except NOT_JSON as error:
                column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                yield BadRow(where, f"not JSON: {why_not_json(error)}{column}")
                continue
            yield _object_row(value, where)


def _object_row(value: Any, where: str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value, where)
    return BadRow(where, f"a row must be a JSON object, this is {_kind(value)}")


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _json(path: Path, name: str, field: str) -> Iterator[Row | BadRow]:
    with _open(path) as stream:
        text = stream.read()
    if has_broken_characters(text):
        line = text.count("\n", 0, next(_SURROGATE.finditer(text)).start()) + 1
        raise DataError(f"{field}.uri", name, "is not UTF-8; save it as UTF-8", where=f"{name}:{line}")
    try:
        value = json.loads(text)
    except NOT_JSON as error:
        fix = f"is not JSON: {why_not_json(error)}"
        if fix.endswith("Extra data"):
            fix += "; for one JSON object a line set format: jsonl"
        where = f"{name}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else name
        raise DataError(f"{field}.uri", name, fix, where=where) from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(f"{field}.uri", name, 'must hold a list of objects, or {"data": [...]}')
    for number, row in enumerate(rows):
        yield _object_row(row, f"{name}#{number}")


def _delimited(delimiter: str) -> Callable[[Path, str, str], Iterator[Row | BadRow]]:
    def read(path: Path, name: str, field: str) -> Iterator[Row | BadRow]:
        csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is shorter than a long document
        with _open(path, newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter)
            header = next(reader, [])
            twice = sorted({column for column in header if header.count(column) > 1})
            if twice:
                raise DataError(f"{field}.uri", name, f"names column {twice[0]!r} twice", where=f"{name}:1")
            line = reader.line_num + 1
            for cells in reader:
                where, line = f"{name}:{line}", reader.line_num + 1
                if not cells:
                    continue
                if len(cells) != len(header):
                    yield BadRow(where, f"{len(cells)} cells under {len(header)} columns")
                elif any(has_broken_characters(cell) for cell in cells):
                    yield BadRow(where, "not UTF-8")
                else:
                    yield Row(dict(zip(header, cells, strict=True)), where)

    return read


def _text(path: Path, name: str, field: str) -> Iterator[Row | BadRow]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            where, text = f"{name}:{number}", line.rstrip("\n")
            if has_broken_characters(text):
                yield BadRow(where, "not UTF-8")
            elif text.strip():  # empty lines only part the others
                yield Row({"text": text}, where)


def _conll(path: Path, name: str, field: str) -> Iterator[Row | BadRow]:
    with _open(path) as lines:
        sentence: list[tuple[int, str]] = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                sentence.append((number, line.rstrip("\n")))
            elif sentence:
                yield _sentence(sentence, name)
                sentence = []
        if sentence:
            yield _sentence(sentence, name)


def _sentence(lines: list[tuple[int, str]], name: str) -> Row | BadRow:
    tokens, tags = [], []
    for number, line in lines:
        if has_broken_characters(line):
            return BadRow(f"{name}:{number}", "not UTF-8")
        cells = line.split("\t") if "\t" in line else line.split()
        if len(cells) < 2 or not cells[0] or not cells[-1]:
            return BadRow(f"{name}:{number}", "expected a token, a tab and a tag")
        tokens.append(cells[0])
        tags.append(cells[-1])
    return Row({"tokens": tokens, "tags": tags}, f"{name}:{lines[0][0]}")


def _text_pair(path: Path, name: str, source: Source, folder: Path, field: str) -> Iterator[Row | BadRow]:
    if source.pair is None:
        raise DataError(f"{field}.pair", None, "format text-pair needs the second, line-aligned file")
    pair = folder / source.pair
    if not pair.is_file():
        raise DataError(f"{field}.pair", source.pair, _missing_file_fix(pair))
    pair_name, count = shown(pair, folder), 0
    try:
        with _open(path) as left, _open(pair) as right:
            for first, second in zip_longest(left, right):
                if first is None or second is None:
                    n_left = count + (first is not None) + sum(1 for _ in left)
                    n_right = count + (second is not None) + sum(1 for _ in right)
                    fix = f"{pair_name} has {n_right} lines and {name} has {n_left}; the files must match line by line"
                    raise DataError(f"{field}.pair", source.pair, fix)
                count += 1
                if has_broken_characters(first + second):
                    yield BadRow(f"{name}:{count}", "not UTF-8")
                else:
                    yield Row({"source": first.rstrip("\n"), "target": second.rstrip("\n")}, f"{name}:{count}")
    except (OSError, EOFError) as error:
        raise DataError(f"{field}.uri", source.uri, f"cannot be read: {error}", where=name) from error


def _parquet(path: Path, name: str, field: str) -> Iterator[Row | BadRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage("pyarrow", "reading Parquet files") from error
    try:
        number = 0
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False)
        # One row group after the other: asked for all, pyarrow 25 reads the whole file before it gives the first batch.
        batches = (file.iter_batches(row_groups=[group]) for group in range(file.num_row_groups))
        for batch in chain.from_iterable(batches):
            for values in batch.to_pylist():
                yield Row(values, f"{name}#{number}")
                number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{field}.uri", name, f"is not a readable Parquet file: {error}") from error


_READERS: dict[str, Callable[[Path, str, str], Iterator[Row | BadRow]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _delimited(","),
    "tsv": _delimited("\t"),
    "parquet": _parquet,
    "conll": _conll,
    "text": _text,
}

# --- generated sets --------------------------------------------------------------------------------------------


def _is_generated(source: Source) -> bool:
    return source.format == "generated" or source.uri.startswith(GENERATED)


def _generated(source: Source, field: str) -> Iterator[Row]:
    from ingot.data.synthetic import generate

    name = source.uri.removeprefix(GENERATED)
    for number, values in enumerate(generate(name, source.split)):
        yield Row(values, f"{GENERATED}{name}#{number}")
