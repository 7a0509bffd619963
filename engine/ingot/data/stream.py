"""Training rows that are read, encoded and learned window by window, over and over: for sets that fit on no disk.

A window is `data.stream_window_rows` rows as the source holds them, unusable ones included; the last one of a pass may
be shorter. In a mixture every window takes its rows from each source by weight, and a source that ends begins again.
Every rank reads and encodes every window: what is in a step never depends on the ranks.
"""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from ingot.data.example import Example, required_columns, to_example
from ingot.data.plan import Cursor, Portion, plan_epoch
from ingot.data.rows import EncodedRows, ListRows
from ingot.data.sources import BadRow, Row, read_rows, require_lazy
from ingot.data.splits import Reading, check_bad_rows, missing_column, training_sources
from ingot.data.table import ArrowRows, RowWriter
from ingot.data.template import ROWS_PER_CALL, DroppedReport, Encoded, encode_all, request_of
from ingot.data.turns import Tokenizer
from ingot.errors import DataError, RecipeError
from ingot.recipe import Recipe
from ingot.recipe_data import CLASSES

HEAD_ROWS = 100  # of each source are read and encoded before training: most mistakes show there
IN_FLIGHT = 3  # steps that training may still hold of a window when the next but one is begun

Note = Callable[[str], None]


def check(recipe: Recipe, home: Path) -> None:
    """Raise `RecipeError` for what streaming cannot do, `DataError` for a file that cannot be read row by row."""
    data, train = recipe.data, recipe.train
    if train.max_steps is None:
        fix = "data.streaming needs it, because nobody knows how many steps an epoch of a stream has; set it"
        raise RecipeError("train.max_steps", None, fix)
    for name in ("validation", "test"):
        share = getattr(data, f"{name}_share")
        if getattr(data, name) is None and share > 0:
            fix = f"nothing can be drawn from a stream (data.streaming: true); set it to 0, or name rows in data.{name}"
            raise RecipeError(f"data.{name}_share", share, fix)
    if data.max_train_rows is not None:
        fix = "no rows can be drawn from a stream (data.streaming: true); remove it, train.max_steps says how many"
        raise RecipeError("data.max_train_rows", data.max_train_rows, fix)
    if recipe.objective.task in CLASSES or recipe.objective.method == "dpo":
        needs = "know every class" if recipe.objective.task in CLASSES else "ask the starting model about every row"
        fix = f"{recipe.objective.loss} has to {needs} before the first step; set it to false"
        raise RecipeError("data.streaming", True, fix)
    for reading in training_sources(data):
        require_lazy(reading.source, home, reading.field)


def first_rows(recipe: Recipe, home: Path, bad: dict[str, list[BadRow]] | None = None) -> list[Example]:
    """The usable ones of the first rows of each training source; at least one of each, or `DataError`.

    `bad`: the unusable rows of validation and test.
    """
    found: list[Example] = []
    bad = dict(bad or {})
    for reading in training_sources(recipe.data):
        rows = list(islice(read_rows(reading.source, home, reading.field, streaming=True), HEAD_ROWS))
        made = [_example(row, recipe) for row in rows]
        usable = [row for row in made if not isinstance(row, BadRow)]
        bad[reading.name] = [row for row in made if isinstance(row, BadRow)]
        present = [row for row in rows if isinstance(row, Row)]
        wanted = required_columns(recipe.data, recipe.objective)
        absent = {name: column for name, column in wanted.items() if all(column not in row.values for row in present)}
        if absent and present:
            raise missing_column(absent, present[-1], reading)
        check_bad_rows(bad, recipe.data.max_bad_rows)
        if not usable:
            what = f"its first {len(made)} rows are unusable" if made else "holds no usable row; name a file with rows"
            raise DataError(f"{reading.field}.uri", reading.source.uri, what)
        found += usable
    return found


def _example(row: Row | BadRow, recipe: Recipe) -> Example | BadRow:
    return row if isinstance(row, BadRow) else to_example(row, recipe.data, recipe.objective)


@dataclass(frozen=True)
class Counts:
    """What has been read so far. `passes`: how often the source that ended most often did."""

    windows: int = 0
    rows: int = 0
    passes: int = 0
    unusable: int = 0
    truncated: int = 0
    dropped: int = 0


