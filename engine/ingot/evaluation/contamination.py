"""Rows of a task that training saw, the scores without them, and both as one file beside the evaluation."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from ingot.data.seen import Seen
from ingot.errors import IngotError
from ingot.evaluation.compare import Comparison, compare
from ingot.evaluation.metrics import METRICS
from ingot.evaluation.result import Evaluation, Score, without_nan, write_text
from ingot.evaluation.samples import Sample
from ingot.evaluation.shared_rows import Hit, Index, Read
from ingot.evaluation.statistics import cluster_numbers, interval
from ingot.evaluation.task import Task
from ingot.recipe import Evaluate
from ingot.recipe_evaluate import Contamination as Section

FILE = "contamination.json"
FORMAT = 1
TITLES = {"exact": "exact", "ngram": "n-gram", "minhash": "MinHash"}
ANY = "any"


@dataclass(frozen=True)
class Training:
    """What of training was read: its sources as people know them, rows, words, further rows that cannot be read;
    `stopped` before the end.
    """

    sources: list[str]
    rows: int
    words: int
    unreadable: int
    stopped: bool


@dataclass(frozen=True)
class Contamination:
    """Of one task: what was found, and what is left without it.

    `hits`: of each row, way and text the best (rows by number, in the task's order). `without`: model -> metric ->
    score on the other rows. `comparisons`: of each model against the first one, on the other rows.
    """

    task: str
    rows: int
    hits: list[Hit]
    training: Training
    without: dict[str, dict[str, Score]] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def shared(self) -> set[int]:
        """Numbers of the rows that training saw."""
        return {hit.row for hit in self.hits}

    def counts(self, ways: Sequence[str]) -> dict[str, int]:
        """Title of a way -> rows that it found; of several, `any` of them too."""
        found = {TITLES[way]: len({hit.row for hit in self.hits if hit.way == way}) for way in ways}
        return found if len(ways) == 1 else {**found, ANY: len(self.shared)}


def find_shared(
    tasks: Sequence[Task], training: Iterable[Seen], sources: Sequence[str], section: Section
) -> Iterator[Read | list[Contamination]]:
    """Hold the rows of all `tasks` against what training saw, which is read once and not held.

    Yields what more of training was read, again and again, and last what was found, task by task.
    """
    sizes: list[int] = []

    def texts() -> Iterator[tuple[str, list[str]]]:
        for task in tasks:
            sizes.append(0)
            for text in task.texts():
                sizes[-1] += 1
                yield text

    index = Index(texts(), section.ways, section.ngram, section.threshold)
    yield from index.scan(training, section.max_words)
    read = Training(list(sources), index.seen_rows, index.seen_words, index.unreadable, index.stopped)
    ends = np.cumsum([0, *sizes]).tolist()
    hits = index.hits()
    yield [
        Contamination(
            task.name,
            end - start,
            [hit._replace(row=hit.row - start) for hit in hits if start <= hit.row < end],
            read,
        )
        for task, start, end in zip(tasks, ends, ends[1:], strict=False)
    ]


def with_scores(found: Contamination, evaluations: Mapping[str, Evaluation], section: Evaluate) -> Contamination:
    """`found` with the scores of all models (name -> evaluation, the first is what the others are compared with) on the
    rows that training did not see: none where it saw none, or all.

    Raises IngotError when an evaluation has other rows than those that were looked for.
    """
    for name, it in evaluations.items():
        if len(it.samples) != found.rows:
            raise IngotError(
                f"{name} has {len(it.samples)} rows of {found.task}, and {found.rows} were looked for in what training "
                "saw: the data changed; evaluate again with --fresh"
            )
    if not found.hits or len(found.shared) == found.rows:
        return found
    left = {name: without(it, found.shared, section) for name, it in evaluations.items()}
    names = list(left)
    comparisons = [
        replace(
            compare(
                {found.task: _comparable(left[names[0]])},
                {found.task: _comparable(left[name])},
                samples=section.bootstrap_samples,
                confidence=section.confidence,
            ),
            names=(names[0], name),
        )
        for name in names[1:]
    ]
    return replace(found, without={name: it.scores for name, it in left.items()}, comparisons=comparisons)


def without(evaluation: Evaluation, rows: set[int], section: Evaluate) -> Evaluation:
    """`evaluation` on its other rows, scored from what is stored: whole groups of rows are resampled, where there are
    any. A metric that is undefined on them is NaN, and so is its interval where all are of one group.
    """
    places = np.array([place for place in range(len(evaluation.samples)) if place not in rows], dtype=np.int64)
    left = _Some(evaluation.samples, places.tolist())
    cluster_N = cluster_numbers([sample.group for sample in left])
    independent = cluster_N is None or bool(cluster_N.any())
    statistics = {name: replace(it, rows=it.rows[places]) for name, it in evaluation.statistics.items()}
    scores = {}
    for name, it in statistics.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            value = it.value()
            low, high = (
                interval(it, section.bootstrap_samples, section.confidence, cluster_N=cluster_N)
                if math.isfinite(value) and independent
                else (math.nan, math.nan)
            )
        before = evaluation.scores[name]
        scores[name] = Score(value, low, high, len(places), before.higher_is_better, before.details)
    return replace(evaluation, scores=scores, statistics=statistics, samples=left)


def _comparable(evaluation: Evaluation) -> Evaluation:
    """Without the metrics that are undefined on these rows."""
    defined = {name: it for name, it in evaluation.statistics.items() if math.isfinite(evaluation.scores[name].value)}
    return replace(evaluation, statistics=defined)


class _Some(Sequence[Sample]):
    """Samples at some places of others, which are read as they are asked for."""

    def __init__(self, samples: Sequence[Sample], places: Sequence[int]) -> None:
        self._samples, self._places = samples, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int, /) -> Sample: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[Sample]: ...
    def __getitem__(self, index: int | slice, /) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._samples[place] for place in self._places[index]]
        return self._samples[self._places[index]]


def sentence(found: Contamination, evaluations: Mapping[str, Evaluation], ways: Sequence[str]) -> str:
    """What was found, for people: how many rows, by which ways, and the last model's first score without them."""
    title = f"{found.task}: "
    read = f"{found.training.rows:,} training rows"
    if found.training.stopped:
        read = f"the first {read} ({found.training.words:,} words; evaluate.contamination.max_words says how many)"
    if found.training.unreadable:
        read += f", and {found.training.unreadable:,} that cannot be read"
    n, names = len(found.shared), [TITLES[way] for way in ways]
    if not n:
        return f"{title}none of {found.rows:,} rows is shared with the training data ({', '.join(names)}; {read})"
    by = ", ".join(f"{count:,} {name}" for name, count in found.counts(ways).items() if name != ANY)
    start = (
        f"{title}{n:,} of {found.rows:,} rows {'is' if n == 1 else 'are'} shared with the training data ({by}; {read})"
    )
    if n == found.rows:
        return f"{start}; none is left to be scored without them"
    model = list(found.without)[-1]
    metric, score = next(iter(found.without[model].items()))
    decimals = METRICS[metric].decimals if metric in METRICS else 3
    before, after = (f"{value:z.{decimals}f}" for value in (evaluations[model].scores[metric].value, score.value))
    whose = metric if len(found.without) == 1 else f"{metric} of {model}"
    return f"{start}; without {'it' if n == 1 else 'them'} {whose} is {after} instead of {before}"


def record(found: Contamination, evaluations: Mapping[str, Evaluation], section: Section) -> dict[str, Any]:
    """Plain values for JSON: counts, every shared row with the training row that it stands in, scores without them."""
    samples = next(iter(evaluations.values())).samples
    ids = {row: samples[row].id for row in sorted(found.shared)}
    return {
        "documents": next(iter(evaluations.values())).asked.get("documents"),
        "settings": {"ways": list(section.ways), "ngram": section.ngram, "threshold": section.threshold},
        "training": asdict(found.training),
        "rows": found.rows,
        "shared": found.counts(section.ways),
        "texts": {text: len({hit.row for hit in found.hits if hit.text == text}) for text in ("prompt", "whole")},
        "sentence": sentence(found, evaluations, section.ways),
        "without": {
            model: {metric: asdict(score) for metric, score in scores.items()}
            for model, scores in found.without.items()
        },
        "comparisons": [it.as_dict() for it in found.comparisons],
        "found": {
            way: [
                {"id": ids[hit.row], "train": hit.where, "text": hit.text, "similarity": round(hit.similarity, 4)}
                for hit in found.hits
                if hit.way == way
            ]
            for way in section.ways
        },
    }


def save(folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
    """Write `contamination.json` (task -> record) to `folder` in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan({"format": FORMAT, "tasks": records}), indent=1, ensure_ascii=False)
    write_text(folder / FILE, text.encode("utf-8", "replace").decode() + "\n")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Task -> record of `contamination.json` in `folder`; empty where there is none, or one of another format."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return dict(content["tasks"]) if content["format"] == FORMAT else {}
    except (FileNotFoundError, ValueError, KeyError):
        return {}


def summary(folder: Path, tasks: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Task -> its record in `folder`, of `tasks`, but for the list of the shared rows."""
    there = load(folder)
    return {task: {name: it for name, it in there[task].items() if name != "found"} for task in tasks if task in there}


def scores_in(record: Mapping[str, Any]) -> dict[str, dict[str, Score]]:
    """Model -> metric -> score without the shared rows, of a record."""
    numbers = ("value", "low", "high")
    return {
        model: {
            metric: Score(**it | {name: math.nan if it[name] is None else it[name] for name in numbers})
            for metric, it in scores.items()
        }
        for model, scores in record["without"].items()
    }
