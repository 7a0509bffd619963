"""What a run has come to, as plain values: for `--json`, for summary.json, for tables."""

from typing import Any

from ingot.evaluation import report
from ingot.evaluation.runner import Comparison, Score, load_comparison, load_scores
from ingot.runfolder import Run


def scores_as_dict(
    base: dict[str, Score] | None, tuned: dict[str, Score] | None, comparison: Comparison | None
) -> dict[str, Any]:
    """Scores as plain values: `metrics`, the paired `comparison`, and a `table` (with its `columns`) for people."""
    rows = report.table(base, tuned, comparison)
    return {
        "metrics": {name: report.metrics_json(found) for name, found in (("base", base), ("tuned", tuned)) if found},
        "comparison": comparison.as_dict() if comparison else {},
        "table": rows,
        "columns": list(rows[0]),
    }


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
        base = load_scores(run.evaluation, "base") if run.recipe.evaluate.base else None
        result |= scores_as_dict(base, load_scores(run.evaluation, "tuned"), load_comparison(run.evaluation))
    if run.finished("serve"):
        result |= {key: record["stages"]["serve"][key] for key in ("question", "answer")}
    return result
