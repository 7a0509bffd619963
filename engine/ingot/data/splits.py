"""Training, validation and test rows. What is missing is drawn from the training rows with `data.split_seed`.

A drawn part is a shuffled sample (a file is often sorted by class or date, so its end is no sample of it), in
proportion to the labels (in a mixture: of each source), and rows with the same input stay together: a question that
stands on both sides would measure memory.

Rows are read twice: once to decide where each goes, which takes a few bytes a row, and once to be used.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingot.data.draw import Ints, draw, sample
from ingot.data.example import Example, classes_of, input_of, required_columns, to_example
from ingot.data.sources import BadRow, Row, read_rows
from ingot.data.table import Digests, Texts
from ingot.errors import DataError
from ingot.recipe import Data, Recipe, Source
from ingot.registry import nearest

LISTED_BAD_ROWS = 5
PARTS = ("train", "validation", "test")
TRAIN, LEFT_OUT = 0, len(PARTS)


@dataclass(frozen=True)
class DataReport:
    """What was read: rows per part, where each part is from, the bad rows, and inputs shared with training."""

    counts: dict[str, int]
    """Streaming: those that are given."""
    origins: dict[str, str]
    """`given`, `drawn from train`, or `streamed`."""
    bad_rows: dict[str, list[BadRow]]
    """What was read (`train`, in a mixture `train[0]` and so on, `validation`, `test`) -> its unusable rows."""
    shared_with_train: dict[str, int] = field(default_factory=dict)
    """validation, test -> rows whose input also stands in train. 0 for a drawn part."""
    sources: dict[str, int] = field(default_factory=dict)
    """In a mixture: `train[0]` and so on -> its rows in train."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `report_from` reads them back."""
        bad = {
            name: [{"where": row.where, "reason": row.reason} for row in rows] for name, rows in self.bad_rows.items()
        }
        values = {"counts": dict(self.counts), "origins": dict(self.origins), "bad_rows": bad}
        mixture = {"sources": dict(self.sources)} if self.sources else {}
        return {**values, "shared_with_train": dict(self.shared_with_train), **mixture}


def report_from(values: dict[str, Any]) -> DataReport:
    """The report that `as_dict` wrote."""
    bad = {name: [BadRow(**row) for row in rows] for name, rows in values["bad_rows"].items()}
    return DataReport(**{**values, "bad_rows": bad})


@dataclass(frozen=True)
class Reading:
    """One source: `name` (`train`, `train[1]`, `test`) as reports call it, and its number of usable rows once read."""

    name: str
    source: Source
    n_rows: int = 0

    @property
    def field(self) -> str:
        """As the recipe calls it."""
        return f"data.{self.name}"

    @property
    def part(self) -> str:
        """What its rows are, unless they are drawn for another part."""
        return self.name.partition("[")[0]


@dataclass(frozen=True)
class Scan:
    """Where every usable row goes. `part_of` [usable rows of all readings] int8: an index of PARTS, or LEFT_OUT."""

    readings: list[Reading]
    part_of: NDArray[np.int8]
    labels: tuple[str, ...]
    report: DataReport


