"""One task, one subject -> an `Evaluation`: what is missing is asked, everything is scored, and both are stored.

Asking survives: each finished portion is a file, and an evaluation that was killed goes on from them, with any number
of ranks. Scoring asks nothing: an evaluation that is there already, of the same subject and question, is only scored
again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ingot.errors import DataError, IngotError
from ingot.evaluation import portions
from ingot.evaluation.metrics import METRICS, Statistic, finite
from ingot.evaluation.result import Evaluation, Score, read_record
from ingot.evaluation.samples import Item, Output, Sample, Samples, write_samples
from ingot.evaluation.statistic import Array
from ingot.evaluation.statistics import foreseen, interval
from ingot.evaluation.task import Subject, Task
from ingot.recipe import Evaluate

NO_ROWS = IngotError("there is no test row to measure on: name data.test, or raise data.test_share")
LIFTED = ("n_prompt_tokens", "n_output_tokens", "seconds")  # of an output, into columns of their own


@dataclass(frozen=True)
class Crew:
    """The ranks that share the work. `turns(name)`: numbers that no other rank gets; `meet`: wait for all.

    One rank alone is the default.
    """

    main: bool = True
    turns: Callable[[str], Iterator[int]] | None = None
    meet: Callable[[], None] = lambda: None


ALONE = Crew()


def evaluate_task(
    task: Task,
    subject: Callable[[], Subject],
    folder: Path,
    *,
    name: str,
    model: dict[str, Any],
    section: Evaluate,
    about: dict[str, Any] | None = None,
    crew: Crew = ALONE,
    fresh: bool = False,
    start: Callable[[int, int], Callable[[int], None]] = lambda total, done: lambda n: None,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation | None:
    """Measure on `task` and leave `<task>.json` and `<task>.parquet` in `folder`. None on ranks other than the first.

    Args:
        subject: makes what answers; called only when something is to be asked.
        name: what the model is called.
        model: facts about it; answers are used again only where its `fingerprint` is the same.
        about: further facts for the record.
        fresh: ask again what was answered already.
        start: (rows in all, rows answered before) -> what hears how many more were answered.
        say: hears, before anything is asked, how small a difference so many rows cannot see.

    Raises, before anything is asked, RecipeError when a metric is undefined on these rows, and DataError when all of
    them are of one group.
    """
    rows = rows_of(task)
    metrics = task.metrics(rows)
    asked = {"task": task.name, "kind": task.kind, **task.asked(), "documents": _digest_of(rows), "rows": len(rows)}
    key = _key(asked, model)
    if fresh and crew.main:
        _forget(folder, task.name)
    crew.meet()
    outputs: Sequence[Output] | None = None if fresh else _answered_before(folder, task.name, key)
    place = folder / f".{task.name}" / key
    if outputs is None:
        say(f"{task.name}: {foreseen_of(metrics, len(rows), rows.cluster_N)}")
        started = time.perf_counter()
        _ask(task, subject, rows, place, asked, section.save_every_rows, crew, start)
        asking = time.perf_counter() - started
        outputs = portions.Answers(place, rows.sizes)
    else:
        asking = float(read_record(folder, task.name)["seconds"])
    if not crew.main:
        return None
    scored = _Scored(task, rows, outputs, metrics, section)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.name}.parquet"
    asked = _with_scoring(asked, task)  # only now: answers are used again however they are scored
    write_samples(path, scored, {"name": name, "task": task.name, "asked": asked, "key": key})
    record = {"model": model, **(about or {}), "key": key}
    if scored.engines:  # several, where it went on with another one
        record["engine"] = ", ".join(sorted(scored.engines))
    done = Evaluation(
        name, task.name, task.kind, asked, record, scored.scores, Samples(path), scored.statistics, asking
    )
    done.write_scores(folder)
    portions.forget(folder / f".{task.name}")
    return done


def _ask(
    task: Task,
    subject: Callable[[], Subject],
    rows: portions.Rows,
    place: Path,
    asked: dict[str, Any],
    rows_per_portion: int,
    crew: Crew,
    start: Callable[[int, int], Callable[[int], None]],
) -> None:
    """Have this rank's share of what is missing answered."""
    if crew.main:
        portions.begin(place, asked)
    crew.meet()
    done = portions.finished(place)  # before any rank writes: all see the same
    crew.meet()
    turns = crew.turns(f"{task.name}/{place.name}") if crew.turns else None
    mine = -1 if turns is None else next(turns)
    before = portions.rows_in(done, rows.sizes, rows_per_portion)
    tick = start(len(rows), before)

    def count() -> None:
        """Tell what any rank answered since the last time. The first rank does: it alone knows when portions go."""
        nonlocal before
        if not crew.main:
            return
        now = portions.rows_in(portions.finished(place), rows.sizes, rows_per_portion)
        tick(now - before)
        before = now

    number, asker = 0, None
    for index, window in enumerate(rows.windows()):
        for portion in portions.portions_of(task, window, index, rows_per_portion):
            if portion.file in done:
                continue
            if turns is None or number == mine:
                asker = asker or subject()
                _answer(task, asker, window, portion, place)
                count()
                mine = mine if turns is None else next(turns)
            number += 1
    crew.meet()
    count()


