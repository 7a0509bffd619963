"""What training saw, row by row, as texts that rows of a test can be held against. Nothing is held."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ingot.data.conversation import Conversation
from ingot.data.example import Example, to_example
from ingot.data.preference import Preference
from ingot.data.sources import EXTENSIONS, BadRow, Row, read_rows
from ingot.data.splits import Scan, examples, scan, training_sources
from ingot.data.template import prompt_text, reference_text
from ingot.errors import DataError
from ingot.recipe import Recipe, Source

HEAD_ROWS = 100  # rows of a file in which a text must stand


@dataclass(frozen=True)
class Seen:
    """A row of training and where it stands. `parts`: its texts that are not empty, one after the other: what was asked
    and what was answered, or the columns of a file. `unreadable`: nobody knows what it says.
    """

    where: str
    parts: tuple[str, ...]
    unreadable: bool = False


def learned(recipe: Recipe, home: Path, found: Scan | None = None) -> Iterator[Seen]:
    """The training rows of `recipe` in the order of its files; a stream, once. `found` spares reading the data twice.

    Raises what `scan` and `read_rows` raise.
    """
    if recipe.data.streaming:
        for reading in training_sources(recipe.data):
            for row in read_rows(reading.source, home, reading.field, streaming=True):
                made = to_example(row, recipe.data, recipe.objective) if isinstance(row, Row) else row
                yield Seen(made.where, (), True) if isinstance(made, BadRow) else Seen(made.where, parts_of(made))
        return
    for part, _, example in examples(found or scan(recipe, home), recipe, home):
        if part == "train":
            yield Seen(example.where, parts_of(example))


class File(NamedTuple):
    """Rows that training saw, in a file, folder or data set: a relative `uri` starts at `home`, errors name `field`."""

    uri: str
    home: Path
    field: str


def files_of(recipe: Recipe, home: Path) -> tuple[File, ...]:
    """The files that `evaluate.contamination.against` names."""
    names = enumerate(recipe.evaluate.contamination.against)
    return tuple(File(uri, home, f"evaluate.contamination.against[{number}]") for number, uri in names)


def in_file(file: File) -> Iterator[Seen]:
    """The rows of `file` that hold text, by all their columns with text, and those that cannot be read.

    Raises DataError when it cannot be read, or its first rows hold no text.
    """
    if not file.uri:
        raise DataError(file.field, file.uri, "is empty; name a file, a folder or a data set")
    n_rows, has_text = 0, False
    columns = dict[str, None]()
    try:
        for row in read_rows(Source(uri=file.uri), file.home, file.field, streaming=True):
            if isinstance(row, BadRow):
                yield Seen(row.where, (), True)
                continue
            parts = tuple(texts_in(row.values))
            n_rows, has_text = n_rows + 1, has_text or bool(parts)
            if not has_text:
                columns |= dict.fromkeys(map(str, row.values))
                if n_rows == HEAD_ROWS:
                    break
            if parts:
                yield Seen(row.where, parts)
    except DataError as error:
        if error.field == f"{file.field}.format":  # here a file has no setting beside its name
            fix = f"its extension is not known; name one of {', '.join(EXTENSIONS)}"
            raise DataError(file.field, file.uri, fix, where=error.where) from error
        if error.field == f"{file.field}.uri":
            raise DataError(file.field, file.uri, error.fix, where=error.where) from error
        raise
    if not has_text:
        there = f"its columns are {', '.join(columns)}" if columns else "there is no row that can be read"
        raise DataError(file.field, file.uri, f"holds no text ({there}); name a file with the texts that training saw")


def check_files(files: Sequence[File]) -> None:
    """Raise the DataError that reading one of `files` begins with."""
    for file in files:
        for _ in islice((row for row in in_file(file) if not row.unreadable), 1):
            pass


def parts_of(example: Example) -> tuple[str, ...]:
    """What a row asks, and what it answers; of a document, its text alone. None of them is empty."""
    return tuple(text for text in dict.fromkeys((question_of(example), reference_text(example))) if text.strip())


def question_of(example: Example) -> str:
    """What a row asks; of a document, its text. A chat asks with all turns before the answer but the system's, which
    many chats share.
    """
    if isinstance(example, Preference):
        example = example.chosen
    if not isinstance(example, Conversation):
        return prompt_text(example)
    before = example.messages[: example.last_assistant]
    asked = [turn.content for turn in before if turn.role != "system"] or [turn.content for turn in before]
    return "\n".join(asked)


def texts_in(values: Any) -> Iterator[str]:
    """Every text in a row: of turns their contents (also where a cell holds them as JSON), of a list of words (CoNLL)
    the words with blanks between them.
    """
    if isinstance(values, str):
        turns = _turns_in(values)
        if turns is not None:
            yield from texts_in(turns)
        elif values.strip():
            yield values
    elif isinstance(values, Mapping):
        for name, value in values.items():
            if name not in ("role", "type"):
                yield from texts_in(value)
    elif isinstance(values, list | tuple):
        if values and all(isinstance(value, str) for value in values):
            yield from texts_in(" ".join(values))
        else:
            for value in values:
                yield from texts_in(value)


def _turns_in(text: str) -> list[Any] | None:
    if not text.startswith("[{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if all(isinstance(one, dict) and "role" in one for one in value) else None