@dataclass(frozen=True)
class Splits:
    """The rows of a run. `labels`: sorted class names of train, empty unless the task has classes."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    labels: tuple[str, ...]
    report: DataReport


def load_splits(recipe: Recipe, folder: Path, parts: Sequence[str] = PARTS) -> Splits:
    """Read and draw all three parts, and hold the rows of `parts`; relative paths start at `folder`.

    Raises `DataError` for unreadable or empty data, a missing column, more than `data.max_bad_rows` bad rows, and a
    label that training never saw.
    """
    found = scan(recipe, folder)
    rows: dict[str, list[Example]] = {name: [] for name in PARTS}
    for part, _, example in examples(found, recipe, folder):
        if part in parts:
            rows[part].append(example)
    return Splits(**rows, labels=found.labels, report=found.report)


def scan(recipe: Recipe, folder: Path, scratch: Path | None = None) -> Scan:
    """Decide for every usable row where it goes, and check them all; errors as in `load_splits`.

    `scratch`: a folder for a file with the rows' inputs while parts are drawn. None: the memory holds them.
    """
    data = recipe.data
    inputs = Texts(scratch) if _draws(data) else Digests()
    codes, names = array("q"), dict[tuple[str, ...], int]()
    readings: list[Reading] = []
    bad: dict[str, list[BadRow]] = {}
    for reading in readings_of(data):
        bad[reading.name] = []
        for _, example in checked_rows(reading, recipe, folder):
            if isinstance(example, BadRow):
                bad[reading.name].append(example)
            else:
                inputs.add(input_of(example))
                codes.append(names.setdefault(classes_of(example), len(names)))
        n_rows = len(codes) - sum(reading.n_rows for reading in readings)
        readings.append(replace(reading, n_rows=n_rows))
    check_bad_rows(bad, data.max_bad_rows)
    for reading in readings:
        if not reading.n_rows:
            fix = "holds no usable row; name a file with rows"
            raise DataError(f"{reading.field}.uri", reading.source.uri, fix)
    known = sorted(names)
    rank = np.array([known.index(name) for name in names], dtype=np.int64)
    labels, groups = rank[np.array(codes, dtype=np.int64)], inputs.groups()
    part_of = _assign(readings, groups, labels, data)
    learned = np.unique(labels[part_of == TRAIN])
    present = tuple(sorted({name for code in learned for name in known[code]}))
    found = Scan(readings, part_of, present, _report(readings, part_of, groups, data, bad))
    strange = [code for code, classes in enumerate(known) if not set(classes) <= set(present)]
    unknown = np.flatnonzero(np.isin(labels, strange) & (part_of != LEFT_OUT))
    if len(unknown) and not data.streaming:
        raise _unknown_label(found, int(unknown[0]), recipe, folder)
    return found


def examples(found: Scan, recipe: Recipe, folder: Path) -> Iterator[tuple[str, int, Example]]:
    """(part, number of the reading, row) of all rows that are in a part, in reading order.

    Raises `DataError` when the data is not what it was when it was scanned.
    """
    return ((part, number, example) for part, number, _, example in examples_of_rows(found, recipe, folder))


def examples_of_rows(found: Scan, recipe: Recipe, folder: Path) -> Iterator[tuple[str, int, Row, Example]]:
    """As `examples`, with the row of the file that each is made from."""
    start = 0
    for number, reading in enumerate(found.readings):
        n_rows = 0
        rows = usable_rows(reading, recipe, folder)
        parts = found.part_of[start : start + reading.n_rows].tolist()
        for part, (row, example) in zip(parts, rows, strict=False):  # in this order: no row is taken beyond the last
            n_rows += 1
            if part != LEFT_OUT:
                yield PARTS[part], number, row, example
        if n_rows != reading.n_rows or next(rows, None) is not None:
            raise DataError(f"{reading.field}.uri", reading.source.uri, "was changed while it was read; start again")
        start += n_rows


# --- reading ---------------------------------------------------------------------------------------------------


def readings_of(data: Data) -> list[Reading]:
    """The sources of a recipe in reading order: those of `train` first, but not when they are streamed."""
    given = [Reading(name, source) for name in PARTS[1:] if (source := getattr(data, name)) is not None]
    return given if data.streaming else [*training_sources(data), *given]


def training_sources(data: Data) -> list[Reading]:
    """`data.train`: one source, or the parts of a mixture."""
    if isinstance(data.train, Source):
        return [Reading("train", data.train)]
    return [Reading(f"train[{number}]", source) for number, source in enumerate(data.train)]


def usable_rows(reading: Reading, recipe: Recipe, folder: Path) -> Iterator[tuple[Row, Example]]:
    """The rows of a source that are examples of the task, with these."""
    for row, example in checked_rows(reading, recipe, folder):
        if isinstance(row, Row) and not isinstance(example, BadRow):
            yield row, example


def checked_rows(reading: Reading, recipe: Recipe, folder: Path) -> Iterator[tuple[Row | BadRow, Example | BadRow]]:
    """The rows of a source, and what the task makes of them. Raises `DataError` when no row has a needed column."""
    absent = required_columns(recipe.data, recipe.objective)
    last: Row | None = None
    for row in read_rows(reading.source, folder, reading.field):
        if isinstance(row, Row):
            last = row
            if absent:
                absent = {name: column for name, column in absent.items() if column not in row.values}
        yield row, row if isinstance(row, BadRow) else to_example(row, recipe.data, recipe.objective)
    if absent and last is not None:
        raise missing_column(absent, last, reading)


def missing_column(absent: dict[str, str], row: Row, reading: Reading) -> DataError:
    """No row has the columns `absent` (field of the recipe -> column): a mistake of the recipe, not of the rows."""
    name, column = next(iter(absent.items()))
    present = [str(key) for key in row.values]
    hint = nearest(column, present)
    listed = "" if hint.startswith("use one of") else f"; the columns are: {', '.join(present)}"
    fix = f"{reading.field}.uri = {reading.source.uri!r} has no such column; {hint}{listed}"
    return DataError(name, column, fix, where=row.where)


def check_bad_rows(bad: dict[str, list[BadRow]], tolerated: int) -> None:
    """Raise `DataError` when there are more than `data.max_bad_rows`; `bad` is that of a `DataReport`."""
    rows = [(f"data.{name}: " if "[" in name else "", row) for name, part in bad.items() for row in part]
    if len(rows) <= tolerated:
        return
    listed = "".join(f"\n  {source}{row.where}: {row.reason}" for source, row in rows[:LISTED_BAD_ROWS])
    more = f"\n  and {len(rows) - LISTED_BAD_ROWS} more" if len(rows) > LISTED_BAD_ROWS else ""
    fix = f"{len(rows)} rows cannot be used; mend them, or set data.max_bad_rows: {len(rows)} to go on without them:"
    raise DataError("data.max_bad_rows", tolerated, f"{fix}{listed}{more}", where=rows[0][1].where)


def _unknown_label(found: Scan, place: int, recipe: Recipe, folder: Path) -> DataError:
    everything = replace(found, part_of=np.zeros_like(found.part_of))  # nothing left out, so that the place counts
    _, _, row = next(islice(examples(everything, recipe, folder), place, None))
    label = next(name for name in classes_of(row) if name not in found.labels)
    fix = f"training never saw this label ({nearest(label, found.labels)}); mend it or add such rows to train"
    if recipe.data.max_train_rows is not None:
        fix += f" (data.max_train_rows = {recipe.data.max_train_rows} leaves rows out)"
    return DataError(f"data.{PARTS[found.part_of[place]]}: label", label, fix, where=row.where)


# --- drawing ---------------------------------------------------------------------------------------------------


def _draws(data: Data) -> bool:
    shares = ((data.validation, data.validation_share), (data.test, data.test_share))
    return not data.streaming and any(given is None and share > 0 for given, share in shares)


def _assign(readings: Sequence[Reading], groups: Ints, labels: Ints, data: Data) -> NDArray[np.int8]:
    sizes = [reading.n_rows for reading in readings]
    part_of = np.repeat(np.array([PARTS.index(reading.part) for reading in readings], dtype=np.int8), sizes)
    train = everything = np.flatnonzero(part_of == TRAIN)
    # By source, then by label; the labels' numbers are in the labels' order.
    strata = np.repeat(np.arange(len(sizes)), sizes) * (int(labels.max(initial=0)) + 1) + labels
    # Test first, so that changing validation_share leaves the test rows as they are.
    for name, share in (("test", data.test_share), ("validation", data.validation_share)):
        if share == 0 or data.streaming or getattr(data, name) is not None:
            continue
        drawn = draw(train, groups, strata, max(1, round(share * len(everything))), f"{data.split_seed} {name}")
        if not len(drawn):
            fix = f"{len(everything)} rows hold too few distinct inputs to draw from; add rows or set data.{name}"
            raise DataError(f"data.{name}_share", share, fix)
        part_of[drawn] = PARTS.index(name)
        train = np.setdiff1d(train, drawn, assume_unique=True)
    if data.max_train_rows is not None:
        part_of[train] = LEFT_OUT
        part_of[sample(train, strata, data.max_train_rows, f"{data.split_seed} train")] = TRAIN
    return part_of


def _report(
    readings: Sequence[Reading],
    part_of: NDArray[np.int8],
    groups: Ints,
    data: Data,
    bad: dict[str, list[BadRow]],
) -> DataReport:
    rows = {name: np.flatnonzero(part_of == number) for number, name in enumerate(PARTS)}
    origins = {name: "given" if getattr(data, name) is not None else "drawn from train" for name in PARTS}
    counts = {name: len(found) for name, found in rows.items()}
    shared = {name: int(np.isin(groups[rows[name]], groups[rows["train"]]).sum()) for name in PARTS[1:]}
    if data.streaming:
        given = {reading.part: counts[reading.part] for reading in readings}
        return DataReport(given, origins | {"train": "streamed"}, bad)
    sources: dict[str, int] = {}
    start = 0
    for reading in readings:
        if "[" in reading.name:
            sources[reading.name] = int((part_of[start : start + reading.n_rows] == TRAIN).sum())
            if not sources[reading.name]:
                fix = f"leaves no row of {reading.field} to learn from; raise it"
                raise DataError("data.max_train_rows", data.max_train_rows, fix)
        start += reading.n_rows
    return DataReport(counts, origins, bad, shared, sources)
