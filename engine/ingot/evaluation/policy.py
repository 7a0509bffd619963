"""What can be known to be wrong with a promotion policy before anything is trained, and what its rows cannot show."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from ingot.errors import RecipeError
from ingot.evaluation.metrics import METRICS, canonical
from ingot.evaluation.pairing import LABEL, LENGTH
from ingot.evaluation.score_intervals import share_interval
from ingot.evaluation.statistic import Array, mean_of
from ingot.evaluation.statistics import EXPECTED_DISCORDANCE, detectable_difference
from ingot.recipe_evaluate import Promotion, Rule
from ingot.registry import nearest

FIELD = "evaluate.promotion.rules"
MIN_GROUPS = 20
"""Resampling fewer groups of rows gives intervals that are too narrow (Cameron, Gelbach & Miller 2008)."""


@dataclass(frozen=True)
class Measured:
    """A task that will be measured: the kind and number of its rows, its metrics, the fields that cut its rows into
    slices (None: not known before), and the number of its groups (None: rows are independent).
    """

    task: str
    kind: str
    rows: int
    metrics: Collection[str]
    slices: Collection[str] | None = None
    groups: int | None = None


def slices_known(kind: str, stored: Iterable[str]) -> list[str]:
    """Fields that cut rows of `kind`: those `stored` with them, their class where they have one, their length."""
    return list(dict.fromkeys([*stored, *([LABEL] if kind == "text-classification" else []), LENGTH]))


def groups_in(cluster_N: Array | None) -> int | None:
    """How many groups rows of these group numbers, from 0 on, are in."""
    return None if cluster_N is None else int(cluster_N.max()) + 1


def metric_of(name: str, kind: str, field: str) -> str:
    """Our name of a metric, that of one part of an answer (`exact_match@first`) too."""
    metric, at, part = name.partition("@")
    return f"{canonical(metric, kind, field)}{at}{part}"


def check_policy(policy: Promotion, measured: Sequence[Measured]) -> list[str]:
    """What the rows of `measured` can hardly show, a sentence each.

    Raises RecipeError for a rule about a task, metric or slice that is not measured, and for one that no model
    can meet.
    """
    notes: list[str] = []
    tasks = {it.task: it for it in measured}
    for number, rule in enumerate(policy.rules):
        field = f"{FIELD}[{number}]"
        if rule.task not in tasks:
            raise RecipeError(f"{field}.task", rule.task, f"it is not measured: {nearest(rule.task, tasks)}")
        task = tasks[rule.task]
        metric = metric_of(rule.metric, task.kind, f"{field}.metric")
        if metric not in task.metrics:
            where = "its file's metrics" if task.task != "test" else "evaluate.metrics"
            fix = f"it is not measured on {task.task} ({', '.join(task.metrics)} are); name it in {where}"
            raise RecipeError(f"{field}.metric", rule.metric, fix)
        for name in rule.slices:
            if task.slices is not None and name not in task.slices:
                raise RecipeError(
                    f"{field}.slices", name, f"no row of {task.task} has it: {nearest(name, task.slices)}"
                )
        _require_reachable(rule, task, metric, policy.alpha, field)
        notes += _notes(rule, task, metric, policy.alpha)
    return notes


def _require_reachable(rule: Rule, task: Measured, metric: str, alpha: float, field: str) -> None:
    """Raise RecipeError where a model without a mistake would not meet the rule."""
    if task.rows < rule.min_rows:
        fix = f"{task.task} has {task.rows:,} rows, so the rule can never hold; measure more rows, or lower it"
        raise RecipeError(f"{field}.min_rows", rule.min_rows, fix)
    if task.groups is not None and task.groups < MIN_GROUPS:
        fix = f"its rows are in {task.groups} groups, and fewer than {MIN_GROUPS} decide nothing; measure more groups"
        raise RecipeError(f"{field}.task", rule.task, fix)
    if not (METRICS[metric].unit_interval and METRICS[metric].higher_is_better):
        return
    if rule.margin >= 1:
        fix = f"{metric} is a share between 0 and 1, and no difference of shares is above 1; 2 points are 0.02"
        raise RecipeError(f"{field}.margin", rule.margin, fix)
    if rule.value is None:
        return
    if not 0 <= rule.value <= 1:
        raise RecipeError(f"{field}.value", rule.value, f"{metric} is a share between 0 and 1; 80 % are 0.8")
    most = share_interval(task.rows, task.rows, _z(alpha))[0]
    if METRICS[metric].value_of is mean_of and rule.value > most:
        fix = f"{task.rows:,} rows show no more than {most:.4f}, all of them right; measure more rows, or lower it"
        raise RecipeError(f"{field}.value", rule.value, fix)


def _notes(rule: Rule, task: Measured, metric: str, alpha: float) -> Iterator[str]:
    """Whether a likely result would be missed. Foreseen are shares alone, of independent rows."""
    if rule.require == "at_least" or not METRICS[metric].unit_interval:
        return
    seen = 100 * detectable_difference(task.rows, EXPECTED_DISCORDANCE, alpha=2 * alpha, rising=True)
    named = f"promotion: {metric} of {task.task} on {task.rows:,} rows"
    if not math.isfinite(seen):
        yield f"{named}: so few rows show no difference that is likely"
    elif rule.require == "better":
        beyond = f" beyond the margin of {100 * rule.margin:g}" if rule.margin else ""
        yield f"{named}: a gain of less than {seen:.1f} points{beyond} will often go unseen"
    elif 100 * rule.margin < seen:
        margin = f"a margin of {100 * rule.margin:g} points; so many rows show {seen:.1f}"
        yield f"{named}: even a model that loses nothing will often fail {margin}"


def _z(alpha: float) -> float:
    return NormalDist().inv_cdf(1 - alpha)