class StreamFeed:
    """A `Feed` over windows. `rows`: the first rows of each source. `example`: the first of them as a request.

    Raises `DataError` for a source that cannot be read, or of which no row at the head can be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        home: Path,
        tokenizer: Tokenizer,
        bad: dict[str, list[BadRow]] | None = None,
        note: Note = lambda text: None,
    ) -> None:
        self._recipe, self._home, self._tokenizer, self._note = recipe, home, tokenizer, note
        self._readings = training_sources(recipe.data)
        self._given_bad = bad or {}
        self.steps = recipe.train.max_steps or 0
        self.counts = Counts()
        head = first_rows(recipe, home, self._given_bad)
        self.example = request_of(head[0], recipe.objective.task, tokenizer)
        self.rows: EncodedRows = ListRows(self._encode(head)[0])
        if not len(self.rows):
            fix = f"none of the first {HEAD_ROWS} training rows keeps a trainable token; raise it"
            raise DataError("data.max_tokens", recipe.data.max_tokens, fix)

    def facts(self) -> dict[str, Any]:
        """What was read, as plain values."""
        return asdict(self.counts)

    def start(self, cursor: Cursor) -> Iterator[Portion]:
        """Portions from `cursor` on, without end. What is before it is read again, but not encoded."""
        stop = threading.Event()
        windows = self._windows(cursor.epoch, stop)
        pool = ThreadPoolExecutor(1, thread_name_prefix="ingot-stream")
        try:
            coming = pool.submit(next, windows)
            for window in count(cursor.epoch):
                rows = coming.result()
                plan = plan_epoch(rows.lengths, self._recipe.data, self._recipe.train, window)
                skipped = cursor.position if window == cursor.epoch else 0
                todo = [step for step in range(len(plan)) if plan.step_ends[step] > skipped]
                begin = todo[: IN_FLIGHT + 1][-1:]  # a window is encoded while the one before it is learned
                for step in todo:
                    if [step] == begin:
                        coming = pool.submit(next, windows)
                    yield Portion(rows, plan[step], Cursor(window, int(plan.step_ends[step])))
                if not begin:
                    coming = pool.submit(next, windows)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _windows(self, first: int, stop: threading.Event) -> Iterator[ArrowRows]:
        """Encoded windows from number `first` on, until `stop` is set."""
        sources = [_Endless(reading, self._recipe, self._home) for reading in self._readings]
        sizes, alone = self._rows_per_window(), len(sources) == 1
        bad: dict[str, list[BadRow]] = {}
        self.counts = Counts()
        for source, size in zip(sources, sizes, strict=True):
            for row in source.skip(first, size, whole=alone):
                self._usable(row, source, bad)
                if stop.is_set():
                    return
        n_kept = 0
        while True:
            writer = RowWriter()
            for source, size in zip(sources, sizes, strict=True):
                rows = (self._usable(row, source, bad) for row in source.take(size, whole=alone))
                while chunk := list(islice(rows, ROWS_PER_CALL)):
                    if stop.is_set():
                        return
                    kept, report = self._encode([row for row in chunk if row is not None])
                    writer.add(kept)
                    n_kept += len(kept)
                    self._count(chunk, report)
            self.counts = replace(
                self.counts, windows=self.counts.windows + 1, passes=max(source.passes for source in sources)
            )
            if self.counts.windows == 1:
                self._note(self._first_window(n_kept))
            if not n_kept and self.counts.passes:
                raise DataError("data.train", sources[0].reading.source.uri, "no row of it can be learned from")
            yield writer.rows()

    def _rows_per_window(self) -> list[int]:
        weights = [reading.source.weight for reading in self._readings]
        return [max(1, round(self._recipe.data.stream_window_rows * weight / sum(weights))) for weight in weights]

    def _usable(self, row: Row | BadRow, source: "_Endless", bad: dict[str, list[BadRow]]) -> Example | None:
        """The row as an example, or None; a bad row of a first pass is counted against `data.max_bad_rows`."""
        made = _example(row, self._recipe)
        if not isinstance(made, BadRow):
            return made
        if not source.passes:
            bad.setdefault(source.reading.name, []).append(made)
            check_bad_rows({**self._given_bad, **bad}, self._recipe.data.max_bad_rows)
        return None

    def _encode(self, rows: list[Example]) -> tuple[list[Encoded], DroppedReport]:
        return encode_all(rows, self._tokenizer, self._recipe.data, self._recipe.objective, ())

    def _count(self, chunk: list[Example | None], report: DroppedReport) -> None:
        before = self.counts
        self.counts = replace(
            before,
            rows=before.rows + len(chunk),
            unusable=before.unusable + len(chunk) - report.total,
            truncated=before.truncated + report.truncated,
            dropped=before.dropped + report.count,
        )

    def _first_window(self, n_kept: int) -> str:
        seen = self.counts
        cut = f"{seen.truncated:,} cut at {self._recipe.data.max_tokens} tokens"
        lost = f"{seen.unusable:,} unusable, {seen.dropped:,} without a trainable token"
        return f"data: first window: {n_kept:,} of {seen.rows:,} rows learned ({cut}, {lost})"


class _Endless:
    """One source, read over and over. `size`: its rows, known once it has been read to its end."""

    def __init__(self, reading: Reading, recipe: Recipe, home: Path) -> None:
        self.reading = reading
        self.size: int | None = None
        self.passes = 0
        self._open = lambda: read_rows(reading.source, home, reading.field, streaming=True)
        self._rows = self._open()
        self._place = 0

    def take(self, n: int, *, whole: bool) -> Iterator[Row | BadRow]:
        """The next `n` rows; `whole`: none of another pass than the first of them."""
        taken = 0
        while taken < n:
            row = next(self._rows, None)
            if row is None:
                if not self._place:
                    fix = "holds no row; name a file with rows"
                    raise DataError(f"{self.reading.field}.uri", self.reading.source.uri, fix)
                self.size, self._place, self.passes, self._rows = self._place, 0, self.passes + 1, self._open()
                if whole and taken:
                    return
                continue
            taken, self._place = taken + 1, self._place + 1
            yield row

    def skip(self, windows: int, n: int, *, whole: bool) -> Iterator[Row | BadRow]:
        """Go on by `windows` times `take(n)`, in at most two passes; yields the rows that it reads on the way."""
        left = windows if whole else windows * n
        while left:
            if self.size is not None:
                left %= math.ceil(self.size / n) if whole else self.size
            if left:
                step = n if whole else min(n, left)
                yield from self.take(step, whole=whole)
                left -= 1 if whole else step
