"""Metrics of tasks while a model trains: `evaluate.during` -> tasks on validation rows, and what measures them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ingot.data.example import Example
from ingot.data.rendering import require_template
from ingot.data.splits import examples, scan
from ingot.errors import RecipeError
from ingot.evaluation.measure import RecipeTask, choose
from ingot.evaluation.metrics import METRICS, canonical, metric_names
from ingot.evaluation.portions import Rows
from ingot.evaluation.prompted import DefinedTask
from ingot.evaluation.runner import measure_task, require_independent
from ingot.evaluation.shared import Shared
from ingot.evaluation.subject import Local
from ingot.evaluation.task import Task
from ingot.model.load import Tokenizer, context_length
from ingot.parallel.sharded import Sharded
from ingot.ranks import broadcast, gather
from ingot.recipe import Recipe
from ingot.registry import nearest
from ingot.task_files import open_task
from ingot.train.checkpoint import Progress
from ingot.train.loop import Fitted
from ingot.train.watch import VALIDATION_LOSS, Measured, Reading, Watch

OWN = "validation"  # the task of the recipe's own rows; its metrics go by their bare names, others' by TASK/METRIC
FIELD = "evaluate.during"


class Watched(NamedTuple):
    """The tasks that are measured while a model trains, and what decides which step is the best, by our names."""

    tasks: Sequence[Task]
    best_by: str


def watched(
    recipe: Recipe, home: Path, labels: tuple[str, ...], tokenizer: Tokenizer, steps: int, notify: Callable[[str], None]
) -> Watched | None:
    """What is measured while a resolved recipe trains for `steps` steps; None without `evaluate.during`.

    Raises RecipeError and DataError for all that would fail then: no rows, undefined metrics, prompts without room for
    an answer, a `train.best_by` that nothing measures.
    """
    during = recipe.evaluate.during
    if during is None:
        return None
    if during.every_steps > steps:
        notify(
            f"{FIELD}.every_steps = {during.every_steps} is more than the {steps} steps of this run: measured are the "
            "base model and the last step"
        )
    asked, rows = as_asked(recipe), validation_rows(recipe, home)
    task = RecipeTask(asked, lambda: iter([rows]), labels, tokenizer, context_length(recipe.model, home), OWN)
    items = [item for window in task.windows() for item in window]
    field = f"{FIELD}.metrics" if during.metrics else "evaluate.metrics"
    kind, references = recipe.objective.rows, [item.references for item in items]
    measured = metric_names(asked.evaluate, kind, references, field=field, rows="validation")
    task.metrics(items)
    # Without a tokenizer: prompts have been found to leave room.
    found: list[Task] = [RecipeTask(asked, lambda: iter([rows]), labels, None, None, OWN)]
    for file in during.tasks:
        extra = _defined(file, home, during.max_rows, tokenizer, f"{FIELD}.tasks")
        if extra.name in [it.name for it in found]:
            raise RecipeError(f"{FIELD}.tasks", file, f"two tasks are called {extra.name}; rename one")
        asks = Rows(extra)
        if not len(asks):
            raise RecipeError(f"{FIELD}.tasks", file, "it has no row; name others in its data")
        require_independent(extra, asks)
        measured += [f"{extra.name}/{name}" for name in extra.metrics(asks)]
        found.append(extra)
    return Watched(found, _best_by(recipe, measured))


def as_asked(recipe: Recipe) -> Recipe:
    """`recipe` with the settings of `evaluate.during` where the final evaluation has its own."""
    section, during = recipe.evaluate, recipe.evaluate.during
    assert during is not None
    kind, options = recipe.objective.rows, section.metric_options
    if during.metrics:  # those of metrics that only the final evaluation measures would be strays
        wanted = {canonical(name, kind, f"{FIELD}.metrics") for name in during.metrics}
        options = {
            name: it for name, it in options.items() if canonical(name, kind, "evaluate.metric_options") in wanted
        }
    changes = {
        "metrics": during.metrics or section.metrics,
        "metric_options": options,
        "max_rows": during.max_rows,
        "max_new_tokens": during.max_new_tokens or section.max_new_tokens,
    }
    return recipe.model_copy(update={"evaluate": section.model_copy(update=changes)})


def validation_rows(recipe: Recipe, home: Path) -> list[Example]:
    """The validation rows that are measured: `max_rows` of them, drawn with `data.split_seed`."""
    found = scan(recipe, home)
    total = found.report.counts.get("validation", 0)
    if not total:
        fix = f"there is no validation row for {FIELD} to measure on; raise it, or set data.validation"
        raise RecipeError("data.validation_share", recipe.data.validation_share, fix)
    chosen = set(choose(range(total), as_asked(recipe)))
    rows = (example for part, _, example in examples(found, recipe, home) if part == "validation")
    return [example for place, example in enumerate(rows) if place in chosen]


def _defined(file: str, home: Path, max_rows: int, tokenizer: Tokenizer, field: str) -> DefinedTask:
    """A task file as a task of `max_rows` rows. Raises RecipeError for one that does not say how to ask."""
    definition, folder = open_task(home / file)
    if not definition.prompted:
        fix = f"{definition.kind} is measured on the recipe's own rows only; name a file that says how to ask"
        raise RecipeError(field, file, fix)
    if definition.is_chat:
        require_template(tokenizer)
    return DefinedTask(definition, folder, max_rows=max_rows)


def _best_by(recipe: Recipe, measured: Sequence[str]) -> str:
    """`train.best_by` by our names. Raises RecipeError where it is not among the `measured`."""
    name = recipe.train.best_by
    if name == VALIDATION_LOSS or name in measured:
        return name
    if "/" not in name:
        name = canonical(name, recipe.objective.rows, "train.best_by")
    if name not in measured:
        fix = f"is not measured while the model trains ({', '.join(measured)}): {nearest(name, measured)}"
        raise RecipeError("train.best_by", recipe.train.best_by, f"{fix}, or add it to {FIELD}.metrics")
    return name


def watch_of(
    recipe: Recipe, found: Watched | None, tokenizer: Tokenizer, alive: Callable[[], None] = lambda: None
) -> Watch | None:
    """What the loop measures. `alive` hears that a portion of the rows is done."""
    during = recipe.evaluate.during
    if during is None or found is None:
        return None
    measure = Measure(recipe, found.tasks, tokenizer, alive)
    return Watch(during.every_steps, measure, found.best_by, higher_is_better(found.best_by))


def higher_is_better(name: str) -> bool:
    """Of a metric as this file calls it; not of the validation loss."""
    return name != VALIDATION_LOSS and METRICS[_metric(name)].higher_is_better


def _metric(name: str) -> str:
    """The metric in TASK/METRIC@EXTRACT."""
    return name.rpartition("/")[2].partition("@")[0]


class Measure:
    """All tasks, of the model as it stands. Ranks share the rows where each of them holds the whole model."""

    def __init__(self, recipe: Recipe, tasks: Sequence[Task], tokenizer: Tokenizer, alive: Callable[[], None]) -> None:
        self._recipe, self._tasks, self._tokenizer, self._alive = recipe, tasks, tokenizer, alive

    def __call__(self, sharded: Sharded) -> dict[str, Reading]:
        group, groups = sharded.answering
        section = self._recipe.evaluate
        # Ranks wait for each other behind every portion: each gets as many rows of it as one rank alone would.
        section = section.model_copy(update={"save_every_rows": section.save_every_rows * groups})
        found: dict[str, Reading] = {}
        with sharded.at_rest() as model:
            subject = Local(model, self._tokenizer, section.tokens_per_batch, "static")
            for task in self._tasks:
                shared = Shared(task, group, groups, gather)
                done = measure_task(shared, subject, section, task.name, lambda _: self._alive())
                start = "" if task.name == OWN else f"{task.name}/"
                found |= {start + name: Reading(it.value, it.low, it.high) for name, it in done.scores.items()}
        if sharded.device.type == "cuda":
            torch.cuda.empty_cache()  # pieces the size of a cache of keys are no use to a training step
        scores: dict[str, Reading] = broadcast(found)  # of one rank: the best step must be the same on all
        return scores


# --- for people ---


def line(point: Measured, state: Progress) -> str:
    """`step 50: exact_match 0.420 [0.330, 0.510] (base 0.000)`, for each metric."""
    parts, base = [], state.measured[0]
    for name, it in point.scores.items():
        n = METRICS[_metric(name)].decimals
        shown = f"{name} {it.value:.{n}f} [{it.low:.{n}f}, {it.high:.{n}f}]"
        parts.append(shown + (f" (base {base.scores[name].value:.{n}f})" if point.step and not base.step else ""))
    best = point.step and state.best_by in point.scores and state.best_step == point.step
    return f"step {point.step}{'' if point.step else ' (base model)'}: {', '.join(parts)}{'; best so far' * bool(best)}"


def facts(fitted: Fitted) -> dict[str, Any]:
    """For the run's record: `best_by`, `best_step`, `best_value`, why the final step was taken, and the curve."""
    found = {
        "best_by": fitted.best_by,
        "best_step": fitted.best_step,
        "best_value": fitted.best_value,
        "chosen": chosen(fitted),
    }
    curve = [{"step": it.step, "scores": {n: s._asdict() for n, s in it.scores.items()}} for it in fitted.measured]
    return found | ({"measured": curve} if curve else {})


def chosen(fitted: Fitted) -> str:
    """Which step became the model, and why."""
    step = f"step {fitted.final_step}"
    if fitted.best_step is None:
        return f"{step}: the last one; nothing was measured that decides"
    if fitted.final_step != fitted.best_step:
        return f"{step}: the last one, as train.final says"
    if fitted.best_by == VALIDATION_LOSS:
        return f"{step}: the lowest validation loss, {fitted.best_value:.4g}"
    name, better = fitted.best_by, higher_is_better(fitted.best_by)
    seen = [it for it in fitted.measured if it.step and name in it.scores]
    text = f"{step}: the {'highest' if better else 'lowest'} {name}, {fitted.best_value:.4g}, of {len(seen)} measured"
    base = next((it.scores[name].value for it in fitted.measured if not it.step), None)
    if base is None or fitted.best_value is None:
        return text
    won = fitted.best_value > base if better else fitted.best_value < base
    return f"{text} (base {base:.4g})" if won else f"{text}; none is better than the base model, {base:.4g}"
