"""What the verb `evaluate` does inside: which models are asked which tasks, by how many ranks, and where it is kept."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ingot import overlapping
from ingot.comparing import changes_of
from ingot.data.seen import check_files, files_of
from ingot.data.splits import scan
from ingot.errors import IngotError, RecipeError
from ingot.evaluation.compare import Comparison, compare, load_comparison, save_comparisons
from ingot.evaluation.definition import PROMPTED
from ingot.evaluation.harness import run_harness
from ingot.evaluation.measure import TEST, recipe_task
from ingot.evaluation.page import write_report
from ingot.evaluation.report import notes_of
from ingot.evaluation.result import Evaluation, load_evaluation, load_evaluations, read_record, tasks_in
from ingot.evaluation.runner import ALONE, Crew, evaluate_task, measure_task
from ingot.evaluation.subject import Local
from ingot.evaluation.task import Subject, Task
from ingot.evaluation.vllm_engine import require_vllm
from ingot.judging import check_judges, judge_evaluations, judge_models, judges_of
from ingot.model.load import context_length, load_tokenizer, resolve_dtype
from ingot.progress import Progress
from ingot.promoting import Clearance, judge_run, promotion_of
from ingot.ranks import Ranks, meet, on_main, pick_device, process_group, read_ranks, turns
from ingot.recipe import Evaluate, Judge, Parallel, Recipe
from ingot.recipe_evaluate import Engine
from ingot.remotes import Reach, Remote, forget, needs_of
from ingot.runfolder import Run, versions
from ingot.stages import base_model, set_threads, track_override, tuned_model
from ingot.subjects import Target, open_any, open_target
from ingot.task_files import Placed, require_names, task_for, tasks_of_run

WRITING = (*PROMPTED, "language-modeling", "preference")  # kinds of rows that one model of text is asked


@dataclass
class Asked:
    """One model and how it comes to be loaded: `load(kind of the task)`; one is kept until another kind is asked."""

    name: str
    facts: dict[str, Any]
    load: Callable[[str], Subject]
    _held: dict[str, Subject] = field(default_factory=dict)

    def subject(self, kind: str) -> Subject:
        """What answers tasks of `kind`."""
        kind = "text-generation" if kind in WRITING else kind
        if kind not in self._held:
            self._held.clear()  # before another is loaded: one model at a time is in memory
            self._held[kind] = self.load(kind)
        return self._held[kind]

    def forget(self) -> None:
        """Let go of what is loaded: one model at a time is in memory."""
        self._held.clear()


@contextlib.contextmanager
def crew_of(ranks: Ranks, section: Parallel, device: torch.device) -> Iterator[Crew]:
    """The ranks of this job as one crew, while the block runs."""
    with process_group(ranks, section, device):
        yield Crew(ranks.main, turns, meet) if ranks.world > 1 else ALONE


def measure_all(
    asked: Asked,
    tasks: Sequence[Task],
    folder: Path,
    section: Evaluate,
    crew: Crew,
    progress: Progress,
    *,
    fresh: bool = False,
    told: set[str] | None = None,
) -> dict[str, Evaluation]:
    """`asked` on all `tasks`, kept in `folder`. Ranks other than the first read what it wrote. `told`: what was said
    about the rows for another model, and is not said again.
    """
    told = set() if told is None else told

    def say(text: str) -> None:
        if text not in told:
            progress.note(text)
        told.add(text)

    found = {}
    for task in tasks:
        with contextlib.ExitStack() as stack:

            def start(total: int, before: int, task: Task = task, stack: contextlib.ExitStack = stack) -> Any:
                if before:
                    progress.note(f"{task.name}: {before:,} of {total:,} rows were answered before")
                title = f"evaluate {asked.name}" + ("" if task.name == "test" else f" {task.name}")
                bar = stack.enter_context(progress.stage(title, total=total - before, unit="rows"))
                return bar.advance

            done = evaluate_task(
                task,
                lambda task=task: asked.subject(task.kind),  # type: ignore[misc]
                folder,
                name=asked.name,
                model=asked.facts,
                section=section,
                about={"versions": versions()},
                crew=crew,
                fresh=fresh,
                start=start,
                say=say,
            )
        crew.meet()
        found[task.name] = done if done is not None else load_evaluation(folder, task.name)
    asked.forget()
    return found


def run_models(run: Run, labels: tuple[str, ...], device: torch.device, progress: Progress) -> list[Asked]:
    """The base model (if the recipe measures it) and the tuned model of a run."""
    recipe, section = run.recipe, run.recipe.evaluate
    tokenizer, dtype = load_tokenizer(recipe.model, run.home), resolve_dtype(recipe.model.dtype, device)
    origin = Target("base", "base", recipe.model.source, recipe.model, run.home)
    finished = open_target(str(run.folder))

    def local(model: torch.nn.Module) -> Subject:
        return Local(model, tokenizer, section.tokens_per_batch, section.engine, progress.note)

    def base(kind: str) -> Subject:
        if section.engine == "vllm" and kind in PROMPTED:
            return origin.vllm(dtype)
        return local(base_model(recipe, run.home, labels, device))

    def tuned(kind: str) -> Subject:
        if section.engine == "vllm" and kind in PROMPTED:
            return finished.vllm(dtype)
        return local(tuned_model(run, labels, device))

    models = [Asked("tuned", finished.facts(dtype), tuned)]
    if not recipe.evaluate.base:
        return models
    drawn = {"initialization": recipe.model.initialization, "seed": recipe.train.seed}
    return [Asked("base", origin.facts(dtype) | drawn, base), *models]


Results = dict[str, dict[str, Evaluation]]  # model -> task -> evaluation


def measure_run(run: Run, progress: Progress, *, fresh: bool = False) -> tuple[Results, Comparison | None]:
    """Measure a finished run's models on its tasks, keep it in the run's `evaluation` folder, compare.

    All ranks of the job call it, and it waits for the first one to have written the run's model.
    """
    recipe, ranks = run.recipe, read_ranks()
    device = pick_device(ranks)
    set_threads(recipe, ranks)
    progress = progress if ranks.main else Progress(quiet=True)
    with crew_of(ranks, recipe.parallel, device) as crew:
        on_main(lambda: require_model(run))
        found = scan(recipe, run.home)
        on_main(lambda: check_files(files_of(recipe, run.home)))
        target = open_target(str(run.folder))
        tasks: list[Task] = [
            recipe_task(recipe, run.home, load_tokenizer(recipe.model, run.home), target.context(), found)
        ]
        files = tasks_of_run(recipe, run.home)
        tasks += [task_for(*placed, target, recipe.evaluate.max_rows)[0] for placed in files]
        told: set[str] = set()
        results = {
            asked.name: measure_all(
                asked, tasks, run.evaluation / asked.name, recipe.evaluate, crew, progress, fresh=fresh, told=told
            )
            for asked in run_models(run, found.labels, device, progress)
        }
    if ranks.main and recipe.evaluate.judge is not None:
        hows = {TEST: recipe.evaluate.judge, **judges_of(tasks_of_run(recipe, run.home), recipe.evaluate.judge)}
        results = judge_models(results, hows, tasks, run.evaluation, recipe.evaluate, progress)
    comparison = None
    if "base" in results:
        comparison = compare(
            results["base"],
            results["tuned"],
            samples=recipe.evaluate.bootstrap_samples,
            confidence=recipe.evaluate.confidence,
            slices=[*recipe.evaluate.slices, *(name for definition, _ in files for name in definition.slices)],
        )
    if ranks.main:
        if comparison is not None:
            save_comparisons([comparison], run.evaluation)
        seen = overlapping.of_recipe(recipe, run.home, found)
        overlapping.look(tasks, seen, results, recipe.evaluate, run.evaluation, progress)
        judge_run(run, results.get("base"), results["tuned"])
        report_of_run(run, results, comparison)
    return results, comparison


def report_of_run(run: Run, results: Results | None = None, comparison: Comparison | None = None) -> None:
    """Write the report of a run's evaluations, by default of those that its folder holds."""
    if results is None:
        results = {
            name: load_evaluations(run.evaluation / name)
            for name in ("base", "tuned")
            if tasks_in(run.evaluation / name)
        }
        comparison = load_comparison(run.evaluation)
    found_between = [comparison] if comparison else []
    notes = notes_of(comparison) if comparison else []
    write_report(
        run.evaluation,
        changes_of(found_between),
        results,
        run.recipe.name,
        promotion_of(run),
        overlapping.known(run.evaluation, results),
        notes,
    )


