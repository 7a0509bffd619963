"""Rows with stored answers, to prove a served model by: of a run's evaluation, or the example of a package."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ingot.data.preference import Preference
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
# Kind of rows -> the columns of the endpoint's answer that a sample holds.
STORED: dict[str, Callable[[Sample], dict[str, Any]]] = {
    **dict.fromkeys(WRITES, lambda sample: {"output_string": sample.output["text"]}),
    "text-classification": lambda sample: {"label": sample.prediction},
    "multi-label-classification": lambda sample: {"labels": json.loads(sample.prediction)},
    "token-classification": lambda sample: {"tags": sample.output["tags"]},
    "question-answering": lambda sample: {"answer": sample.prediction},
}
UNANSWERED = {
    "language-modeling": "the evaluation stores likelihoods of documents, and no answers",
    "fill-mask": "the evaluation stores how often hidden tokens were found, and not which ones were said",
    "preference": "the evaluation stores likelihoods of two answers, which a model that writes does not give to rows",
}


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
    objective = run.recipe.objective
    kind = "reward" if objective.task == "reward" else objective.rows
    if kind in UNANSWERED:
        raise ServeError("--replay", count, f"{UNANSWERED[kind]} ({kind}): leave --replay out")
    try:
        samples = load_evaluation(run.evaluation / "tuned", TEST).samples
    except IngotError as error:
        raise ServeError("--replay", count, f"{run.folder} has no evaluation: ingot evaluate {run.folder}") from error
    asked = {row.where: row for row in choose(load_splits(run.recipe, run.home, (TEST,)).test, run.recipe)}
    params = _params(kind, run.recipe, samples)
    found: list[Stored] = []
    for sample in samples[:count]:
        if sample.id not in asked:
            fix = f"row {sample.id} of {run.folder}'s evaluation is not in its data any more: evaluate again"
            raise ServeError("--replay", count, fix)
        row = asked[sample.id]
        if isinstance(row, Preference):
            found += _scored(sample, row)
        else:
            request = request_of(row, run.recipe.objective.task)
            found.append(Stored(sample.id, request, STORED[kind](sample), params))
    return found[:count]


def _params(kind: str, recipe: Recipe, samples: Sequence[Sample]) -> dict[str, Any]:
    """What the stored answers were made with."""
    longest = recipe.evaluate.max_new_tokens
    if kind in WRITES:
        return {"max_tokens": longest}
    if kind == "question-answering":  # none is said only where some test row has no answer
        some_have_none = any(list(sample.references) == [""] for sample in samples)
        return {"max_answer_tokens": longest, "no_answer": "allow" if some_have_none else "forbid"}
    return {}


def _scored(sample: Sample, row: Preference) -> list[Stored]:
    """Both answers of a pair with their scores."""
    sides = {"chosen": row, "rejected": replace(row, chosen=row.rejected)}
    return [
        Stored(f"{sample.id} ({side})", request_of(pair, "reward"), {"score": sample.output[side]})
        for side, pair in sides.items()
    ]
