"""A batch without a model: what answers is a function, so that a test takes milliseconds."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ingot.batching.answering import Patience, isolated
from ingot.batching.job import Job, allowed_errors
from ingot.batching.manifest import Manifest, Plan
from ingot.batching.rows import Entry, Outcome, Reading
from ingot.batching.sources import Cursor, Input
from ingot.model.sampling import InputError

FORMS = (("text",),)


def upper(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers in capitals; a row with `poison` in it has the whole call refused."""
    if any("poison" in row["text"] for row in rows):
        raise InputError("text", "the text cannot be answered")
    return [{"said": row["text"].upper(), "length": len(row["text"])} for row in rows]


class Answers:
    """An answerer over a function of rows, that takes so long for a bucket."""

    def __init__(
        self, answer: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = upper, seconds: float = 0.0
    ) -> None:
        self.calls = 0
        self._answer, self._seconds = answer, seconds

    def check(self) -> None: ...

    def close(self) -> None: ...

    def answer(self, entries: Sequence[Entry]) -> list[Outcome]:
        self.calls += 1
        time.sleep(self._seconds)
        patience = Patience(1, sleep=lambda seconds: None)
        return isolated(lambda some: self._answer([entry.columns for entry in some]), entries, patience)

    def tokens(self) -> dict[str, int]:
        return {"input": 1}


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., Path]:
    """rows_file(count, poisoned places): a JSONL file."""

    def write(count: int, poisoned: Sequence[int] = ()) -> Path:
        path = tmp_path / "rows.jsonl"
        rows = [{"id": f"r{n}", "text": f"row {n} é{'poison' if n in poisoned else ''}"} for n in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def make_answers() -> type[Answers]:
    return Answers


@pytest.fixture
def make_job() -> Callable[..., Job]:
    """make_job(input, output, answerer, ...): a job, begun or to be gone on with."""

    def make(
        source: Path,
        output: Path,
        answerer: Any = None,
        *,
        bucket_rows: int = 4,
        max_errors: str = "-1",
        file_format: str = "jsonl",
        reading: Reading | None = None,
    ) -> Job:
        reading = reading or Reading(FORMS)
        files = Input(str(source))
        content = files.count(reading)
        manifest = Manifest(output, Plan({"input": source.name}, content.rows, bucket_rows, content.kinds))
        manifest.begin()
        allowed = allowed_errors(max_errors, content.rows)
        return Job(manifest, Cursor(files, content), reading, answerer or Answers(), file_format, allowed)

    return make


@pytest.fixture
def answers_in() -> Callable[[Path], list[dict[str, Any]]]:
    """The rows of all JSONL parts of a folder, in the order of their names."""

    def read(folder: Path) -> list[dict[str, Any]]:
        lines = [line for path in sorted(folder.glob("part-*.jsonl")) for line in path.read_text().splitlines()]
        return [json.loads(line) for line in lines]

    return read
