"""What every target is asked, and how what it answers is held against what this process answers, on the CPU."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOLERANCE = 1e-5
Record = dict[str, Any]
Answers = Iterator[tuple[str, list[Record]]]
"""(how it was asked, one record of output columns for each row), once or more."""


class Unavailable(Exception):
    """A target cannot be run here; the message says why. It then counts neither as passed nor as failed."""


class Mismatch(Exception):
    """A target does not load the package, or breaks a contract; the message says what is wrong."""


@dataclass(frozen=True)
class Case:
    """A package, rows of input columns (strings), and the records that this process's Runtime answers, one row a call.

    `trained`: the record that was stored with the package for its example, the first row; None where it has none.
    `base`: the folder of the base that an adapter needs; None for a whole model. `scratch`: a folder for what a target
    writes. `install`: whether environments that are missing may be made.
    """

    package: Path
    task: str
    rows: list[Record]
    expected: list[Record]
    scratch: Path
    trained: Record | None = None
    install: bool = True
    timeout_s: float = 300.0
    about: dict[str, Any] = field(default_factory=dict)
    base: Path | None = None

    @property
    def model(self) -> Path:
        """The Hugging Face folder inside."""
        return self.package / "model"

    @property
    def gguf(self) -> Path | None:
        """llama.cpp's file, where the package holds that instead of a Hugging Face folder."""
        return next(iter(sorted(self.model.glob("*.gguf"))), None)


def difference(wanted: Any, got: Any, place: str = "") -> tuple[float, str]:
    """(the largest difference between numbers, what is not equal: empty where all is).

    Numbers that are no whole ones may differ by `TOLERANCE`, everything else must be equal. The text tells no answer,
    only where and how much of it differs.
    """
    if isinstance(wanted, dict) and isinstance(got, dict):
        if missing := [name for name in wanted if name not in got]:
            return 0.0, f"{place or 'the answer'} lacks {missing[0]!r}"
        if more := [name for name in got if name not in wanted]:
            return 0.0, f"{place or 'the answer'} also has {more[0]!r}"
        return _all(difference(wanted[name], got[name], f"{place}.{name}".strip(".")) for name in wanted)
    if isinstance(wanted, list | tuple) and isinstance(got, list | tuple):
        if len(wanted) != len(got):
            return 0.0, f"{place or 'the answer'} has {len(got)} entries instead of {len(wanted)}"
        pairs = enumerate(zip(wanted, got, strict=True))
        return _all((difference(a, b, f"{place}[{i}]") for i, (a, b) in pairs))
    if isinstance(wanted, float) and isinstance(got, int | float) and not isinstance(got, bool):
        same = wanted == got or (math.isnan(wanted) and math.isnan(got))  # of infinities no difference can be taken
        apart = 0.0 if same else abs(wanted - got)
        apart = math.inf if math.isnan(apart) else apart
        return apart, "" if apart <= TOLERANCE else f"{place} differs by {apart:.3g}"
    if isinstance(wanted, str) and isinstance(got, str) and wanted != got:
        texts = enumerate(zip(wanted, got, strict=False))
        common = next((i for i, (a, b) in texts if a != b), min(len(wanted), len(got)))
        return 0.0, f"{place} differs from character {common} on ({len(got)} characters instead of {len(wanted)})"
    if type(wanted) is not type(got) or wanted != got:
        return 0.0, f"{place} is of type {type(got).__name__} instead of {type(wanted).__name__}, or another value"
    return 0.0, ""


def _all(parts: Iterator[tuple[float, str]]) -> tuple[float, str]:
    largest, first = 0.0, ""
    for apart, reason in parts:
        largest, first = max(largest, apart), first or reason
    return largest, first
