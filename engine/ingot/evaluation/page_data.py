"""What the report shows, as plain values: lines of the tables, what each model's rows say, settings that differ.

One pass over the rows of each model, however many there are: counts and numbers are kept, texts are not.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ingot.evaluation import page_pictures as pictures
from ingot.evaluation.metrics import METRICS
from ingot.evaluation.page_input import Change
from ingot.evaluation.pairing import BUILT_IN, built_in_slices, slice_name
from ingot.evaluation.result import Evaluation, Score
from ingot.evaluation.samples import Sample

Evaluations = Mapping[str, Mapping[str, Evaluation]]
"""Model -> task -> evaluation; the first model is what the others are compared with."""
MAX_SLICES = 60
NOT_WRITTEN = ("text-classification", "multi-label-classification", "token-classification", "language-modeling")
MAX_VALUE = 200  # characters of a setting's value
SAME_IN_ASKED = ("task", "kind")


@dataclass(frozen=True)
class Line:
    """A metric of a task, or of a slice of it: model -> value or score, model -> its change from the first model."""

    task: str
    metric: str
    n: int
    higher_is_better: bool
    scores: dict[str, Score]
    changes: dict[str, Change] = field(default_factory=dict)
    slice: str | None = None

    @property
    def decimals(self) -> int:
        """How many people read."""
        return METRICS[self.metric].decimals if self.metric in METRICS else 3

    @property
    def share(self) -> bool:
        """Whether it lies between 0 and 1."""
        return self.metric in METRICS and METRICS[self.metric].unit_interval

    @property
    def panel(self) -> str:
        """What shares a scale with it: shares of one direction do, everything else stands for itself."""
        better = "higher is better" if self.higher_is_better else "lower is better"
        return f"{'Shares between 0 and 1' if self.share else self.metric}; {better}"

    def number(self, value: float, sign: str = "-") -> str:
        """`value` as people read it; with `sign` "+", positive ones carry one. Zero never reads "-0.000"."""
        return f"{value:{sign}z.{self.decimals}f}"

    def changed(self, model: str) -> str:
        """The change in figures: `+0.960 [+0.937, +0.980]`."""
        it = self.changes[model]
        return f"{self.number(it.value, '+')} [{self.number(it.low, '+')}, {self.number(it.high, '+')}]"


@dataclass
class Rows:
    """What one model's rows of a task come to."""

    name: str
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    confidences: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    slices: dict[str, list[int]] = field(default_factory=dict)
    cut: int = 0
    empty: int = 0

    def add(self, place: int, sample: Sample, classes: bool) -> None:
        """Count the row at `place`; `classes`: its answer is a class."""
        for name, value in sample.slices.items():
            self.slices.setdefault(slice_name(name, value), []).append(place)
        if classes:
            right = sample.prediction in sample.references
            self.pairs[(sample.prediction if right else sample.references[0], sample.prediction)] += 1
            shares = sample.output.get("probabilities")
            if shares:
                self.confidences.append(float(max(shares)))
                self.right.append(right)
        if sample.n_output_tokens is not None:
            self.tokens.append(sample.n_output_tokens)
        self.characters.append(len(sample.prediction))
        if sample.seconds is not None:
            self.seconds.append(sample.seconds)
        self.cut += sample.output.get("finish") == "length"
        self.empty += not sample.prediction.strip()

    def speed(self, evaluation: Evaluation) -> dict[str, Any]:
        """Rows and tokens a second, and what a row took; None where it was not measured."""
        timed = sum(self.seconds)
        middle = pictures.columns(self.seconds)
        return {
            "model": self.name,
            "rows": len(evaluation.samples),
            "seconds": evaluation.seconds or timed or None,
            "rows_per_second": len(self.seconds) / timed if timed else None,
            "tokens_per_second": sum(self.tokens) / timed if timed and self.tokens else None,
            "median_seconds": middle[0] if middle else None,
            "p95_seconds": middle[1] if middle else None,
            "cut": self.cut,
            "empty": None if evaluation.kind == "language-modeling" else self.empty,
        }


def task_names(evaluations: Evaluations) -> list[str]:
    """All tasks, in the order in which the models have them."""
    return list(dict.fromkeys(task for tasks in evaluations.values() for task in tasks))


def score_lines(evaluations: Evaluations, changes: Sequence[Change]) -> list[Line]:
    """Every metric of every task, with its changes."""
    lines = []
    for task in task_names(evaluations):
        models = {name: tasks[task] for name, tasks in evaluations.items() if task in tasks}
        for metric in dict.fromkeys(metric for it in models.values() for metric in it.scores):
            scores = {name: it.scores[metric] for name, it in models.items() if metric in it.scores}
            first = next(iter(scores.values()))
            found = {it.model: it for it in changes if (it.task, it.metric, it.slice) == (task, metric, None)}
            lines.append(Line(task, metric, first.n, first.higher_is_better, scores, found))
    return lines


