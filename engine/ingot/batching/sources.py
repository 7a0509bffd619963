"""The input of a batch: its files, how many rows each has, and the rows from any place on."""

import glob
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingot.batching.rows import Reading, is_request
from ingot.batching.sinks import kind_of, merged
from ingot.data.sources import BadRow, Row, file_sha256, files_of, read_rows, require_lazy, shown
from ingot.errors import DataError, FieldError
from ingot.recipe import Source

FIELD = "INPUT"
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Counted:
    """A file of the input as it was counted."""

    name: str
    sha256: str
    rows: int


@dataclass(frozen=True)
class Content:
    """What the input holds. `rows`: as many as are asked. `kinds`: column that is kept -> kind of its values, over all
    rows, with "id" for the ids. `repeated`: rows with the id of an earlier one; `first_repeated`: where
    the first of them stands.
    """

    files: tuple[Counted, ...]
    rows: int
    kinds: dict[str, str]
    repeated: int = 0
    first_repeated: str = ""


class Input:
    """The rows of a file, a folder or a glob, in the order of file names, without those in the folder `output`: a glob
    that reaches it finds more at every start. Raises DataError where there is none, where a file cannot be read row by
    row, or is damaged as a whole; FieldError where all are in `output`.
    """

    def __init__(self, uri: str, limit: int | None = None, output: Path | None = None) -> None:
        source = Source(uri=uri)
        place = Path(uri)
        self.home = place if place.is_dir() else place.parent
        if glob.has_magic(uri) and not place.exists():
            parts = [part for part in place.parts if not glob.has_magic(part)]
            self.home = Path(*parts[: next(n for n, part in enumerate(place.parts) if glob.has_magic(part))])
        found = files_of(source, Path.cwd(), FIELD)
        self.paths = [path for path in found if output is None or output.resolve() not in path.resolve().parents]
        if not self.paths:
            raise FieldError("OUTPUT", str(output), "holds all files that INPUT matches; name another folder")
        for path in self.paths:
            require_lazy(Source(uri=str(path.absolute())), self.home, FIELD)
        self.limit = limit

    def first(self) -> Row | None:
        """The first row that can be read; None where there is none."""
        return next((row for path in self.paths for row in self._rows(path) if isinstance(row, Row)), None)

    def count(self, reading: Reading, advance: Callable[[], Any] = lambda: None) -> Content:
        """Read all of it once. `advance` is called for every file. Raises DataError for a file whose first row lacks
        columns.
        """
        files, total = [], 0
        kinds: dict[str, str | None] = {}
        marks = array("q")  # of ids that rows have: 8 bytes each, however long they are
        for path in self.paths:
            rows, checked = 0, False
            for row in self._rows(path):
                wanted = self.limit is None or total + rows < self.limit
                if not checked and wanted and isinstance(row, Row):
                    reading.check_first(row)
                    checked = True
                if wanted:
                    entry = reading.entry(row, 0)
                    for name, value in {"id": entry.id, **entry.kept}.items():
                        kinds[name] = merged(kinds.get(name), kind_of(value))
                    if entry.id != entry.where:
                        marks.append(_mark(entry.id))
                rows += 1
            files.append(Counted(shown(path, self.home), file_sha256(path), rows))
            total += rows
            advance()
        asked = total if self.limit is None else min(total, self.limit)
        told = {name: kind or "text" for name, kind in kinds.items()}
        return Content(tuple(files), asked, told, *self._repeated(np.asarray(marks), reading))

    def _repeated(self, marks_N: IntArray, reading: Reading) -> tuple[int, str]:
        """How many of the rows with ids have that of an earlier one, and where the first of them stands."""
        ordered = np.sort(marks_N)
        repeated = int((ordered[1:] == ordered[:-1]).sum())
        if not repeated:
            return 0, ""
        later = np.ones(len(marks_N), bool)
        later[np.unique(marks_N, return_index=True)[1]] = False
        entries = (reading.entry(row, 0) for path in self.paths for row in self._rows(path))
        named = (entry.where for entry in entries if entry.id != entry.where)
        return repeated, next(islice(named, int(later.argmax()), None))

    def _rows(self, path: Path) -> Iterator[Row | BadRow]:
        return read_rows(Source(uri=str(path.absolute())), self.home, FIELD)


class Cursor:
    """Reads an input in steps: forward without reading anything twice, backward from the start of a file."""

    def __init__(self, source: Input, content: Content) -> None:
        self._source, self._content = source, content
        self._at, self._rows = 0, self._from_file(0)

    def take(self, start: int, count: int) -> list[Row | BadRow]:
        """The rows `start` to `start + count`. Raises DataError where files have become shorter."""
        number, before = 0, 0
        while number < len(self._content.files) and before + self._content.files[number].rows <= start:
            before += self._content.files[number].rows
            number += 1
        if start < self._at or before > self._at:
            self._at, self._rows = before, self._from_file(number)
        found = list(islice(self._rows, start - self._at, start - self._at + count))
        self._at = start + count
        if len(found) != count:
            raise DataError(FIELD, str(self._source.home), "has fewer rows than when it was counted; leave it as it is")
        return found

    def _from_file(self, number: int) -> Iterator[Row | BadRow]:
        for path in self._source.paths[number:]:
            yield from self._source._rows(path)


def _mark(called: Any) -> int:
    """A number that ids share only where they are equal, but for one pair in 10^19."""
    return hash(repr(called))


def is_batch_file(source: Input) -> bool:
    """Whether the input is an OpenAI batch file, by its first row."""
    row = source.first()
    return row is not None and is_request(row)
