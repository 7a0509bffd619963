"""Rows with stored answers, to prove a served model by: of a run's evaluation, or the example of a package."""

import json
from pathlib import Path
from typing import Any

from ingot.data.splits import load_splits
from ingot.data.template import request_of
from ingot.errors import IngotError, ServeError
from ingot.evaluation.measure import TEST, choose
from ingot.evaluation.result import load_evaluation
from ingot.evaluation.samples import Sample
from ingot.model.folder import RUNTIME_FILE
from ingot.recipe import Recipe
from ingot.runfolder import Run, open_run
from ingot.serving.replay import Stored

WRITES = ("chat-completion", "text-generation", "summarization", "translation")


def stored_rows(target: Path, count: int) -> list[Stored]:
    """Up to `count` rows of the run that `target` is, or lies in: the first of its evaluation that were answered. Of a
    package elsewhere: its example, if it was verified when it was written. Raises ServeError where there is none.
    """
    target = target.resolve()
    for folder in (target, target.parent):
        if (folder / "run.json").is_file():
            return _of_run(open_run(folder), count)
    if (target / "MLmodel").is_file():
        return [_of_package(target, count)]
    fix = f"{target} holds no stored answers: serve the run that was evaluated, or leave --replay out"
    raise ServeError("--replay", count, fix)


def _of_package(package: Path, count: int) -> Stored:
    """The example, and what the run's own model answered to it when the package was verified."""
    try:
        answer = json.loads((package / "verification.json").read_text(encoding="utf-8"))["answer"]
        example = json.loads((package / "model" / RUNTIME_FILE).read_text(encoding="utf-8"))["example"]
    except (OSError, ValueError, KeyError) as error:
        fix = (
            f"{package} holds no answer to its example, as a package has that was verified: serve the run that was "
            "evaluated, or leave --replay out"
        )
        raise ServeError("--replay", count, fix) from error
    return Stored("example", example, answer)


def _of_run(run: Run, count: int) -> list[Stored]:
    try:
        samples = load_evaluation(run.evaluation / "tuned", TEST).samples
    except IngotError as error:
        raise ServeError("--replay", count, f"{run.folder} has no evaluation: ingot evaluate {run.folder}") from error
    asked = {row.where: row for row in choose(load_splits(run.recipe, run.home, (TEST,)).test, run.recipe)}
    found: list[Stored] = []
    for sample in samples:
        if len(found) == count:
            break
        if sample.id not in asked:
            fix = f"row {sample.id} of {run.folder}'s evaluation is not in its data any more: evaluate again"
            raise ServeError("--replay", count, fix)
        expected, params = _expected(sample, run.recipe)
        found.append(Stored(sample.id, request_of(asked[sample.id], run.recipe.objective.task), expected, params))
    return found


def _expected(sample: Sample, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns of the output as they were stored, and the parameters that they were made with."""
    task = recipe.objective.task
    if task in WRITES:
        return {"output_string": sample.output["text"]}, {"max_tokens": recipe.evaluate.max_new_tokens}
    if task == "text-classification":
        return {"label": sample.prediction}, {}
    fix = f"answers of {task} are not stored as an endpoint gives them; of {', '.join(WRITES)} and text-classification"
    raise ServeError("--replay", task, fix + " they are")
