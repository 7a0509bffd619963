"""A batch: bucket after bucket is read, answered, written and recorded, until all of them are there."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ingot.batching.answering import Answerer, require_alive
from ingot.batching.manifest import FINISHED, STATE, STOPPED, Done, Manifest, damaged, writing
from ingot.batching.rows import Entry, Failure, Reading, response_line
from ingot.batching.sinks import Record, rows_in, write_part, written
from ingot.batching.sources import Cursor
from ingot.errors import FieldError, IngotError, TooManyErrors

ERRORS_FILE = "errors.jsonl"
POLL_S = 0.2


@dataclass(frozen=True)
class Job:
    """What a batch is worked on with. `allowed`: rows that may fail; None for any number. `advance` hears of rows that
    were done, and of all errors so far.
    """

    manifest: Manifest
    cursor: Cursor
    reading: Reading
    answerer: Answerer
    file_format: str
    allowed: int | None = None
    advance: Callable[[int, int], None] = lambda rows, errors: None

    def run(self) -> None:
        """Work until all buckets are done, by whomever; then verify them and write the errors file.

        Raises TooManyErrors, and IngotError for a disk that fails or a model that answers nothing. What is done is
        kept in each case.
        """
        with writing(self.manifest.folder):
            self._work()
            self._require_few_errors()
            self._finish()

    def _work(self) -> None:
        shown = self.manifest.answers + self.manifest.errors
        while pending := self.manifest.pending():
            worked = False
            for number in pending:
                self._require_few_errors()
                if number in self.manifest.done or not self.manifest.claim(number):
                    continue
                try:
                    self.manifest.refresh()
                    if number not in self.manifest.done:
                        self._bucket(number)
                        worked = True
                finally:
                    self.manifest.release(number)
                shown = self._show(shown)
            if not worked:  # the rest is with others, who may be killed
                time.sleep(POLL_S)
                self.manifest.refresh()
                shown = self._show(shown)

    def _show(self, shown: int) -> int:
        rows = self.manifest.answers + self.manifest.errors
        self.advance(rows - shown, self.manifest.errors)
        return rows

    def _bucket(self, number: int) -> None:
        started = time.perf_counter()
        start, count = self.manifest.plan.span(number)
        rows = self.cursor.take(start, count)
        entries = [self.reading.entry(row, start + place) for place, row in enumerate(rows)]
        asked = [entry for entry in entries if entry.problem is None]
        outcomes = self.answerer.answer(asked)
        require_alive(outcomes)
        answered = dict(zip((entry.place for entry in asked), outcomes, strict=True))
        records: list[Record] = []
        errors: list[Record] = []
        for entry in entries:
            outcome = entry.problem or answered[entry.place]
            if isinstance(outcome, Failure):
                errors.append(self._error(entry, outcome))
            else:
                records.append(outcome if self.reading.requests else self._record(entry, outcome))
        files = {
            f"part-{number:05d}.{self.file_format}": records,
            f"{STATE}/errors-{number:05d}.jsonl": errors,
        }
        kinds = self.manifest.plan.kinds
        folder = self.manifest.folder
        _forget(folder, number)
        sums = {name: write_part(folder / name, some, kinds) for name, some in files.items() if some}
        seconds = round(time.perf_counter() - started, 3)
        self.manifest.record(number, Done(len(records), len(errors), sums, self.answerer.tokens(), seconds))

    def _record(self, entry: Entry, answer: Record) -> Record:
        return {"id": entry.id, **entry.kept, **answer}

    def _error(self, entry: Entry, failure: Failure) -> Record:
        if self.reading.requests:
            told = None if failure.response else {"code": "invalid_line", "message": failure.message}
            return response_line(entry, failure.response, told)
        return {"id": entry.id, "row": entry.where, "field": failure.field, "message": failure.message}

    def _require_few_errors(self) -> None:
        manifest = self.manifest
        if self.allowed is None or manifest.errors <= self.allowed:
            return
        with manifest.locked():
            manifest.refresh()
            self._write_errors()
            manifest.end(STOPPED)
        done = manifest.answers + manifest.errors
        raise TooManyErrors(
            f"{manifest.errors:,} of {done:,} rows failed, and --max-errors allows {self.allowed:,}: see "
            f"{manifest.folder / ERRORS_FILE}. {manifest.answers:,} answers are kept; with a higher --max-errors the "
            "same command goes on"
        )

    def _finish(self) -> None:
        manifest = self.manifest
        with manifest.locked():
            manifest.refresh()
            if manifest.status == FINISHED or manifest.pending():
                return
            self._verify()
            self._write_errors()
            manifest.end(FINISHED)

    def _verify(self) -> None:
        """Raise IngotError where the files do not hold exactly the rows of the input."""
        total = 0
        for number, done in sorted(self.manifest.done.items()):
            files = [self.manifest.folder / name for name in done.files]
            found = 0 if damaged(self.manifest.folder, done) else sum(map(rows_in, files))
            if found != self.manifest.plan.span(number)[1]:
                raise IngotError(
                    f"{', '.join(map(str, files))}: not the {self.manifest.plan.span(number)[1]} rows that were "
                    "written; the same command asks them again"
                )
            total += found
        if total != self.manifest.plan.rows:
            raise IngotError(f"{self.manifest.folder} holds {total} of {self.manifest.plan.rows} rows")

    def _write_errors(self) -> None:
        """Put the errors of all buckets into one file; without errors there is none."""
        folder = self.manifest.folder
        parts = [folder / name for _, done in sorted(self.manifest.done.items()) for name in done.files]
        parts = [path for path in parts if path.parent.name == STATE]

        def write(file: IO[bytes]) -> None:
            for path in parts:
                file.write(path.read_bytes())

        if parts:
            written(folder / ERRORS_FILE, write)
        else:
            (folder / ERRORS_FILE).unlink(missing_ok=True)


def _forget(folder: Path, number: int) -> None:
    """Remove what a killed process had begun to write of a bucket, and its files of another start."""
    for pattern in (f".part-{number:05d}.*.partial", f"part-{number:05d}.*", f"{STATE}/*errors-{number:05d}.jsonl*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def allowed_errors(text: str, rows: int) -> int | None:
    """How many of `rows` may fail by "N", "P%" or "-1" (any number: None). Raises FieldError for other text."""
    if text == "-1":
        return None
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        share = float(found[1])
        if share <= 100:
            return int(rows * share / 100)
    elif text.isdecimal() and text.isascii():
        return int(text)
    raise FieldError("--max-errors", text, "write a number of rows, a share such as 5%, or -1 for any number")