def show_override(cleared: Clearance) -> None:
    """Say in a run's report and in MLflow who let its model pass."""
    if cleared.run is None or cleared.override is None:
        return
    with contextlib.suppress(IngotError):  # an evaluation that is gone or damaged, as an override may say
        report_of_run(cleared.run)
    track_override(cleared.run, cleared.override.sentence)


def require_model(run: Run) -> None:
    """Raise IngotError where nothing was trained to an end."""
    if not run.finished("finetune"):
        raise IngotError(
            f"{run.folder} holds no finished model; continue it with: ingot finetune RECIPE --resume {run.folder}"
        )


def measure_base(recipe: Recipe, home: Path, device: torch.device, progress: Progress) -> Evaluation:
    """The base model of a resolved recipe on its test rows, in memory."""
    found, tokenizer = scan(recipe, home), load_tokenizer(recipe.model, home)
    model = base_model(recipe, home, found.labels, device)
    task = recipe_task(recipe, home, tokenizer, context_length(recipe.model, home), found)
    total = min(found.report.counts["test"], recipe.evaluate.max_rows or sys.maxsize)
    with progress.stage("evaluate base", total=total, unit="rows") as bar:
        subject = Local(model, tokenizer, recipe.evaluate.tokens_per_batch, recipe.evaluate.engine, progress.note)
        return measure_task(task, subject, recipe.evaluate, "base", bar.advance, progress.note)