def _answer(task: Task, subject: Subject, window: Sequence[Item], portion: portions.Portion, place: Path) -> None:
    started = time.perf_counter()
    outputs = task.answer(subject, [window[index] for index in portion.places])
    portions.keep(place, portion, outputs, time.perf_counter() - started)


def measure_task(
    task: Task,
    subject: Subject,
    section: Evaluate,
    name: str,
    tick: Callable[[int], None] = lambda n: None,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Measure in memory, storing nothing: for few rows. `tick(n)` hears of every n rows answered, `say` as above."""
    started = time.perf_counter()
    rows = rows_of(task)
    metrics = task.metrics(rows)
    say(f"{task.name}: {foreseen_of(metrics, len(rows), rows.cluster_N)}")
    outputs: list[Output] = []
    for index, window in enumerate(rows.windows()):
        found: dict[int, Output] = {}
        for portion in portions.portions_of(task, window, index, section.save_every_rows):
            answers = task.answer(subject, [window[place] for place in portion.places])
            found |= zip(portion.places, answers, strict=True)
            tick(len(portion.places))
        outputs += [found[place] for place in range(len(window))]
    scored = _Scored(task, rows, outputs, metrics, section)
    asked = _with_scoring({"task": task.name, "kind": task.kind, **task.asked()}, task)
    seconds = time.perf_counter() - started
    return Evaluation(name, task.name, task.kind, asked, {}, scored.scores, list(scored), scored.statistics, seconds)


def rows_of(task: Task) -> portions.Rows:
    """The rows of a task. Raises IngotError when there is none, DataError when all are of one group."""
    rows = portions.Rows(task)
    if not len(rows):
        raise NO_ROWS
    require_independent(task, rows)
    return rows


def require_independent(task: Task, rows: portions.Rows) -> None:
    """Raise DataError when all rows are of one group: nothing is there to resample."""
    if rows.cluster_N is not None and not rows.cluster_N.any():
        fix = f"all {len(rows):,} rows of {task.name} are of this group, so none is independent of another; "
        raise DataError("group", rows[0].group, f"{fix}name another column, or none")


def _with_scoring(asked: dict[str, Any], task: Task) -> dict[str, Any]:
    scoring = task.scoring()
    return asked | {"scores": scoring} if scoring else asked


def foreseen_of(metrics: Sequence[str], n: int, cluster_N: Array | None = None) -> str:
    """What `n` rows, of these clusters, will not see of `metrics`: in points where one of them is a share."""
    clusters = None if cluster_N is None else int(cluster_N.max()) + 1
    return foreseen(n, clusters, share=any(METRICS[metric].unit_interval for metric in metrics))


class _Scored:
    """All rows of a task with what was made of their answers; iterated, its samples."""

    def __init__(
        self, task: Task, rows: portions.Rows, outputs: Sequence[Output], metrics: Sequence[str], section: Evaluate
    ) -> None:
        compute = task.compute(rows, outputs)
        self._rows, self._outputs, self._predictions = rows, outputs, task.predictions(rows, outputs)
        self.engines: set[str] = set()  # what wrote, once the samples have been gone through
        self.statistics = {metric: compute[metric]() for metric in metrics}
        self.scores = {name: score_of(name, it, section, rows.cluster_N) for name, it in self.statistics.items()}

    def __iter__(self) -> Iterator[Sample]:
        together = zip(self._rows, self._outputs, self._predictions, strict=True)
        for index, (item, output, prediction) in enumerate(together):
            numbers = {metric: found.rows[index].tolist() for metric, found in self.statistics.items()}
            if "engine" in output:
                self.engines.add(str(output["engine"]))
            yield _sample(item, output, prediction, numbers)


def _sample(item: Item, output: Output, prediction: str, numbers: dict[str, list[float]]) -> Sample:
    lifted = {name: output.get(name) for name in LIFTED}
    kept = {name: value for name, value in output.items() if name not in LIFTED}
    return Sample(
        id=item.id,
        document=item.digest(),
        prompt=item.prompt,
        references=item.references,
        output=kept,
        prediction=prediction,
        numbers=numbers,
        group=item.group,
        slices=item.slices,
        **lifted,
    )


def score_of(metric: str, statistic: Statistic, section: Evaluate, cluster_N: Array | None = None) -> Score:
    """Value and interval, of whole clusters where there are any. Raises IngotError when either is no finite number."""
    value = finite(statistic.value(), metric)
    low, high = interval(statistic, section.bootstrap_samples, section.confidence, cluster_N=cluster_N)
    return Score(
        value,
        finite(low, metric),
        finite(high, metric),
        len(statistic.rows),
        METRICS[metric].higher_is_better,
        statistic.details,
    )


class _Before(Sequence[Output]):
    """Outputs of an evaluation's file, with what was lifted put back."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Output]:
        return map(self._of, self._samples)

    def __getitem__(self, index: Any, /) -> Any:
        found = self._samples[index]
        return list(map(self._of, found)) if isinstance(index, slice) else self._of(found)

    @staticmethod
    def _of(sample: Sample) -> Output:
        return sample.output | {name: getattr(sample, name) for name in LIFTED if getattr(sample, name) is not None}


def _answered_before(folder: Path, task: str, key: str) -> Sequence[Output] | None:
    """The answers of an evaluation in `folder`, if it asked the same subject the same."""
    if not (folder / f"{task}.parquet").is_file() or not (folder / f"{task}.json").is_file():
        return None
    try:
        samples = Samples(folder / f"{task}.parquet")
        read_record(folder, task)
    except IngotError:  # torn or of an older format: ask again
        return None
    return _Before(samples) if samples.about.get("key") == key else None


def _forget(folder: Path, task: str) -> None:
    portions.forget(folder / f".{task}")
    for suffix in ("json", "parquet"):
        (folder / f"{task}.{suffix}").unlink(missing_ok=True)


def _digest_of(rows: portions.Rows) -> str:
    """Hash of everything that is asked and expected, in order."""
    found = hashlib.sha256()
    for item in rows:
        found.update(item.digest().encode())
    return found.hexdigest()[:16]


def _key(asked: dict[str, Any], model: dict[str, Any]) -> str:
    """Of what decides the answers; how the model was named decides nothing."""
    deciding = {name: value for name, value in model.items() if name not in ("source", "kind")}
    content = json.dumps([asked, deciding], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def merge_items(items: Sequence[Item]) -> list[Item]:
    """Items with the same prompt become one with all their references, in the order of first sight."""
    merged: dict[str, Item] = {}
    for item in items:
        if item.prompt in merged:
            merged[item.prompt].references.extend(item.references)
        else:
            merged[item.prompt] = replace(item, references=list(item.references))
    return list(merged.values())
