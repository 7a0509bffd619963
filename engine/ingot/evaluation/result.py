"""An `Evaluation`: one model measured on one task, in memory and as two files.

A folder holds one model: `<task>.json` (scores, what was asked and of what) and `<task>.parquet` (every row) a task.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ingot.errors import FieldError, IngotError
from ingot.evaluation.metrics import Statistic, statistic_of
from ingot.evaluation.samples import Sample, Samples

FORMAT = 1


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
class Evaluation:
    """All of one model on one task.

    `name`: what the model is called here (`base`, `tuned`, a folder's name). `kind`: of the task's rows, a key of
    OF_TASK. `asked`: what two evaluations must share to be compared, as plain text or numbers by the name that an
    error calls them (`task`, `version`, `kind`, `documents`: a hash over all rows, `prompt`: a hash of how rows become
    prompts, settings such as `max_new_tokens`). `about`: everything else, for people and for the report's list of
    differences (`model`: source, fingerprint, dtype, template; versions, created, engine, tokens, rank count).
    """

    name: str
    task: str
    kind: str
    asked: dict[str, Any]
    about: dict[str, Any]
    scores: dict[str, Score]
    samples: Sequence[Sample] = field(repr=False)
    statistics: dict[str, Statistic] = field(repr=False)
    seconds: float = 0.0

    def write_scores(self, folder: Path) -> None:
        """Write `<task>.json` to `folder` in one step."""
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in ("name", "task", "kind", "asked", "about")},
            "rows": len(self.samples),
            "seconds": round(self.seconds, 3),
            "scores": {name: asdict(score) for name, score in self.scores.items()},
        }
        write_text(folder / f"{self.task}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def load_evaluation(folder: Path, task: str) -> Evaluation:
    """Read back what stands in `folder` for `task`. Raises IngotError when there is none, or half of one."""
    record = read_record(folder, task)
    samples = Samples(folder / f"{task}.parquet")
    scores = load_scores(folder, task)
    statistics = {name: statistic_of(name, samples.numbers(name), score.details) for name, score in scores.items()}
    named = {name: record[name] for name in ("name", "task", "kind", "asked", "about", "seconds")}
    return Evaluation(**named, scores=scores, samples=samples, statistics=statistics)


def load_evaluations(folder: Path) -> dict[str, Evaluation]:
    """Task -> evaluation, of all in `folder`. Raises FieldError when there is none."""
    names = tasks_in(folder)
    if not names:
        fix = "holds no evaluation (no TASK.json with a TASK.parquet); make one: ingot evaluate"
        raise FieldError("EVALUATION", str(folder), fix)
    return {name: load_evaluation(folder, name) for name in names}


def load_scores(folder: Path, task: str) -> dict[str, Score]:
    """Metric -> score of one task, without its rows."""
    return {name: Score(**values) for name, values in read_record(folder, task)["scores"].items()}


def tasks_in(folder: Path) -> list[str]:
    """Names of the tasks that `folder` holds an evaluation of."""
    return sorted(path.stem for path in folder.glob("*.parquet") if path.with_suffix(".json").is_file())


def read_record(folder: Path, task: str) -> dict[str, Any]:
    """What `<task>.json` says. Raises IngotError when it is missing or damaged."""
    path = folder / f"{task}.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IngotError(f"{path} does not exist: {task} was not evaluated there") from None
    except ValueError as error:
        raise IngotError(f"{path} is damaged ({error}); evaluate again") from error
    if record.get("format") != FORMAT:
        raise IngotError(f"{path} is of format {record.get('format')}, and this Ingot reads {FORMAT}; evaluate again")
    return record


def without_nan(value: Any) -> Any:
    """`value` for JSON: a number that is undefined is null."""
    if isinstance(value, Mapping):
        return {name: without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write beside `path` and move it there, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