def measure_target(
    source: str,
    definitions: Sequence[Placed],
    folder: Path | None,
    progress: Progress,
    *,
    base: str | None = None,
    max_rows: int | None = None,
    fresh: bool = False,
    against: Sequence[str] = (),
    reach: Reach | None = None,
    judge: Judge | None = None,
    engine: Engine | None = None,
) -> tuple[Path, dict[str, Evaluation]]:
    """Measure the model that `source` names on task files (each with the folder where its paths start), and keep it in
    `folder`: None is `evaluations/MODEL-FINGERPRINT`. `against`: files that its training saw; a run's own rows are
    looked at anyway. `reach`: for an endpoint; `judge`: who grades written answers, afterwards; `engine`: as
    evaluate.engine. All ranks of the job call it.
    """
    target = open_any(source, base=base, reach=reach)
    if engine is not None and isinstance(target, Remote):
        raise RecipeError("--engine", engine, "an endpoint has its own; remove it")
    if engine == "vllm":
        require_vllm()
    section = Evaluate(max_rows=max_rows, judge=judge, engine=engine or "auto")
    with target if isinstance(target, Remote) else contextlib.nullcontext():
        return _measure_target(target, definitions, folder, progress, section, fresh, against)


def _measure_target(
    target: Target | Remote,
    definitions: Sequence[Placed],
    folder: Path | None,
    progress: Progress,
    section: Evaluate,
    fresh: bool,
    against: Sequence[str],
) -> tuple[Path, dict[str, Evaluation]]:
    ranks = read_ranks()
    seen, section = overlapping.of_target(target.source, against, section)
    progress = progress if ranks.main else Progress(quiet=True)
    device = pick_device(ranks)
    require_names(definitions, "--task")
    hows = judges_of(definitions, section.judge, () if section.judge is None else tuple(section.judge.model_fields_set))
    check_judges(hows, section.judge)
    tasks, labels = [], {}
    for definition, home in definitions:
        for note in definition.notes:
            progress.note(f"{definition.task}: {note}")
        task, known = task_for(definition, home, target, section.max_rows)
        tasks.append(task)
        labels[task.kind] = known

    if isinstance(target, Remote):
        facts = target.connect(needs_of(tasks))
    else:
        facts = target.facts(resolve_dtype(target.model.dtype, device))
    folder = folder or Path("evaluations") / f"{target.name}-{facts['fingerprint'][:8]}"
    _require_own(folder, facts, fresh)
    if fresh and ranks.main:
        forget(folder)

    def load(kind: str) -> Subject:
        if isinstance(target, Remote):
            return target.load(folder, ranks.rank, progress.note)
        if section.engine == "vllm" and kind in PROMPTED:
            return target.vllm(resolve_dtype(target.model.dtype, device))
        wanted: Any = kind
        return target.load(
            wanted, labels.get(kind, ()), device, section.tokens_per_batch, section.engine, progress.note
        )

    asked = Asked(target.name, facts, load)
    with crew_of(ranks, Parallel(backend="nccl" if device.type == "cuda" else "gloo"), device) as crew:
        found = measure_all(asked, tasks, folder, section, crew, progress, fresh=fresh)
    if ranks.main:
        forget(folder)
        found = judge_evaluations(found, hows, tasks, folder, section, progress)
        there = load_evaluations(folder).items()  # tasks of earlier calls too
        same = {name: it for name, it in there if it.about["model"]["fingerprint"] == facts["fingerprint"]}
        overlaps = overlapping.look(tasks, seen, {target.name: same}, section, folder, progress)
        write_report(folder, [], {target.name: same}, target.name, contamination=overlaps)
    return folder, found


def _require_own(folder: Path, facts: dict[str, Any], fresh: bool) -> None:
    """Raise RecipeError where `folder` holds another model's evaluations, which would be lost."""
    for name in [] if fresh else tasks_in(folder):
        model = read_record(folder, name)["about"].get("model", {})
        if model.get("fingerprint") != facts["fingerprint"]:
            whose = f"of another model ({model.get('source')})"
            if model.get("source") == facts["source"]:  # an endpoint, or a folder that was written anew
                whose = f"from before {facts['source']} changed its model"
            fix = f"it holds {name} {whose}; name another folder, or add --fresh"
            raise RecipeError("--out", str(folder), fix)


def measure_harness(
    source: str,
    names: Sequence[str],
    *,
    base: str | None = None,
    max_rows: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    include: Path | None = None,
    engine: Engine = "auto",
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness, by its own library, on the model that `source` names; `run_harness` has more."""
    if engine == "vllm":
        raise RecipeError("--engine", engine, "the harness has a vLLM backend of its own; name another engine")
    if read_ranks().world > 1:
        raise IngotError("the harness's tasks are run by one process; start it without torchrun")
    device, target = pick_device(Ranks()), open_target(source, base=base)
    local = target.load("text-generation", (), device, Evaluate().tokens_per_batch, engine, note)
    return run_harness(local, names, limit=max_rows, num_fewshot=num_fewshot, chat=chat, include=include)
