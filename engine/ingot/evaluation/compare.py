"""Models on the same rows -> what changed, and whether it could be chance. What is not comparable is refused."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ingot.evaluation.metrics import METRICS
from ingot.evaluation.pairing import (
    ALL_SLICES,
    LABEL,
    Kept,
    NotComparable,
    Pairs,
    common_metrics,
    pair,
    require_same_question,
    slice_name,
    unknown_slice,
)
from ingot.evaluation.result import Evaluation, write_text
from ingot.evaluation.statistic import Array, Statistic
from ingot.evaluation.statistics import (
    Paired,
    detectable_change,
    detectable_difference,
    holm,
    mcnemar_of,
    paired,
)

__all__ = [
    "ALL_SLICES",
    "Comparison",
    "Difference",
    "NotComparable",
    "compare",
    "compare_all",
    "load_comparison",
    "save_comparisons",
]
FILE, PAIRS = "comparison.json", "pairs"
SLICE_ROWS = 20  # a slice of fewer rows is named and left out
MOST_DRAWS = 20_000


@dataclass(frozen=True)
class Difference:
    """The second model minus the first by one metric, on all rows of a task or on those of `slice` (`language = de`).

    `p_value`: McNemar's exact test for scores of 0 and 1 of independent rows, else the paired bootstrap. `p_adjusted`:
    by Holm (1979) over all metrics, tasks and models that were compared together; slices are adjusted among slices.
    `won`, `lost`: rows that got better and worse, where rows have scores. `detectable`: the smallest true difference
    that such rows show four times in five, None where none is known. `clusters`: how many groups of rows were
    resampled, None where rows were.
    """

    task: str
    metric: str
    paired: Paired
    higher_is_better: bool
    p_value: float
    p_adjusted: float
    won: int | None = None
    lost: int | None = None
    slice: str | None = None
    detectable: float | None = None
    clusters: int | None = None

    def verdict(self, alpha: float) -> int:
        """1: the second model is better; -1: it is worse; 0: neither is shown, the adjusted p-value is not below
        `alpha`.
        """
        direction = (self.paired.difference > 0) - (self.paired.difference < 0)
        return (direction if self.higher_is_better else -direction) if self.p_adjusted < alpha else 0


@dataclass(frozen=True)
class Comparison:
    """`names` of both models; every metric that both have, task by task, and then those of slices.

    `alpha`: what an adjusted p-value is held against. `left_out`: task -> rows of the first and of the second model
    that the other has not. `small`: task -> slices of too few rows, or on which nothing is defined, -> their rows.
    """

    names: tuple[str, str]
    differences: list[Difference]
    alpha: float = 0.05
    confidence: float = 0.95
    left_out: dict[str, tuple[int, int]] = field(default_factory=dict)
    small: dict[str, dict[str, int]] = field(default_factory=dict)

    def of(self, task: str, slice: str | None = None) -> dict[str, Difference]:
        """Metric -> difference, of all rows of one task or of one of its slices."""
        return {it.metric: it for it in self.differences if (it.task, it.slice) == (task, slice)}

    def by_metric(self, task: str) -> dict[str, Any]:
        """Metric -> what `Paired` has, of all rows of one task, as plain values for JSON."""
        return {metric: asdict(it.paired) for metric, it in self.of(task).items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self) | {"names": list(self.names)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Comparison":
        """What `as_dict` gave; of a file of several models, the first pair."""
        values = {name: value for name, value in values.items() if name != PAIRS}
        found = [Difference(**{**it, "paired": Paired(**it["paired"])}) for it in values["differences"]]
        first, second = values["names"]
        left_out = {task: (ours, theirs) for task, (ours, theirs) in values.get("left_out", {}).items()}
        return cls(**{**values, "names": (first, second), "differences": found, "left_out": left_out})


def save_comparisons(comparisons: Sequence[Comparison], folder: Path) -> None:
    """Write `comparison.json` to `folder` in one step: the first pair, and where there are more, all of them as `pairs`
    in the order of the models.
    """
    plain = [it.as_dict() for it in comparisons]
    found = plain[0] if len(plain) == 1 else plain[0] | {PAIRS: plain}
    write_text(folder / FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def load_comparison(folder: Path) -> Comparison | None:
    """Read `comparison.json`; None when only one model was measured."""
    path = folder / FILE
    return Comparison.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def compare(
    base: Mapping[str, Evaluation],
    tuned: Mapping[str, Evaluation],
    *,
    samples: int,
    confidence: float,
    seed: int = 0,
    slices: Sequence[str] = (),
    alpha: float = 0.05,
    rows: Kept = "same",
) -> Comparison:
    """Test `tuned` against `base`; `compare_all` has more."""
    settings: dict[str, Any] = {"seed": seed, "slices": slices, "alpha": alpha, "rows": rows}
    return compare_all(base, [tuned], samples=samples, confidence=confidence, **settings)[0]


def compare_all(
    base: Mapping[str, Evaluation],
    others: Sequence[Mapping[str, Evaluation]],
    *,
    samples: int,
    confidence: float,
    seed: int = 0,
    slices: Sequence[str] = (),
    alpha: float = 0.05,
    rows: Kept = "same",
) -> list[Comparison]:
    """Test each of `others` (task -> evaluation) against `base` on every task that both have, row by row.

    Args:
        samples: resamples of each test; more are drawn (up to 20,000) where so many tests are made that the smallest
            p-value of so few could not come out below `alpha`.
        slices: fields whose parts are compared too: those stored with the rows, `label` of classes, `length`;
            ALL_SLICES are all of them. Parts of fewer than 20 rows are left out and named.
        alpha: chance of any false finding among all tests of whole tasks, and among all tests of slices.
        rows: same, or common: compare those that both have.

    Raises NotComparable when nothing is common, or when a task was asked another way or on other rows; FieldError for a
    field of slices that no task has.
    """
    plans = [_plan(base, other, slices, rows) for other in others]
    known = list(dict.fromkeys(name for plan in plans for name in plan.fields))
    if unknown := [name for name in slices if name not in known and tuple(slices) != ALL_SLICES]:
        raise unknown_slice(unknown[0], known)
    counts = {
        sliced: sum((it.slice is not None) == sliced for plan in plans for it in plan.tests) for sliced in (False, True)
    }
    draws = {sliced: max(samples, min(MOST_DRAWS, math.ceil(4 * n / alpha))) for sliced, n in counts.items()}
    found = [
        [it for test in plan.tests if (it := _tested(test, _draws(test, samples, draws), confidence, seed, alpha))]
        for plan in plans
    ]
    adjusted = _adjusted([it for differences in found for it in differences])
    comparisons = []
    for plan, other, differences in zip(plans, others, found, strict=True):
        own = [next(adjusted) for _ in differences]
        names = _name(base), _name(other)
        comparisons.append(Comparison(names, own, alpha, confidence, plan.left_out, _with_undefined(plan, own)))
    return comparisons


class _Test(NamedTuple):
    """One metric on all rows of a task, or on one of its slices."""

    task: str
    metric: str
    first: Statistic
    second: Statistic
    clusters: Array | None
    slice: str | None


class _Plan(NamedTuple):
    tests: list[_Test]
    left_out: dict[str, tuple[int, int]]
    small: dict[str, dict[str, int]]
    fields: list[str]


def _plan(base: Mapping[str, Evaluation], other: Mapping[str, Evaluation], slices: Sequence[str], rows: Kept) -> _Plan:
    tasks = [task for task in base if task in other]
    if not tasks:
        raise NotComparable("tasks", sorted(base), f"the other one has {sorted(other)}; evaluate both on the same")
    plan = _Plan([], {}, {}, [])
    for task in tasks:
        a, b = base[task], other[task]
        require_same_question(a, b)
        metrics = common_metrics(a, b)
        pairs = pair(a, b, slices, rows)
        plan.fields.extend(pairs.fields)
        if any(pairs.left_out):
            plan.left_out[task] = pairs.left_out
        cut = {slice_name(name, value): at for name, parts in pairs.slices.items() for value, at in parts.items()}
        small = {name: len(places) for name, places in cut.items() if not _enough(places, pairs)}
        if small:
            plan.small[task] = small
        for name, places in [(None, None), *((name, places) for name, places in cut.items() if name not in small)]:
            plan.tests.extend(_tests(task, metrics, a, b, pairs, name, places))
    return plan


def _enough(places: Array, pairs: Pairs) -> bool:
    independent = pairs.clusters is None or len(np.unique(pairs.clusters[places])) > 1
    return len(places) >= SLICE_ROWS and independent


def _tests(
    task: str,
    metrics: Sequence[str],
    a: Evaluation,
    b: Evaluation,
    pairs: Pairs,
    name: str | None,
    places: Array | None,
) -> Iterator[_Test]:
    kept = np.arange(len(pairs.first)) if places is None else places
    cluster_N = None
    if pairs.clusters is not None:
        cluster_N = np.unique(pairs.clusters[kept], return_inverse=True)[1]
    of_one_class = name is not None and name.startswith(slice_name(LABEL, "")) and a.kind == "text-classification"
    for metric in metrics:
        first, second = a.statistics[metric], b.statistics[metric]
        if of_one_class and first.per_row() is None:
            continue  # a mean over classes, or a curve between them, says nothing of one
        first = replace(first, rows=first.rows[pairs.first[kept]])
        second = replace(second, rows=second.rows[pairs.second[kept]])
        yield _Test(task, metric, first, second, cluster_N, name)


def _draws(test: _Test, samples: int, more: Mapping[bool, int]) -> int:
    """`more`, of its family, where its p-value comes from them; an exact one needs none."""
    exact = test.clusters is None and mcnemar_of(test.first, test.second) is not None
    return samples if exact else more[test.slice is not None]


def _tested(test: _Test, samples: int, confidence: float, seed: int, alpha: float) -> Difference | None:
    """None where the metric is undefined on these rows."""
    cluster_N = test.clusters
    with np.errstate(divide="ignore", invalid="ignore"):  # undefined on these rows, or on a draw of them: no number
        change = test.second.value() - test.first.value()
        if not math.isfinite(change):
            return None
        found = paired(test.first, test.second, samples, confidence, seed, cluster_N)
    if not math.isfinite(found.low):
        return None  # on no draw
    better = METRICS[test.metric].higher_is_better
    p = found.p_value if found.mcnemar_p is None else found.mcnemar_p
    ours, theirs = test.first.per_row(), test.second.per_row()
    won = lost = None
    if ours is not None and theirs is not None:
        changes_N = (np.asarray(theirs) - np.asarray(ours)) * (1 if better else -1)
        won, lost = int((changes_N > 0).sum()), int((changes_N < 0).sum())
    clusters = None if cluster_N is None else int(cluster_N.max()) + 1
    seen = _detectable(found, won, lost, alpha)
    return Difference(test.task, test.metric, found, better, p, p, won, lost, test.slice, seen, clusters)


def _detectable(found: Paired, won: int | None, lost: int | None, alpha: float) -> float | None:
    """From the rows on which the two disagree where McNemar's test is made, else from the difference's spread."""
    if found.mcnemar_p is not None and won is not None and lost is not None:
        seen = detectable_difference(found.n, (won + lost) / found.n, alpha=alpha, rising=True)
        return seen if math.isfinite(seen) else None
    # Without any spread the rows say nothing about how much there would be.
    return detectable_change(found.standard_error, alpha=alpha) if found.standard_error else None


def _adjusted(found: Sequence[Difference]) -> Iterator[Difference]:
    """All in order, with p-values adjusted among those of whole tasks, and among those of slices."""
    families = [[it.p_value for it in found if (it.slice is not None) == sliced] for sliced in (False, True)]
    waiting = [iter(holm(p_values)) for p_values in families]
    for it in found:
        yield replace(it, p_adjusted=next(waiting[it.slice is not None]))


def _with_undefined(plan: _Plan, found: Sequence[Difference]) -> dict[str, dict[str, int]]:
    """The slices that no metric is left of, beside those that were too small from the beginning."""
    there = {(it.task, it.slice) for it in found}
    small = {task: dict(slices) for task, slices in plan.small.items()}
    for test in plan.tests:
        if test.slice is not None and (test.task, test.slice) not in there:
            small.setdefault(test.task, {})[test.slice] = len(test.first.rows)
    return small


def _name(evaluations: Mapping[str, Evaluation]) -> str:
    return next(iter(evaluations.values())).name