def of_rows(evaluations: Evaluations, changes: Sequence[Change]) -> list[dict[str, Any]]:
    """Slices, pictures and speeds of every task, from one pass over each model's rows."""
    found = []
    for task in task_names(evaluations):
        models = {name: tasks[task] for name, tasks in evaluations.items() if task in tasks}
        own = [it for it in changes if it.task == task and it.slice]
        sides = {name: _read(name, it, own) for name, it in models.items()}
        unit = "tokens" if all(side.tokens for side in sides.values()) else "characters"
        lengths = {name: side.tokens if unit == "tokens" else side.characters for name, side in sides.items()}
        written = next(iter(models.values())).kind not in NOT_WRITTEN and any(map(any, lengths.values()))
        found.append(
            {
                "task": task,
                "slices": _slice_lines(models, sides, own),
                "n_slices": len(next(iter(sides.values())).slices),
                "confusion": [
                    {"model": name, **pictures.confusion(side.pairs)} for name, side in sides.items() if side.pairs
                ],
                "calibration": [_calibration(side) for side in sides.values() if side.confidences],
                "lengths": pictures.histogram(lengths) if written else None,
                "unit": unit,
                "speed": [side.speed(models[name]) for name, side in sides.items()],
            }
        )
    return found


def _slice_lines(models: Mapping[str, Evaluation], sides: Mapping[str, Rows], changes: Sequence[Change]) -> list[Line]:
    """A line for each metric of each slice, the largest slices where there are more than MAX_SLICES."""
    names = {name: len(rows) for side in sides.values() for name, rows in side.slices.items()}
    largest = sorted(names, key=lambda name: -names[name])[:MAX_SLICES]
    lines = []
    for name in (it for it in sorted(names) if it in set(largest)):
        for metric in dict.fromkeys(metric for it in models.values() for metric in it.scores):
            scores = {
                model: _score_on(it, metric, sides[model].slices[name])
                for model, it in models.items()
                if metric in it.scores and name in sides[model].slices
            }
            first = next(iter(scores.values()), None)
            if first is not None:
                found = {it.model: it for it in changes if (it.metric, it.slice) == (metric, name)}
                task = next(iter(models.values())).task
                lines.append(Line(task, metric, first.n, first.higher_is_better, scores, found, name))
    return lines


def _score_on(evaluation: Evaluation, metric: str, places: Sequence[int]) -> Score:
    """A metric on some of the rows, without an interval."""
    statistic = evaluation.statistics[metric]
    with np.errstate(divide="ignore", invalid="ignore"):  # undefined on these rows: no number
        value = replace(statistic, rows=statistic.rows[np.asarray(places)]).value()
    return Score(value, math.nan, math.nan, len(places), evaluation.scores[metric].higher_is_better)


def _read(name: str, evaluation: Evaluation, of_slices: Sequence[Change]) -> Rows:
    rows = Rows(name)
    for place, sample in enumerate(evaluation.samples):
        rows.add(place, sample, evaluation.kind == "text-classification")
    for field_of in {str(it.slice).partition(" = ")[0] for it in of_slices} & set(BUILT_IN):
        if not any(it.startswith(f"{field_of} = ") for it in rows.slices):
            rows.slices |= {
                slice_name(field_of, value): at for value, at in built_in_slices(evaluation, field_of).items()
            }
    return rows


def _calibration(side: Rows) -> dict[str, Any]:
    bins = pictures.reliability(side.confidences, side.right)
    return {"model": side.name, "bins": bins, "error": pictures.calibration_error(bins), "n": len(side.confidences)}


def different_settings(evaluations: Evaluations) -> list[dict[str, Any]]:
    """Settings and facts that models do not share: `name`, `values` (one a model), `tasks` (all where empty)."""
    tasks = task_names(evaluations)
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for task in tasks:
        sides = [_flat({**it[task].asked, **it[task].about}) if task in it else {} for it in evaluations.values()]
        for name in dict.fromkeys(name for side in sides for name in side):
            values = tuple(side.get(name, "–") for side in sides)
            if len(set(values)) > 1 and name != "key":
                found.setdefault((name, values), []).append(task)
    return [
        {"name": name, "values": values, "tasks": [] if held == tasks else held}
        for (name, values), held in found.items()
    ]


def measured(evaluations: Evaluations) -> list[dict[str, Any]]:
    """Of every task: what was asked, and the facts that all its models share."""
    found = []
    for task in task_names(evaluations):
        models = [tasks[task] for tasks in evaluations.values() if task in tasks]
        about = [_flat(model.about) for model in models]
        shared = {name: value for name, value in about[0].items() if all(it.get(name) == value for it in about)}
        asked = {name: value for name, value in _flat(models[0].asked).items() if name not in SAME_IN_ASKED}
        found.append(
            {"task": task, "kind": models[0].kind, "rows": len(models[0].samples), "asked": asked, "about": shared}
        )
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `a.b` -> text."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = _text(value)
    return found


def _text(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        text = ", ".join(map(str, value))
    else:
        text = str(value)
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"
