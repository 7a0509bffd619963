"""Predictions of one model -> an `Evaluation` with scores, intervals and every row; two of them -> a `Comparison`."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ingot.errors import IngotError
from ingot.evaluation.metrics import METRICS, Statistic, finite, loss_of, metric_names, perplexity_of
from ingot.evaluation.statistics import Paired, interval, paired
from ingot.recipe import Evaluate


@dataclass(frozen=True)
class Item:
    """One thing to ask: `prompt` for people, `prompt_ids` for the model, and the answers that would be right."""

    id: str
    prompt: str
    prompt_ids: list[int] | None
    references: list[str]


@dataclass(frozen=True)
class Score:
    """A metric's value with its bootstrap interval over `n` rows."""

    value: float
    low: float
    high: float
    n: int
    higher_is_better: bool
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowResult:
    """What was asked, answered and expected in one row; `numbers` holds each metric's numbers of this row."""

    id: str
    prompt: str
    prediction: str
    references: list[str]
    numbers: dict[str, list[float]]


@dataclass(frozen=True)
class Evaluation:
    """All of one model on one test set."""

    name: str
    scores: dict[str, Score]
    rows: list[RowResult]
    statistics: dict[str, Statistic] = field(repr=False)
    seconds: float = 0.0

    def save(self, folder: Path) -> None:
        """Write `<name>.json` (scores) and `<name>_rows.jsonl` (every row) to `folder`, each in one step."""
        folder.mkdir(parents=True, exist_ok=True)
        scores = {name: asdict(score) for name, score in self.scores.items()}
        record = {"name": self.name, "seconds": round(self.seconds, 3), "scores": scores}
        # Escaped: half of a character, which a model may well write, could not be encoded and would lose everything.
        rows = (json.dumps(asdict(row)) + "\n" for row in self.rows)
        _write(folder / f"{self.name}_rows.jsonl", "".join(rows))
        _write(folder / f"{self.name}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Comparison:
    """Base against tuned, metric by metric, on the same rows."""

    metrics: dict[str, Paired]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: asdict(result) for name, result in self.metrics.items()}

    def save(self, folder: Path) -> None:
        """Write `comparison.json` to `folder` in one step."""
        _write(folder / "comparison.json", json.dumps(self.as_dict(), indent=1) + "\n")


def merge_items(items: Sequence[Item]) -> list[Item]:
    """Items with the same prompt become one with all their references, in the order of first sight."""
    merged: dict[str, Item] = {}
    for item in items:
        if item.prompt in merged:
            merged[item.prompt].references.extend(item.references)
        else:
            merged[item.prompt] = Item(item.id, item.prompt, item.prompt_ids, list(item.references))
    return list(merged.values())


def evaluate_texts(
    name: str, items: Sequence[Item], predictions: Sequence[str], section: Evaluate, task: str, started: float
) -> Evaluation:
    """Score generated texts or chosen classes. `started`: perf_counter when the model began to answer."""
    _require_rows(items)
    references = [item.references for item in items]
    names = metric_names(section, task, references)
    statistics = {metric: METRICS[metric].compute(predictions, references) for metric in names}
    return _finished(name, items, predictions, statistics, section, started)


def evaluate_likelihoods(
    name: str,
    items: Sequence[Item],
    nll_sums: Sequence[float],
    n_tokens: Sequence[int],
    section: Evaluate,
    started: float,
) -> Evaluation:
    """Perplexity and loss from each row's summed negative log-likelihood (nats) and number of predicted tokens."""
    _require_rows(items)
    for item, count in zip(items, n_tokens, strict=True):
        if count < 1:
            raise IngotError(f"{item.id}: the row has no token to predict; remove it")
    rows = np.stack([np.asarray(nll_sums, dtype=np.float64), np.asarray(n_tokens, dtype=np.float64)], axis=1)
    value_of = {"perplexity": perplexity_of, "loss": loss_of}
    names = metric_names(section, "language-modeling", [])
    statistics = {metric: Statistic(rows, value_of[metric]) for metric in names}
    return _finished(name, items, [""] * len(items), statistics, section, started)


def evaluate_statistics(
    name: str,
    items: Sequence[Item],
    predictions: Sequence[str],
    statistics: dict[str, Statistic],
    section: Evaluate,
    started: float,
) -> Evaluation:
    """Scores of metrics that were computed already. `predictions`: what people read as the model's answers."""
    _require_rows(items)
    return _finished(name, items, predictions, statistics, section, started)


def _require_rows(items: Sequence[Item]) -> None:
    if not items:
        raise IngotError("there is no test row to measure on: name data.test, or raise data.test_share")


def _finished(
    name: str,
    items: Sequence[Item],
    predictions: Sequence[str],
    statistics: dict[str, Statistic],
    section: Evaluate,
    started: float,
) -> Evaluation:
    scores = {metric: _score(metric, statistic, section) for metric, statistic in statistics.items()}
    rows = [
        RowResult(item.id, item.prompt, prediction, item.references, _row_numbers(statistics, index))
        for index, (item, prediction) in enumerate(zip(items, predictions, strict=True))
    ]
    return Evaluation(name, scores, rows, statistics, time.perf_counter() - started)


def _score(metric: str, statistic: Statistic, section: Evaluate) -> Score:
    value = finite(statistic.value(), metric)
    low, high = interval(statistic, section.bootstrap_samples, section.confidence)
    n = len(statistic.rows)
    return Score(
        value, finite(low, metric), finite(high, metric), n, METRICS[metric].higher_is_better, statistic.details
    )


def _row_numbers(statistics: dict[str, Statistic], index: int) -> dict[str, list[float]]:
    """(score, 1) of metrics that are means of rows, and (sum, tokens) of likelihoods.

    What corpus metrics count per row says nothing to a reader.
    """
    return {name: s.rows[index].tolist() for name, s in statistics.items() if s.rows.shape[1] == 2}


def compare(base: Evaluation, tuned: Evaluation, section: Evaluate) -> Comparison:
    """Paired tests of tuned against base. Raises IngotError when they were not measured on the same rows."""
    _require_same_rows(base, tuned)
    samples, confidence = section.bootstrap_samples, section.confidence
    return Comparison(
        {
            name: paired(base.statistics[name], tuned.statistics[name], samples, confidence)
            for name in tuned.statistics
            if name in base.statistics
        }
    )


def _require_same_rows(base: Evaluation, tuned: Evaluation) -> None:
    pair = f"{base.name} and {tuned.name}"
    if len(base.rows) != len(tuned.rows):
        raise IngotError(f"{pair} were measured on {len(base.rows)} and {len(tuned.rows)} rows: not comparable")
    for a, b in zip(base.rows, tuned.rows, strict=True):
        for part in ("id", "prompt", "references"):
            if getattr(a, part) != getattr(b, part):
                raise IngotError(f"{pair} differ in {part} of row {a.id}: not comparable")


def load_scores(folder: Path, name: str) -> dict[str, Score]:
    """Read the scores that `Evaluation.save` wrote."""
    stored = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return {metric: Score(**values) for metric, values in stored["scores"].items()}


def load_comparison(folder: Path) -> Comparison | None:
    """Read `comparison.json`; None when only one model was measured."""
    path = folder / "comparison.json"
    if not path.is_file():
        return None
    return Comparison({name: Paired(**values) for name, values in json.loads(path.read_text(encoding="utf-8")).items()})


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
