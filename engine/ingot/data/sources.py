"""Rows out of files, generated sets and Hugging Face data sets. The one owner of the package `datasets`.

Every row knows where it stands (`file:line`, or `file#row` where lines mean nothing), so that a message can send
the reader there. A row that cannot be read is a `BadRow` in the stream; a file that cannot be read is a `DataError`.
"""

import csv
import difflib
import glob
import gzip
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlparse

from ingot.errors import DataError, MissingPackage
from ingot.recipe import Source
from ingot.registry import nearest

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
HUB = "hf://datasets/"
CONNECT_TIMEOUT_SECONDS = 5.0
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


def read_rows(source: Source, folder: Path, field: str = "data.train") -> Iterator[Row | BadRow]:
    """Yield the rows of `source` in file order. Relative paths start at `folder`; `field` is named in errors.

    Raises `DataError` for a file, folder or data set that is missing, of unknown format or unreadable as a whole.
    """
    if source.format == "generated" or source.uri.startswith(GENERATED):
        yield from _generated(source, field)
        return
    if source.uri.startswith(HUB):
        yield from _hub(source, field)
        return
    target = folder / source.uri
    if _is_saved_dataset(target):
        yield from _saved_dataset(target, source, field)
        return
    for path in _files(source, folder, field):
        name = _shown(path, folder)
        file_format = _format_of(path, source, field)
        if file_format == "text-pair":
            yield from _text_pair(path, name, source, folder, field)
            continue
        try:
            yield from _READERS[file_format](path, name, field)
        except (OSError, EOFError) as error:  # gzip raises both; a vanished or forbidden file raises OSError
            raise DataError(f"{field}.uri", source.uri, f"cannot be read: {error}", where=name) from error


def has_broken_characters(text: str) -> bool:
    """True when `text` holds lone surrogates: bytes that were not UTF-8, or half an escaped pair."""
    return _SURROGATE.search(text) is not None


# --- which files -----------------------------------------------------------------------------------------------


def _files(source: Source, folder: Path, field: str) -> list[Path]:
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
            raise DataError(f"{field}.uri", source.uri, f"format hf needs {HUB}ID or a folder saved by save_to_disk")
        return source.format
    if source.pair is not None:
        return "text-pair"
    extension = _extension(path)
    if extension not in EXTENSIONS:
        known = ", ".join(sorted(set(EXTENSIONS.values())))
        raise DataError(f"{field}.format", "auto", f"{path.name} has no known extension; set format to one of: {known}")
    return EXTENSIONS[extension]


def _shown(path: Path, folder: Path) -> str:
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
            except json.JSONDecodeError as error:
                yield BadRow(where, f"not JSON: {error.msg} at column {error.colno}")
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
    except json.JSONDecodeError as error:
        fix = f"is not JSON: {error.msg}"
        if error.msg == "Extra data":
            fix += "; for one JSON object a line set format: jsonl"
        raise DataError(f"{field}.uri", name, fix, where=f"{name}:{error.lineno}") from error
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
    pair_name, count = _shown(pair, folder), 0
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
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
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

# --- generated and Hugging Face sets ---------------------------------------------------------------------------


def _generated(source: Source, field: str) -> Iterator[Row]:
    from ingot.data.synthetic import generate

    name = source.uri.removeprefix(GENERATED)
    for number, values in enumerate(generate(name, source.split)):
        yield Row(values, f"{GENERATED}{name}#{number}")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage("datasets", "reading Hugging Face data sets") from error
    return datasets


def _is_saved_dataset(target: Path) -> bool:
    return (target / "dataset_dict.json").is_file() or (target / "state.json").is_file()


def _saved_dataset(target: Path, source: Source, field: str) -> Iterator[Row]:
    loaded = _datasets().load_from_disk(str(target))
    yield from _split_rows(loaded, source, field, target.name)


def _hub(source: Source, field: str) -> Iterator[Row]:
    datasets = _datasets()
    name = source.uri.removeprefix(HUB)
    fallback = "run datasets.save_to_disk where there is a network and give that folder"
    # Asked first, because the library retries for half a minute before it gives up.
    if not datasets.config.HF_HUB_OFFLINE and not _reachable(datasets.config.HF_ENDPOINT):
        fix = (
            f"data set {name!r} cannot be loaded: the hub cannot be reached; set HF_HUB_OFFLINE=1 to use a cached copy"
        )
        raise DataError(f"{field}.uri", source.uri, f"{fix}, or {fallback}")
    try:
        loaded = datasets.load_dataset(name, source.config)
    except Exception as error:  # the library lets errors of half a dozen packages through
        fix = f"data set {name!r} cannot be loaded: {_first_line(error)}; check the id and config, or {fallback}"
        raise DataError(f"{field}.uri", source.uri, fix) from error
    yield from _split_rows(loaded, source, field, name)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _reachable(endpoint: str) -> bool:
    """Whether a connection to `endpoint` (or to the proxy that the environment names for it) opens within seconds."""
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    url = urlparse(proxy or endpoint)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), timeout=CONNECT_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def _split_rows(loaded: Any, source: Source, field: str, name: str) -> Iterator[Row]:
    if isinstance(loaded, dict):
        splits = list(loaded)
        chosen = source.split or (splits[0] if len(splits) == 1 else None)
        if chosen is None:
            raise DataError(f"{field}.split", None, f"{name} has several splits; use one of: {', '.join(splits)}")
        if chosen not in loaded:
            raise DataError(f"{field}.split", chosen, nearest(chosen, splits))
        loaded = loaded[chosen]
        name = f"{name}/{chosen}"
    rows: Iterable[dict[str, Any]] = loaded
    for number, values in enumerate(rows):
        yield Row(dict(values), f"{name}#{number}")
