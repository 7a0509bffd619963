"""Task files as tasks for one model, and what can be known to be wrong with them before any model answers."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ingot.data.rendering import require_template
from ingot.data.splits import scan
from ingot.errors import RecipeError
from ingot.evaluation.definition import PROMPTED, Definition, as_recipe, load_definition
from ingot.evaluation.measure import RecipeTask, test_rows
from ingot.evaluation.metrics import metric_names
from ingot.evaluation.policy import Measured, groups_in, slices_known
from ingot.evaluation.portions import Rows
from ingot.evaluation.prompted import DefinedTask
from ingot.evaluation.runner import foreseen_of, require_independent
from ingot.evaluation.task import Task
from ingot.model.load import Tokenizer
from ingot.recipe import Recipe
from ingot.recipe_data import CAUSAL
from ingot.remotes import Remote
from ingot.subjects import Target, known_labels

FIELD = "evaluate.tasks"
Placed = tuple[Definition, Path]
"""A task and the folder where its paths start."""


def open_task(file: Path, overrides: Sequence[str] = ()) -> Placed:
    """Read a task file. Raises RecipeError with file, line, field, value and fix."""
    return load_definition(file, overrides), file.resolve().parent


def require_names(tasks: Iterable[Placed], field: str) -> None:
    """Raise RecipeError about `field` where two tasks have one name: their results would have one file."""
    names = [definition.task for definition, _ in tasks]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise RecipeError(field, min(repeated), "two files are called so; rename one")


def tasks_of_run(recipe: Recipe, home: Path) -> list[Placed]:
    """The recipe's task files. Raises RecipeError for one that its models cannot be asked."""
    found = [open_task(home / file) for file in recipe.evaluate.tasks]
    require_names(found, FIELD)
    wanted = recipe.objective.task
    for (definition, _), file in zip(found, recipe.evaluate.tasks, strict=True):
        able = (*PROMPTED, wanted) if wanted in CAUSAL else (wanted,)
        if definition.kind not in able:
            fix = f"it is of kind {definition.kind}, and a model for {wanted} does {', '.join(dict.fromkeys(able))}"
            raise RecipeError(FIELD, file, f"{fix}; remove it")
    return found


def check_tasks(
    recipe: Recipe, home: Path, tokenizer: Tokenizer, labels: tuple[str, ...]
) -> list[tuple[Measured, str]]:
    """What each of the recipe's task files measures, all of whose rows were read, and what so many cannot see.

    Raises RecipeError or DataError for a file, row, metric or label with which no evaluation can end. `labels`: the
    classes that training sees.
    """
    found = []
    for definition, home_of_task in tasks_of_run(recipe, home):
        if definition.is_chat:
            require_template(tokenizer)
        if definition.prompted:
            task = DefinedTask(definition, home_of_task, max_rows=recipe.evaluate.max_rows)
            rows = _rows_of(task)
            found.append(_foreseen(task, rows, task.metrics(rows)))
        else:
            found.append(_check_supervised(definition, home_of_task, recipe, labels))
    return found


def _foreseen(task: Task, rows: Rows, metrics: list[str]) -> tuple[Measured, str]:
    slices = slices_known(task.kind, {name for item in rows for name in item.slices})
    measured = Measured(task.name, task.kind, len(rows), metrics, slices, groups_in(rows.cluster_N))
    return measured, foreseen_of(metrics, len(rows), rows.cluster_N)


def _rows_of(task: Task) -> Rows:
    rows = Rows(task)
    if not len(rows):
        raise RecipeError(FIELD, task.name, "it has no row; name others in its data")
    require_independent(task, rows)
    return rows


def _check_supervised(definition: Definition, home: Path, run: Recipe, labels: tuple[str, ...]) -> tuple[Measured, str]:
    recipe = _with_rows(as_recipe(definition, run.model), run.evaluate.max_rows)
    found = scan(recipe, home)
    if strange := [label for label in found.labels if label not in labels]:
        fix = f"no training row of the recipe has this label; they have: {', '.join(labels[:20])}"
        raise RecipeError(f"{FIELD}: {definition.task}", strange[0], fix)
    metrics = metric_names(recipe.evaluate, recipe.objective.rows, [], "metrics")
    task = RecipeTask(recipe, test_rows(recipe, home, found), labels, None, None, definition.task)
    return _foreseen(task, _rows_of(task), metrics)


def _with_rows(recipe: Recipe, max_rows: int | None) -> Recipe:
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"max_rows": max_rows})})


def task_for(
    definition: Definition, home: Path, target: Target | Remote, max_rows: int | None
) -> tuple[Task, tuple[str, ...]]:
    """A task file as a task for `target`, and the classes that it names."""
    if definition.prompted:
        return DefinedTask(definition, home, max_rows=max_rows), ()
    if isinstance(target, Remote):
        fix = "needs a model in this process; name a folder, or add prompt and target where answers are written"
        raise RecipeError(f"{definition.task}: kind", definition.kind, fix)
    recipe = _with_rows(as_recipe(definition, target.model), max_rows)
    found = scan(recipe, home)
    labels = known_labels(target, recipe.objective.task, found.labels)
    named = {"name": definition.task, "version": str(definition.version)}
    rows = test_rows(recipe, home, found)
    return RecipeTask(recipe, rows, labels, target.tokenizer(), target.context(), **named), labels
