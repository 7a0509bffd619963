"""Verdicts of one or several judges -> a metric with what must be known about it: how often judges could not be read,
whether the order of two answers decided, and how far judges agree with each other and with people.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np

from ingot.errors import DataError, IngotError
from ingot.evaluation.agreement import cohen_kappa
from ingot.evaluation.judge import SIDES, Case, Grader, Preference
from ingot.evaluation.metrics import METRICS
from ingot.evaluation.result import Evaluation
from ingot.evaluation.runner import score_of
from ingot.evaluation.samples import Sample, Samples, write_samples
from ingot.evaluation.statistic import Statistic
from ingot.recipe import Evaluate, Judge

METRIC_OF = {"score": "judge_score", "pairwise": "judge_win_rate"}
AT_ONCE = 256  # rows whose texts are held
NAMED = 10  # rows whose verdicts cannot be read
POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}
Verdicts = list[int | Preference | None]


def cases_of(samples: Sequence[Sample]) -> Iterator[list[tuple[str, Case]]]:
    """Each row's name and what a judge reads of it: the whole answer, not the part that other metrics take."""
    rows = iter(samples)
    while some := list(islice(rows, AT_ONCE)):
        yield [
            (row.id, Case(row.prompt, str(row.output.get("text", row.prediction)), next(iter(row.references), None)))
            for row in some
        ]


def verdicts_of(
    graders: Sequence[Grader], windows: Iterator[list[tuple[str, Case]]], tick: Callable[[int], None] = lambda n: None
) -> tuple[list[str], list[Verdicts]]:
    """Names of the rows, and every judge's verdicts on them. Raises EndpointError where one does not answer."""
    names: list[str] = []
    found: list[Verdicts] = [[] for _ in graders]
    for window in windows:
        names += [name for name, _ in window]
        cases = [case for _, case in window]
        for grader, verdicts in zip(graders, found, strict=True):
            verdicts += grader.scores(cases) if grader.how.kind == "score" else grader.preferences(cases)
        tick(len(cases))
    return names, found


def statistic_of_verdicts(
    graders: Sequence[Grader], names: Sequence[str], found: Sequence[Verdicts], gold: Sequence[str | None] = ()
) -> Statistic:
    """The metric: a row's mean over the judges whose verdict on it can be read. Raises IngotError where none can be,
    DataError for a gold grade that is none.
    """
    how = graders[0].how
    points = np.array([[_points(it, how) for it in verdicts] for verdicts in found])  # judges x rows, NaN: unreadable
    read = ~np.isnan(points)
    rows = np.stack([np.nan_to_num(points).sum(0) / np.maximum(read.sum(0), 1), read.any(0)], axis=1)
    rows[:, 0] *= rows[:, 1]
    if not read.any():
        raise IngotError(f"none of the {read.size} verdicts of {_names(graders)} can be read")
    unreadable = [name for name, row in zip(names, read.all(0), strict=True) if not row]
    details: dict[str, Any] = {
        "judges": [it.name for it in graders],
        "rubric": f"{graders[0].rubric.name} ({graders[0].rubric.digest})",
        "verdicts": int(read.size),
        "unreadable": int(read.size - read.sum()),
    }
    if unreadable:
        details["unreadable_rows"] = unreadable[:NAMED]
    order: Sequence[Any] = SIDES if how.kind == "pairwise" else range(how.scale[0], how.scale[1] + 1)
    if how.kind == "pairwise":
        details |= _sides(found)
    else:
        details["scale"] = list(how.scale)
    grades = [[_grade(it) for it in verdicts] for verdicts in found]
    if len(graders) > 1:
        means = zip(graders, points, read, strict=True)
        details["each"] = {it.name: float(row[here].mean()) for it, row, here in means if here.any()}
        pairs = combinations(zip(graders, grades, strict=True), 2)
        details["kappa"] = {f"{a.name}, {b.name}": _kappa(x, y, order) for (a, x), (b, y) in pairs}
    if any(it is not None for it in gold):
        people = [_gold(it, how, name) for it, name in zip(gold, names, strict=True)]
        details["gold_rows"] = sum(it is not None for it in people)
        details["gold_kappa"] = {it.name: _kappa(row, people, order) for it, row in zip(graders, grades, strict=True)}
    return Statistic(rows, METRICS[METRIC_OF[how.kind]].value_of, details)


def _names(graders: Sequence[Grader]) -> str:
    return ", ".join(it.name for it in graders)


def _points(verdict: int | Preference | None, how: Judge) -> float:
    if verdict is None:
        return float("nan")
    if isinstance(verdict, Preference):
        return POINTS[verdict.side]
    return (verdict - how.scale[0]) / (how.scale[1] - how.scale[0])


def _grade(verdict: int | Preference | None) -> Any:
    return verdict.side if isinstance(verdict, Preference) else verdict


def _sides(found: Sequence[Verdicts]) -> dict[str, Any]:
    """Over all judges' readable verdicts: how many of each side, and the share that the order did not change."""
    read = [it for verdicts in found for it in verdicts if isinstance(it, Preference)]
    counts = Counter(it.side for it in read)
    named = {"wins": counts["win"], "ties": counts["tie"], "losses": counts["loss"]}
    return named | {"position_consistent": sum(it.consistent for it in read) / len(read)}


def _kappa(first: Sequence[Any], second: Sequence[Any], order: Sequence[Any]) -> float | None:
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    found = cohen_kappa([a for a, _ in both], [b for _, b in both], order)
    return None if found is None else round(found, 4)


def _gold(value: str | None, how: Judge, row: str) -> Any:
    if value is None:
        return None
    if how.kind == "pairwise":
        if value.strip().lower() in SIDES:
            return value.strip().lower()
        raise DataError("judge.gold", value, f"must be one of {', '.join(SIDES)}", where=row)
    low, high = how.scale
    if value.strip().lstrip("-").isdigit() and low <= int(value) <= high:
        return int(value)
    raise DataError("judge.gold", value, f"must be a whole number from {low} to {high}", where=row)


def with_verdicts(
    evaluation: Evaluation, statistic: Statistic, how: Judge, folder: Path, section: Evaluate
) -> Evaluation:
    """`evaluation` with the judge's metric, written to its two files in `folder`, each in one step."""
    metric = METRIC_OF[how.kind]
    path = folder / f"{evaluation.task}.parquet"
    before = Samples(path)

    def samples() -> Iterator[Sample]:
        for sample, row in zip(before, statistic.rows.tolist(), strict=True):
            yield replace(sample, numbers=sample.numbers | {metric: row})

    write_samples(path, samples(), before.about)
    made = replace(
        evaluation,
        scores=evaluation.scores | {metric: score_of(metric, statistic, section)},
        statistics=evaluation.statistics | {metric: statistic},
        samples=Samples(path),
        about=evaluation.about | {"judge": {name: statistic.details[name] for name in ("judges", "rubric")}},
    )
    made.write_scores(folder)
    return made


def without_verdicts(evaluation: Evaluation, how: Judge, reason: str, folder: Path) -> Evaluation:
    """`evaluation` without the judge's metric; its record and report say why."""
    metric = METRIC_OF[how.kind]
    made = replace(
        evaluation,
        scores={name: it for name, it in evaluation.scores.items() if name != metric},
        statistics={name: it for name, it in evaluation.statistics.items() if name != metric},
        about=evaluation.about | {"judge": {"missing": metric, "reason": reason}},
    )
    made.write_scores(folder)
    return made
