"""Answers as they come: rows cut into portions, and each finished portion a file, so that a killed evaluation goes on.

What a portion holds follows from the data alone, not from the number of ranks or from what was done before: a resumed
evaluation asks the same rows together as an uninterrupted one, and gets the same numbers.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

from ingot.errors import IngotError
from ingot.evaluation.samples import Item, Output
from ingot.evaluation.statistics import cluster_numbers
from ingot.evaluation.task import Task

Value = TypeVar("Value")
MANIFEST = "asked.json"


class Portion(NamedTuple):
    """Rows of one window that are asked together: places in the window, rows of similar size, the largest first."""

    window: int
    number: int
    places: list[int]

    @property
    def file(self) -> str:
        """Its file's name."""
        return f"{self.window:05d}-{self.number:06d}.jsonl"


class _Windowed(Sequence[Value]):
    """A sequence in windows of `sizes`, of which one at a time is in memory."""

    sizes: list[int]

    def window(self, number: int) -> list[Value]:
        """Read a window."""
        raise NotImplementedError

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[Value]:
        for number in range(len(self.sizes)):
            yield from self.window(number)

    @overload
    def __getitem__(self, index: int, /) -> Value: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[Value]: ...
    def __getitem__(self, index: int | slice, /) -> Value | list[Value]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        number = 0
        while place >= self.sizes[number]:
            place -= self.sizes[number]
            number += 1
        return self.window(number)[place]


class Rows(_Windowed[Item]):
    """The rows of a task, read window by window as often as they are asked for. `cluster_N` [N] int: the group of each,
    None where rows are independent.

    Raises IngotError where a window is not what it was before.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self.sizes = []
        self._held: tuple[int, list[Item]] = (-1, [])
        groups: list[str | None] = []
        for number, window in enumerate(task.windows()):
            self.sizes.append(len(window))
            groups += [item.group for item in window]
            self._held = number, window
        self.cluster_N = cluster_numbers(groups)

    def windows(self) -> Iterator[list[Item]]:
        """All windows in order."""
        if len(self.sizes) == 1:
            yield self._held[1]
            return
        for number, window in enumerate(self._task.windows()):
            if number >= len(self.sizes) or len(window) != self.sizes[number]:
                raise IngotError(f"the rows of {self._task.name} changed while they were read; start again")
            self._held = number, window
            yield window

    def __iter__(self) -> Iterator[Item]:
        for window in self.windows():
            yield from window

    def window(self, number: int) -> list[Item]:
        """The window in memory, or another, for which all before it are read."""
        windows = self.windows()
        while self._held[0] != number:
            next(windows)
        return self._held[1]


def portions_of(task: Task, window: Sequence[Item], number: int, rows: int) -> list[Portion]:
    """`window` cut into portions of at most `rows` rows. Largest first: memory runs out at the first or never, and the
    smallest come last, when ranks wait for each other.
    """
    sizes = [task.size(item) for item in window]
    order = sorted(range(len(window)), key=lambda place: (-sizes[place], place))
    return [Portion(number, start // rows, order[start : start + rows]) for start in range(0, len(order), max(1, rows))]


class Answers(_Windowed[Output]):
    """Answers of all portions, in the order of the rows."""

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        self._folder, self.sizes = folder, list(sizes)
        self._held: tuple[int, list[Output]] = (-1, [])

    def window(self, number: int) -> list[Output]:
        """The answers of a window. Raises IngotError where some are missing."""
        if self._held[0] != number:
            found: dict[int, Output] = {}
            for path in sorted(self._folder.glob(f"{number:05d}-*.jsonl")):
                for line in path.read_text(encoding="utf-8").splitlines():
                    answer = json.loads(line)
                    found[answer["place"]] = answer["output"] | {"seconds": answer["seconds"]}
            if len(found) != self.sizes[number]:
                raise IngotError(
                    f"{self._folder} holds {len(found)} of {self.sizes[number]} answers of window {number}: a rank "
                    "did not write to the folder that this one reads; evaluate again in a folder that all ranks share"
                )
            self._held = number, [found[place] for place in range(self.sizes[number])]
        return self._held[1]


def begin(folder: Path, asked: dict[str, Any]) -> None:
    """Make `folder` for the portions of what `asked` says (for people; its hash is in the folder's name)."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / MANIFEST, json.dumps(asked, indent=1, ensure_ascii=False) + "\n")


def finished(folder: Path) -> set[str]:
    """File names of the portions that are done."""
    return {path.name for path in folder.glob("*.jsonl")}


def rows_in(done: set[str], sizes: Sequence[int], rows: int) -> int:
    """How many rows the portions of `done` hold, of windows of `sizes` rows cut into `rows` each."""
    places = [tuple(map(int, name.removesuffix(".jsonl").split("-"))) for name in done]
    return sum(max(0, min(rows, sizes[window] - number * rows)) for window, number in places if window < len(sizes))


def keep(folder: Path, portion: Portion, outputs: Sequence[Output], seconds: float) -> None:
    """Write the answers of a portion in one step; each row gets its share of the `seconds`."""
    if len(outputs) != len(portion.places):
        raise ValueError(f"{len(outputs)} answers to {len(portion.places)} rows")
    share = seconds / max(1, len(outputs))
    lines = [
        json.dumps({"place": place, "output": output, "seconds": share}) + "\n"
        for place, output in zip(portion.places, outputs, strict=True)
    ]
    _write(folder / portion.file, "".join(lines))


def forget(folder: Path) -> None:
    """Remove portions: their answers are in the task's own file."""
    shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
