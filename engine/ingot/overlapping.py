"""What the verb `evaluate` does about contamination: which training rows are held against which tasks, what is kept.

Only the first rank looks, after the ranks have parted: none waits for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ingot.comparing import changes_of
from ingot.data.seen import File, Seen, check_files, files_of, in_file, learned
from ingot.data.splits import Scan, training_sources
from ingot.evaluation import contamination
from ingot.evaluation.compare import Comparison
from ingot.evaluation.contamination import Contamination
from ingot.evaluation.page_input import Overlap
from ingot.evaluation.result import Evaluation
from ingot.evaluation.task import Task
from ingot.progress import Progress
from ingot.recipe import Evaluate, Recipe
from ingot.runfolder import open_run

Results = Mapping[str, Mapping[str, Evaluation]]  # model -> task -> evaluation


@dataclass(frozen=True)
class Sources:
    """What training saw: the rows of `recipe`, whose relative paths start at `home`, and files. `found` spares reading
    the recipe's data again.
    """

    recipe: Recipe | None = None
    home: Path = Path()
    found: Scan | None = None
    files: tuple[File, ...] = ()

    def names(self) -> list[str]:
        """What people call them."""
        own = [reading.source.uri for reading in training_sources(self.recipe.data)] if self.recipe else []
        return [*own, *(file.uri for file in self.files)]

    def total(self) -> int | None:
        """Rows of training, where they are known."""
        return self.found.report.counts.get("train") if self.found is not None and not self.files else None

    def rows(self) -> Iterator[Seen]:
        """All of them, as they are asked for."""
        own: Iterator[Seen] = iter(()) if self.recipe is None else learned(self.recipe, self.home, self.found)
        return chain(own, chain.from_iterable(map(in_file, self.files)))


def of_recipe(recipe: Recipe, home: Path, found: Scan | None = None) -> Sources:
    """The training rows of a recipe and the files that it names.

    Raises DataError for a file that cannot be read or holds no text: before a model is loaded.
    """
    files = files_of(recipe, home)
    check_files(files)
    return Sources(recipe, home, found, files)


def of_target(source: str, uris: Sequence[str], section: Evaluate) -> tuple[Sources, Evaluate]:
    """The training rows of a run, if `source` is one, with the files that its recipe names; the files `uris`, from here
    on; and `section` with the run's settings. Raises what `of_recipe` raises.
    """
    files = tuple(File(uri, Path.cwd(), "--against") for uri in uris)
    check_files(files)
    if "://" in source or not (Path(source) / "run.json").is_file():
        return Sources(files=files), section
    run = open_run(Path(source))
    settings = run.recipe.evaluate.contamination
    own = of_recipe(run.recipe, run.home) if settings.enabled else Sources()
    # Who names files wants to know, whatever the recipe says.
    settings = settings.model_copy(update={"enabled": settings.enabled or bool(files)})
    return replace(own, files=(*own.files, *files)), section.model_copy(update={"contamination": settings})


def look(
    tasks: Sequence[Task], sources: Sources, results: Results, section: Evaluate, folder: Path, progress: Progress
) -> dict[str, Overlap]:
    """Look for the rows of `tasks` in what training saw, score all models without them, keep both in `folder`.

    Returns task -> what the report shows, also of tasks that `folder` held before and `results` has still.
    """
    settings = section.contamination
    records = _before(folder, results)
    if settings.enabled and sources.names():
        for found in _found(tasks, sources, section, progress):
            own = {model: it[found.task] for model, it in results.items() if found.task in it}
            scored = contamination.with_scores(found, own, section)
            records[found.task] = contamination.record(scored, own, settings)
    if records or (folder / contamination.FILE).is_file():
        contamination.save(folder, records)
    return known(folder, results)


def known(folder: Path, results: Results) -> dict[str, Overlap]:
    """Task -> what a report shows of what `folder` holds about the rows of `results`."""
    return {task: _overlap(task, it) for task, it in _before(folder, results).items()}


def _found(tasks: Sequence[Task], sources: Sources, section: Evaluate, progress: Progress) -> list[Contamination]:
    settings, total = section.contamination, sources.total()
    found: list[Contamination] = []
    # Where nobody knows how many rows there are, the bar goes to the most words that are read.
    unit, size = ("rows", total) if total is not None else ("words at most", settings.max_words)
    with progress.stage("contamination", total=size, unit=unit) as bar:
        for step in contamination.find_shared(tasks, sources.rows(), sources.names(), settings):
            if isinstance(step, list):
                found = step
            else:
                bar.advance(step.rows if total is not None else step.words)
    return found


def _before(folder: Path, results: Results) -> dict[str, dict[str, Any]]:
    """Records of earlier calls that are about the rows of `results`."""
    documents = {task: it.asked.get("documents") for tasks in results.values() for task, it in tasks.items()}
    there = contamination.load(folder).items()
    return {task: it for task, it in there if task in documents and it["documents"] == documents[task]}


def _overlap(task: str, record: Mapping[str, Any]) -> Overlap:
    changes = changes_of([Comparison.from_dict(it) for it in record["comparisons"]])
    return Overlap(task, record["rows"], record["shared"], contamination.scores_in(record), changes)
