"""Progress of long stages: a bar with rate and time left on a terminal, a line now and then in a log, or nothing."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINES_PER_STAGE = 10  # a log that is not a terminal gets a line at every tenth of a stage


class Bar:
    """One running stage; call `advance` as units are done."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self.fields: dict[str, float | str] = {}
        self._started = time.monotonic()

    def advance(self, n: int = 1, **fields: float | str) -> None:
        """Count `n` more units; `fields` (e.g. loss=1.23) are shown beside the count until they change."""
        self.done += n
        self.fields |= fields
        self._show()

    @property
    def seconds(self) -> float:
        """Seconds since the stage started."""
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    def facts(self) -> str:
        """Return the rate and the fields, e.g. "3.1 steps/s  loss 1.234"."""
        shown = [
            f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self.fields.items()
        ]
        return "  ".join([f"{self.rate:.3g} {self.unit}/s", *shown])

    def _show(self) -> None:
        """Quiet: only counts."""


class _LineBar(Bar):
    """Prints a line at every tenth of the total."""

    def __init__(self, name: str, total: int, unit: str, console: Console) -> None:
        super().__init__(name, total, unit)
        self._console = console
        self._tenths = 0

    def _show(self) -> None:
        tenths = LINES_PER_STAGE * self.done // max(1, self.total)
        if tenths > self._tenths:
            self._tenths = tenths
            left = (self.total - self.done) / self.rate if self.rate > 0 else 0.0
            ahead = f"  {left:.0f} s left" if self.done < self.total else ""
            self._console.print(f"{self.name}  {self.done}/{self.total} {self.unit}  {self.facts()}{ahead}")


class _RichBar(Bar):
    """Drives a bar of rich."""

    def __init__(self, name: str, total: int, unit: str, bars: RichProgress) -> None:
        super().__init__(name, total, unit)
        self._bars = bars
        self._task = bars.add_task(name, total=total, unit=unit, facts="")

    def _show(self) -> None:
        self._bars.update(self._task, completed=self.done, facts=self.facts())


class Progress:
    """Where stages are shown: on standard error, so that standard output stays for results."""

    def __init__(self, quiet: bool = False, file: IO[str] | None = None) -> None:
        self.quiet = quiet
        self._file = file

    def note(self, text: str) -> None:
        """Say something that is no progress: what was decided, what was left out."""
        if not self.quiet:
            Console(file=self._file or sys.stderr, highlight=False, markup=False, soft_wrap=True).print(text)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Bar]:
        """Show a stage of `total` units while the block runs; a last line says how long it took."""
        if self.quiet:
            yield Bar(name, total, unit)
            return
        # Made here and not in __init__: a test or a notebook may have replaced sys.stderr since.
        console = Console(file=self._file or sys.stderr, highlight=False, markup=False, soft_wrap=True)
        if not console.is_terminal:
            line = _LineBar(name, total, unit, console)
            console.print(f"{name}: {total} {unit}")
            yield line
            console.print(f"{name}: done in {line.seconds:.1f} s")
            return
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[facts]}"),
        )
        with RichProgress(*columns, console=console) as bars:
            yield _RichBar(name, total, unit, bars)
