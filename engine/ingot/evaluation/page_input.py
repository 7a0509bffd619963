"""What a report is told beside the evaluations: differences, the promotion's verdict, rows shared with the training."""

from dataclasses import dataclass, field

from ingot.evaluation.result import Score
from ingot.evaluation.statistics import Paired


@dataclass(frozen=True)
class Change:
    """`model` minus the first model by `metric`, on all rows of `task` or on those of `slice` (`language = de`).

    `p`: two-sided, adjusted for the number of tests where it was. `sign`: 1 better, -1 worse, 0 neither was shown.
    `detectable`: the smallest difference that so many rows show four times in five; None where it is not known.
    """

    task: str
    metric: str
    model: str
    value: float
    low: float
    high: float
    p: float
    sign: int
    n: int
    slice: str | None = None
    detectable: float | None = None


def change(
    task: str,
    metric: str,
    model: str,
    found: Paired,
    *,
    higher_is_better: bool,
    alpha: float = 0.05,
    slice: str | None = None,
    detectable: float | None = None,
) -> Change:
    """A `Change` as a paired test has it, better or worse where its p-value is below `alpha`."""
    p = found.p_value if found.mcnemar_p is None else found.mcnemar_p
    direction = (found.difference > 0) - (found.difference < 0)
    sign = (direction if higher_is_better else -direction) if p < alpha else 0
    return Change(task, metric, model, found.difference, found.low, found.high, p, sign, found.n, slice, detectable)


@dataclass(frozen=True)
class Condition:
    """One condition of a promotion policy, and whether it holds."""

    holds: bool
    text: str


@dataclass(frozen=True)
class Promotion:
    """Whether the model may be promoted, and why."""

    granted: bool
    sentence: str
    conditions: list[Condition] = field(default_factory=list)


@dataclass(frozen=True)
class Overlap:
    """Rows of a task that training saw: way of finding them -> how many; model -> metric -> score without them; and the
    differences without them.
    """

    task: str
    rows: int
    shared: dict[str, int]
    without: dict[str, dict[str, Score]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
