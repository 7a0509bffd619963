"""What the verb `compare` does inside: which evaluations are held against which, and the page of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from ingot.errors import IngotError, RecipeError
from ingot.evaluation.compare import Comparison, Difference, compare_all, save_comparisons
from ingot.evaluation.page import write_report
from ingot.evaluation.page_input import Change, change
from ingot.evaluation.pairing import Kept
from ingot.evaluation.report import notes_of
from ingot.evaluation.result import load_evaluations
from ingot.judging import check_judges, prefer, write_judged
from ingot.progress import Progress
from ingot.recipe import JUDGED, Evaluate, Judge
from ingot.registry import nearest
from ingot.runfolder import Run, open_run


def changes_of(comparisons: Sequence[Comparison]) -> list[Change]:
    """Comparisons with one first model as a report shows them; better or worse by the adjusted p-value."""
    return [_change(it, found) for found in comparisons for it in found.differences]


def _change(it: Difference, found: Comparison) -> Change:
    shown = change(
        it.task,
        it.metric,
        found.names[1],
        it.paired,
        higher_is_better=it.higher_is_better,
        slice=it.slice,
        detectable=it.detectable,
    )
    return replace(shown, p=it.p_adjusted, sign=it.verdict(found.alpha))


def compare(
    *places: Run | Path | str,
    out: Path | str | None = None,
    slices: Sequence[str] | str = (),
    alpha: float = 0.05,
    confidence: float = 0.95,
    rows: Kept = "same",
) -> list[Comparison]:
    """Test several models against the first: paired by rows, with intervals, adjusted for the number of tests.

    Args:
        places: folders of evaluations, or runs. One run alone is its base against its tuned model; of several, the
            tuned models are compared.
        out: folder for the report with every row, and for `comparison.json` of all pairs.
        slices: fields whose parts are compared too: columns that `evaluate.slices` or a task file named, `label` of
            classes, `length` of prompts; ("all",), or "all", is every field there is.
        alpha: an adjusted p-value below it is a difference. 0 to 1.
        confidence: level of the intervals. 0.5 to 1.
        rows: same: refuse models that were measured on other rows. common: compare the rows that both have.

    Returns one comparison for each model after the first.

    Raises NotComparable where two were asked otherwise, and IngotError for a place that holds no evaluation or an
    argument that cannot be.
    """
    _check(alpha, confidence, rows)
    slices = (slices,) if isinstance(slices, str) else tuple(slices)
    found_in = [place.folder if isinstance(place, Run) else Path(place) for place in places]
    folders = [folder for place in found_in for folder in _evaluations_in(place, alone=len(places) == 1)]
    if len(folders) < 2:
        raise IngotError("one evaluation alone is nothing to compare; name two, or a run that measured its base too")
    models = dict(zip(_titles(folders), map(load_evaluations, folders), strict=True))
    named = [{task: replace(it, name=title) for task, it in tasks.items()} for title, tasks in models.items()]
    samples = Evaluate().bootstrap_samples
    settings: dict[str, Any] = {"slices": slices, "alpha": alpha, "rows": rows}
    found = compare_all(named[0], named[1:], samples=samples, confidence=confidence, **settings)
    if out is not None:
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        save_comparisons(found, out)
        notes = [note for comparison in found for note in notes_of(comparison)]
        write_report(out, changes_of(found), models, " and ".join(models), notes=list(dict.fromkeys(notes)))
    return found


def judge_folders(
    places: Sequence[Path], how: Judge, out: Path | None, progress: Progress
) -> list[dict[str, dict[str, Any]]]:
    """How often judges prefer each other's answers to the first one's, task by task; `prefer` has more. For places that
    `compare` compared. Verdicts are kept with each other evaluation; `out`: where judged.json is written.
    """
    first, *others = [folder for place in places for folder in _evaluations_in(place, alone=len(places) == 1)]
    before, settings = load_evaluations(first), Evaluate()
    written = {task: how for task, evaluation in before.items() if evaluation.kind in JUDGED}
    check_judges(written, how)
    told = [prefer(before, load_evaluations(it), how, it, settings, progress) for it in others]
    if out is not None:
        write_judged(out, told)
    return told


def _check(alpha: float, confidence: float, rows: str) -> None:
    if not 0 < alpha < 1:
        raise RecipeError("--alpha", alpha, "must lie between 0 and 1, e.g. 0.05")
    if not 0.5 < confidence < 1:
        raise RecipeError("--confidence", confidence, "must lie between 0.5 and 1, e.g. 0.95")
    if rows not in get_args(Kept):
        raise RecipeError("--rows", rows, nearest(rows, get_args(Kept)))


def _evaluations_in(place: Path, *, alone: bool) -> list[Path]:
    if not (place / "run.json").is_file():
        return [place]
    run = open_run(place)
    return [run.evaluation / name for name in (("base", "tuned") if alone else ("tuned",))]


def _titles(folders: Sequence[Path]) -> list[str]:
    """As few last parts of each path as tell them apart. Raises IngotError for the same folder twice."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise IngotError(
            f"{next(path for path in paths if paths.count(path) > 1)} is named twice; name two evaluations"
        )
    count = 1
    while len({path.parts[-count:] for path in paths}) < len(paths):
        count += 1
    return ["/".join(path.parts[-count:]) for path in paths]
