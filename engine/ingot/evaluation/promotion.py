"""A promotion policy and two evaluations -> a verdict: whether the tuned model has shown what the recipe asks of it.

Every rule must hold. A model that breaks one of them is promoted only where that one rule's own test errs, which has a
chance of at most alpha, however many rules and slices there are: no correction for their number is due (an
intersection-union test: Berger 1982, Technometrics 24, 295).
"""

# N rows

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from ingot.errors import RecipeError
from ingot.evaluation.metrics import METRICS
from ingot.evaluation.pairing import Pairs, pair, require_same_question
from ingot.evaluation.policy import MIN_GROUPS, groups_in, metric_of
from ingot.evaluation.result import Evaluation
from ingot.evaluation.score_intervals import paired_interval, share_interval
from ingot.evaluation.statistic import Array, Statistic
from ingot.evaluation.statistics import interval, mcnemar_exact, paired
from ingot.evaluation.verdict import BROKEN, HOLDS, TOO_FEW, UNDEFINED, Condition, Verdict
from ingot.recipe_evaluate import Promotion, Rule

Evaluations = Mapping[str, Evaluation]
"""Task -> evaluation of one model."""
Ends = tuple[float, float]


def decide(
    policy: Promotion,
    base: Evaluations | None,
    tuned: Evaluations,
    *,
    samples: int,
    evidence: Mapping[str, str],
    seed: int = 0,
) -> Verdict:
    """Judge `tuned` (against `base`) by every rule of `policy`.

    Args:
        base: of the same tasks; None only where every rule is at_least.
        samples: resamples behind the intervals of metrics that are no shares of independent rows.
        evidence: the evaluations' files and their digests, kept with the verdict.

    Raises NotComparable where the two were not asked the same, RecipeError for a metric that a task has not.
    """
    judge = _Judge(policy.alpha, samples, seed)
    conditions = [it for rule in policy.rules for it in judge.conditions(rule, base, tuned)]
    granted = all(it.state == HOLDS for it in conditions if it.decides)
    model = next(iter(tuned.values())).about.get("model", {}).get("fingerprint", "")
    plain = policy.model_dump(mode="json")
    return Verdict(granted, _sentence(conditions), policy.alpha, conditions, plain, model, dict(evidence))


def _sentence(conditions: Sequence[Condition]) -> str:
    deciding = [it for it in conditions if it.decides]
    failed = [it for it in deciding if it.state != HOLDS]
    left_out = len(conditions) - len(deciding)
    aside = f"; {left_out} {'slice' if left_out == 1 else 'slices'} of too few rows left out" if left_out else ""
    if not failed:
        held = {1: "its condition holds", 2: "both conditions hold"}.get(
            len(deciding), f"all {len(deciding)} conditions hold"
        )
        return f"The policy is met: {held}{aside}."
    one = len(failed) == 1
    held = f"{len(failed)} of {len(deciding)} conditions {'does' if one else 'do'} not hold"
    first = failed[0]
    return (
        f"The policy is not met: {held}{'' if one else ', first'}: {first.wanted}; {first.found}{_why(first)}{aside}."
    )


def _why(condition: Condition) -> str:
    return "" if condition.state == BROKEN else f", {condition.state}"


