"""What a run has come to, as plain values: for `--json`, for summary.json, for tables."""

from typing import Any

from ingot.evaluation import contamination, report
from ingot.evaluation.compare import Comparison, load_comparison
from ingot.evaluation.measure import TEST
from ingot.evaluation.result import Score, load_scores, tasks_in
from ingot.evaluation.verdict import load_verdict
from ingot.runfolder import Run

OfTasks = dict[str, dict[str, Score]]
"""Task -> metric -> score."""


def scores_as_dict(base: OfTasks | None, tuned: OfTasks | None, comparison: Comparison | None) -> dict[str, Any]:
    """Scores as plain values: `metrics` and the paired `comparison` of the recipe's own rows, the same of each other
    task in `tasks`, and for people a `table` (with its `columns`) of all, and `notes` on the comparison.
    """
    tasks = {name: _of_task(name, base, tuned, comparison) for name in tuned or base or {}}
    rows = [
        {**row, "metric": row["metric"] if name == TEST else f"{name}: {row['metric']}"}
        for name in tasks
        for row in report.table(
            base[name] if base else None, tuned[name] if tuned else None, comparison.of(name) if comparison else None
        )
    ]
    own = tasks.pop(TEST)
    notes = report.notes_of(comparison) if comparison else []
    return {**own, "tasks": tasks, "table": rows, "columns": list(rows[0]), "notes": notes}


def _of_task(task: str, base: OfTasks | None, tuned: OfTasks | None, comparison: Comparison | None) -> dict[str, Any]:
    models = (("base", base), ("tuned", tuned))
    return {
        "metrics": {name: report.metrics_json(found[task]) for name, found in models if found},
        "comparison": comparison.by_metric(task) if comparison else {},
    }


def scores_of(run: Run) -> dict[str, Any]:
    """`scores_as_dict` of what a run's evaluation wrote, and of each task the rows that training saw."""

    def of(model: str) -> OfTasks:
        folder = run.evaluation / model
        others = [name for name in tasks_in(folder) if name != TEST]
        return {name: load_scores(folder, name) for name in (TEST, *others)}

    base, tuned = of("base") if run.recipe.evaluate.base else None, of("tuned")
    overlaps = contamination.summary(run.evaluation, tuned)
    found = scores_as_dict(base, tuned, load_comparison(run.evaluation)) | {"contamination": overlaps}
    verdict = load_verdict(run.evaluation) if run.recipe.evaluate.promotion else None
    if verdict is None:
        return found
    more = {"table": verdict.table(), "overrides": run.record().get("overrides", [])}
    return found | {"promotion": verdict.as_dict() | more}


def summary_of(run: Run) -> dict[str, Any]:
    """Scores, stages, versions, paths, and the endpoint's question and answer."""
    record = run.record()
    paths = {
        "run": run.folder,
        "model": run.model,
        "adapter": run.adapter,
        "package": run.package,
        "picture": run.picture,
    }
    result: dict[str, Any] = {
        "name": run.recipe.name,
        "recipe_hash": record["recipe_hash"],
        "versions": record["versions"],
        "stages": record["stages"],
        "paths": {name: str(path) for name, path in paths.items() if path.exists()},
    }
    if run.finished("evaluate"):
        result |= scores_of(run)
    if run.finished("serve"):
        result |= {key: record["stages"]["serve"][key] for key in ("question", "answer")}
    return result