@dataclass(frozen=True)
class _Judge:
    """Intervals of level 1 - 2 alpha, and what they decide."""

    alpha: float
    samples: int
    seed: int

    def conditions(self, rule: Rule, base: Evaluations | None, tuned: Evaluations) -> Iterator[Condition]:
        """The rule on all rows, then on every part of the slices that it names."""
        second = tuned[rule.task]
        if rule.require == "at_least":
            first = second
        elif base is None:
            raise RecipeError("evaluate.promotion", rule.require, "the base model was not measured; evaluate it too")
        else:
            first = base[rule.task]
            require_same_question(first, second)
        metric = metric_of(rule.metric, second.kind, "evaluate.promotion: metric")
        if metric not in first.statistics or metric not in second.statistics:
            fix = f"it was not measured on {rule.task}; name it in evaluate.metrics, and evaluate again"
            raise RecipeError("evaluate.promotion: metric", rule.metric, fix)
        pairs = pair(first, second, rule.slices)
        known: dict[str, Any] = {
            "task": rule.task,
            "metric": metric,
            "require": rule.require,
            "limit": limit_of(rule, metric),
        }
        sides = first.statistics[metric], second.statistics[metric]

        def on(places_N: Array) -> Condition:
            return self._judged(known, *_cut(*sides, pairs, places_N), rule.min_rows)

        yield on(np.arange(len(pairs.first)))
        for field in rule.slices:
            parts = {value: on(places) for value, places in pairs.slices.get(field, {}).items()}
            for value, it in parts.items():
                yield replace(it, slice=f"{field} = {value}", decides=it.state != TOO_FEW)
            if all(it.state == TOO_FEW for it in parts.values()):
                yield Condition(**known, n=max((it.n for it in parts.values()), default=0), state=TOO_FEW, slice=field)

    def _judged(
        self, known: dict[str, Any], first: Statistic, second: Statistic, cluster_N: Array | None, min_rows: int
    ) -> Condition:
        groups = groups_in(cluster_N)
        found = Condition(**known, n=len(second.rows), state=UNDEFINED, groups=groups)
        if found.n < min_rows or (groups is not None and groups < MIN_GROUPS):
            return replace(found, state=TOO_FEW)
        alone = found.require == "at_least"
        with np.errstate(divide="ignore", invalid="ignore"):  # undefined on these rows, or on a draw of them
            measured = second.value() - (0.0 if alone else first.value())
            if not math.isfinite(measured):
                return found
            low, high = self._alone(second, cluster_N) if alone else self._compared(first, second, cluster_N)
        if not (math.isfinite(low) and math.isfinite(high)):
            return found
        gap = low - found.limit if METRICS[found.metric].higher_is_better else found.limit - high
        holds = gap >= 0 if alone else gap > 0
        if found.require == "better" and found.limit == 0 and cluster_N is None and (counts := _changes(first, second)):
            # The exact test that comparisons print: where few rows differ, it is the stricter one.
            holds = holds and mcnemar_exact(*counts) <= 2 * self.alpha
        return replace(found, state=HOLDS if holds else BROKEN, measured=measured, low=low, high=high)

    def _alone(self, found: Statistic, cluster_N: Array | None) -> Ends:
        """Interval of a score."""
        hits = _hits(found)
        return _ends(
            None if hits is None else share_interval(round(sum(hits)), len(hits), self._z),
            lambda: interval(found, self.samples, 1 - 2 * self.alpha, self.seed, cluster_N),
            independent=cluster_N is None,
        )

    def _compared(self, first: Statistic, second: Statistic, cluster_N: Array | None) -> Ends:
        """Interval of a difference."""

        def resampled() -> Ends:
            found = paired(first, second, self.samples, 1 - 2 * self.alpha, self.seed, cluster_N)
            return found.low, found.high

        counts = _changes(first, second)
        score = None if counts is None else paired_interval(*counts, len(second.rows), self._z)
        return _ends(score, resampled, independent=cluster_N is None)

    @property
    def _z(self) -> float:
        return NormalDist().inv_cdf(1 - self.alpha)


def limit_of(rule: Rule, metric: str) -> float:
    """What the end of the interval has to pass: a score, or a difference that is positive where the score rises."""
    if rule.value is not None:
        return rule.value
    gain = -rule.margin if rule.require == "not_worse" else rule.margin
    return gain if METRICS[metric].higher_is_better else -gain


def _cut(
    first: Statistic, second: Statistic, pairs: Pairs, places_N: Array
) -> tuple[Statistic, Statistic, Array | None]:
    """Both sides on the same rows, and the group of each row numbered from 0."""
    cluster_N = None if pairs.clusters is None else np.unique(pairs.clusters[places_N], return_inverse=True)[1]
    sides = ((first, pairs.first), (second, pairs.second))
    first, second = (replace(side, rows=side.rows[places[places_N]]) for side, places in sides)
    return first, second, cluster_N


def _ends(score: Ends | None, resampled: Callable[[], Ends], *, independent: bool) -> Ends:
    """The score interval of shares, the resampled one of other metrics; of shares of rows that depend on each other,
    which no score interval knows of, the wider of both.
    """
    if score is None or not independent:
        low, high = resampled()
        return (low, high) if score is None else (min(low, score[0]), max(high, score[1]))
    return score


def _hits(found: Statistic) -> list[float] | None:
    """Each row's 0 or 1; None of metrics that are no shares of rows."""
    scores = found.per_row()
    return scores if scores is not None and {*scores} <= {0.0, 1.0} else None


def _changes(first: Statistic, second: Statistic) -> tuple[int, int] | None:
    """Rows that only the second gets, and rows that only the first gets; None of metrics that are no shares of rows."""
    ours, theirs = _hits(first), _hits(second)
    if ours is None or theirs is None:
        return None
    pairs = list(zip(ours, theirs, strict=True))
    return sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
