"""The verbs: finetune, evaluate, package, serve, inspect, run. The one file that wires the parts together."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ingot import evaluating, registering
from ingot.assembly import build, check_build, export, rebuilt
from ingot.check import gate
from ingot.check.stage import keep_proofs, proved
from ingot.check.verdict import Report
from ingot.data import inspect as view
from ingot.data.splits import load_splits
from ingot.data.stream import first_rows
from ingot.data.template import encode_all
from ingot.deploying import assemble
from ingot.errors import Interrupted, NotPromoted, RecipeError
from ingot.evaluation.compare import Comparison
from ingot.evaluation.measure import TEST
from ingot.evaluation.result import Evaluation
from ingot.launch import process
from ingot.model.load import (
    load_tokenizer,
    resolve_dtype,
)
from ingot.packages import missing_forms, refused_form, write_package
from ingot.parallel import heartbeat, rules
from ingot.parallel.blame import collectives
from ingot.parallel.strategies import check_model, parallelize
from ingot.preparation import QUIET, preflight, prepare
from ingot.progress import Progress
from ingot.promoting import NO_POLICY, Clearance, require_promotion
from ingot.provenance import keep_origin, origin_of
from ingot.ranks import Ranks, device_name, idle_gpus, on_main, pick_device, process_group, read_ranks
from ingot.recipe import Recipe
from ingot.recipe_data import CLASSES
from ingot.recipe_io import flat_params, load_recipe, recipe_hash
from ingot.runfolder import Run, create_run, find_checkpoint, find_run, open_run, write_json
from ingot.serving.channel import Parent
from ingot.serving.server import Options as ServeOptions
from ingot.serving.server import check_address
from ingot.serving.server import serve as serve_forever
from ingot.stages import (
    ask_endpoint,
    draw,
    resolve,
    set_threads,
    track_scores,
    train,
)
from ingot.summary import summary_of
from ingot.track import Tracker
from ingot.train import profile
from ingot.train.checkpoint import published, step_name
from ingot.train.consolidate import consolidate as write_consolidated
from ingot.train.distillation import load_teacher


def check(recipe: Recipe | str | Path, *, home: Path | None = None, progress: Progress = QUIET) -> Report:
    """Prove the recipe on its own model and rows, on this machine alone; nothing is written but the data's cache.

    Raises what `finetune` raises before it trains.
    """
    recipe, home = _opened(recipe, home)
    gate.check_waivers(recipe)
    device = pick_device(Ranks())
    recipe = resolve(recipe, home, Ranks(), device, progress.note)
    check_build(recipe, home, Ranks(), device)
    set_threads(recipe, Ranks())
    prepared = prepare(recipe, home, progress)
    preflight(recipe, home, prepared, progress)
    return gate.prove(recipe, home, prepared, device, progress)


def finetune(
    recipe: Recipe | str | Path, *, home: Path | None = None, resume: Path | None = None, progress: Progress = QUIET
) -> Run:
    """Train the recipe's model on its data; leave checkpoints, adapter and merged model in a new run's folder.

    Args:
        recipe: a Recipe, or the path of a recipe file.
        home: where the recipe's relative paths start. None: the recipe file's folder, or the working folder for a
        Recipe.
        resume: folder of an interrupted run to continue; its recipe must be the same.
        progress: where progress is shown.

    Raises:
        IngotError: and its children, for everything that the user can mend. Interrupted after Ctrl-C.
    """
    return _finetune(*_opened(recipe, home), resume, progress)


def _finetune(recipe: Recipe, home: Path, resume: Path | None, progress: Progress, *, whole: bool = False) -> Run:
    """`finetune`. As part of the `whole` path the recipe is proved first, and a restarted job that has trained already
    is not trained again.
    """
    gate.check_waivers(recipe)
    ranks = read_ranks()
    progress = progress if ranks.main else QUIET
    device = pick_device(ranks)
    recipe = resolve(recipe, home, ranks, device, progress.note)
    decided = [f"model.dtype={recipe.model.dtype}", f"data.batches={recipe.data.batches}"]
    decided += [f"model.attention={recipe.model.attention}", f"parallel.strategy={recipe.parallel.strategy}"]
    progress.note(f"{recipe.name}: {device.type}, {ranks.world} ranks, {' '.join(decided)}")
    if idle := idle_gpus(ranks):
        progress.note(idle)
    rules.check(recipe, ranks)
    check_model(recipe, home)
    check_build(recipe, home, ranks, device)
    profile.check(recipe.diagnose, device)
    set_threads(recipe, ranks)
    prepared = prepare(recipe, home, progress)
    watched = preflight(recipe, home, prepared, progress)
    proofs = None
    fresh = ranks.main and resume is None and find_run(recipe, ranks.job) is None
    if whole and fresh and recipe.check.enabled:
        proofs = proved(recipe, home, prepared, device, progress)
    # Before there is a process group: reading a large base may take longer than a collective.
    origin = origin_of(recipe, home, progress.note) if fresh else None
    with process_group(ranks, recipe.parallel, device):
        run, begun = on_main(lambda: _claim(recipe, home, resume, ranks, whole, progress))
        if run.finished("finetune"):
            return run
        if origin is not None:
            keep_origin(run, origin)
        before = run.record().get("tracking_run") if ranks.main else None
        tracker = Tracker.start(recipe.track, run.folder, recipe.name, flat_params(recipe), ranks.main, run_id=before)
        if ranks.main:
            run.note(tracking_run=tracker.run_id, device=device_name(device), ranks=ranks.world)
        if proofs is not None:
            keep_proofs(proofs, run, tracker)
        with tracker, _status(run, ranks):
            started = time.perf_counter()
            with _watched(run, ranks, device) as pulse:
                model, initial, fill, kernels = build(recipe, home, prepared.facts.labels, ranks, progress)
                if ranks.main:
                    run.note(kernels=kernels.facts())
                sharded = parallelize(model, ranks, recipe, device, resolve_dtype(recipe.model.dtype, device), fill)
                sharded.teacher = load_teacher(recipe, home, device, resolve_dtype(recipe.model.dtype, device))
                fitted = train(sharded, prepared, recipe, run, begun, tracker, progress, pulse, watched)
            if ranks.main:
                if not sharded.whole or recipe.quantization.kind != "none":
                    del model, sharded, fill  # before another copy is made
                    checkpoint = run.checkpoints / step_name(fitted.final_step)
                    model, initial = rebuilt(recipe, home, prepared.facts.labels, checkpoint, device)
                facts = export(model, initial, prepared, recipe, run, fitted)
                run.note_stage("finetune", time.perf_counter() - started, **facts)
                tracker.artifact(run.folder / "resolved.yaml")
    return run


def evaluate(
    run: Run | Path, *, fresh: bool = False, progress: Progress = QUIET
) -> tuple[Evaluation | None, Evaluation, Comparison | None]:
    """Measure a run's base model (if the recipe asks for it) and tuned model on the same test rows, and test the
    difference. What an interrupted evaluation answered is kept; `fresh` asks anew. Ranks of one job share the rows.

    Returns (base, tuned) on the recipe's own test rows and the comparison of all tasks, those of `evaluate.tasks`
    too; all is saved in the run's `evaluation` folder.
    """
    run = run if isinstance(run, Run) else open_run(run)
    started = time.perf_counter()
    models, comparison = evaluating.measure_run(run, progress, fresh=fresh)
    base, tuned = models.get("base", {}).get(TEST), models["tuned"][TEST]
    if read_ranks().main:
        draw(run, base, tuned)
        run.note_stage("evaluate", time.perf_counter() - started, rows=len(tuned.samples))
        track_scores(run, models)
    return base, tuned, comparison


def evaluate_base(recipe: Recipe | str | Path, *, home: Path | None = None, progress: Progress = QUIET) -> Evaluation:
    """Measure the recipe's base model alone on its test rows; nothing is written."""
    recipe, home = _opened(recipe, home)
    device = pick_device(Ranks())
    recipe = resolve(recipe, home, Ranks(), device)
    return evaluating.measure_base(recipe, home, device, progress)


def package(
    run: Run | Path,
    *,
    override: str | None = None,
    forms: Sequence[str] | None = None,
    progress: Progress = QUIET,
) -> Path:
    """Write the run's tuned model as an MLflow model, in the `forms` given or those of its recipe, and prove that a
    clean process loads each and gets the same answers; return the first one's folder.

    `override`: "NAME: REASON" of who packages it though its promotion policy is not met, which is recorded.

    Raises NotPromoted when a policy is not met, PackageError when the package does not load or answers otherwise.
    """
    run = run if isinstance(run, Run) else open_run(run)
    evaluating.require_model(run)
    cleared = require_promotion(run, override)
    if cleared.status != NO_POLICY:
        progress.note(cleared.sentence)
    if override is not None:
        evaluating.show_override(cleared)
    return write_package(run, cleared.stamp(), cleared.card(), progress, forms)


def consolidate(target: Path, out: Path) -> Path:
    """Write the trained weights of a run's best or last checkpoint (as its `train.final` says), or of the checkpoint
    that is named, as one folder that transformers or peft loads. Works while the run is training, and after it died.
    """
    checkpoint, run = find_checkpoint(target)
    if run is None:
        return write_consolidated(checkpoint, out, None, target)
    classes = run.recipe.objective.task in CLASSES
    labels = load_splits(run.recipe, run.home, ("test",)).labels if classes else ()
    return write_consolidated(checkpoint, out, run.recipe, run.home, labels)


def serve(
    models: str | Path | Sequence[str | Path] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    override: str | None = None,
    options: ServeOptions | None = None,
    parent: Parent | None = None,
    **what: Any,
) -> None:
    """Serve runs, packages, Hugging Face folders and models of a registry until Ctrl-C. Loopback unless there are keys.

    `what`: adapters, versions and their proof, as `assemble` takes them. `override`: "NAME: REASON" of who serves a
    model though its promotion policy is not met, which is recorded. Raises NotPromoted when a policy is not met.
    """
    named = [models] if isinstance(models, str | Path) else models
    fleet, clearances = assemble(named, override=override, **what)
    for cleared in clearances:
        if cleared.status != NO_POLICY:
            print(cleared.sentence)
        if override is not None:
            evaluating.show_override(cleared)
    serve_forever(fleet, host=host, port=port, options=options, parent=parent)


def run(
    recipe: Recipe | str | Path, *, home: Path | None = None, resume: Path | None = None, progress: Progress = QUIET
) -> dict[str, Any]:
    """The whole path: prove the recipe, fine-tune, evaluate base and tuned, package, verify, ask the endpoint one
    question. Raises CheckFailed where a proof fails that `check.waive` does not name, and NotPromoted, with all of it
    kept and the summary written, where the promotion policy is not met; PackageError where a form cannot be made.

    Returns the summary that is also saved as the run's summary.json: `metrics.base` and `metrics.tuned` (each metric:
    value, interval), `comparison`, `stages` with seconds, `paths`, `question` and `answer`. With `resume`, finished
    stages are kept.
    """
    recipe, home = _opened(recipe, home)
    if recipe.serve.enabled:
        check_address(recipe.serve)
    if resume is not None and open_run(resume).finished("finetune"):
        done = _continued(resolve(recipe, home, read_ranks(), pick_device(read_ranks())), resume)
    else:
        done = _finetune(recipe, home, resume, progress, whole=True)
    if recipe.evaluate.enabled and not done.finished("evaluate"):  # none writes that before all have met
        evaluate(done, progress=progress)
    if not read_ranks().main:
        return {}
    cleared = _cleared(done) if recipe.evaluate.enabled else Clearance(NO_POLICY, "")
    if recipe.package.enabled and (missing := missing_forms(done)):
        write_package(done, cleared.stamp(), cleared.card(), progress, missing)
    if recipe.package.registered_model is not None and not done.finished("register"):
        registering.register_run(done, progress)
    if recipe.serve.enabled and not done.finished("serve"):
        ask_endpoint(done, progress)
    if refused := refused_form(done):
        _ended(done, "not packaged")
        raise refused
    return _ended(done, "finished")


def _cleared(done: Run) -> Clearance:
    try:
        return require_promotion(done)
    except NotPromoted as refused:
        refused.summary = _ended(done, "not promoted")
        raise


def _ended(done: Run, status: str) -> dict[str, Any]:
    done.note(status=status)
    summary = summary_of(done)
    write_json(done.folder / "summary.json", summary)
    return summary


def _opened(recipe: Recipe | str | Path, home: Path | None) -> tuple[Recipe, Path]:
    if isinstance(recipe, Recipe):
        return recipe, home or Path.cwd()
    return load_recipe(recipe), home or Path(recipe).resolve().parent


def _continued(recipe: Recipe, folder: Path) -> Run:
    """The run in `folder`, if it was started with this (resolved) recipe."""
    run = open_run(folder)
    if recipe_hash(run.recipe) != recipe_hash(recipe):
        before, now = flat_params(run.recipe), flat_params(recipe)
        changed = [f"{key} was {before.get(key)}, now {now.get(key)}" for key in now if before.get(key) != now[key]]
        fix = f"it was started with another recipe ({'; '.join(changed[:3])}); start a new run, or restore its settings"
        raise RecipeError("--resume", str(folder), fix)
    return run


def _resumable(recipe: Recipe, folder: Path) -> Run:
    run = _continued(recipe, folder)
    if run.finished("finetune"):
        raise RecipeError(
            "--resume",
            str(folder),
            "its fine-tuning is finished; `ingot run RECIPE --resume` goes on with the next stage",
        )
    if not published(run.checkpoints):
        raise RecipeError("--resume", str(folder), "it has no checkpoint yet; start a new run")
    return run


def _claim(
    recipe: Recipe, home: Path, resume: Path | None, ranks: Ranks, go_on: bool, progress: Progress
) -> tuple[Run, bool]:
    """On rank 0: (the run to train in, whether it has a checkpoint to go on from).

    Without `resume` it is the run that this job began before it was restarted, else a new one.
    """
    run = find_run(recipe, ranks.job) if resume is None else _resumable(recipe, resume)
    if run is not None and resume is None and run.finished("finetune") and not go_on:
        run = None
    if run is None:
        return create_run(recipe, home, ranks.job), False
    run = replace(run, recipe=recipe)
    begun = bool(published(run.checkpoints))
    if resume is None:
        where = "its newest checkpoint" if begun else "its first step: it has no checkpoint yet"
        where = "the stage after fine-tuning" if run.finished("finetune") else where
        progress.note(f"restarted job {ranks.job}: {run.folder} goes on from {where}")
    restarts = run.record().get("restarts", 0) + 1
    run.note(status="started", job=ranks.job, process=process.myself(), restarts=restarts, error=None)
    return run, begun


def _watched(run: Run, ranks: Ranks, device: torch.device) -> heartbeat.Heartbeat:
    """Watches the ranks while they train."""
    section = run.recipe.parallel
    folder = run.folder / "heartbeat"
    if ranks.world > 1:
        folder = on_main(lambda: heartbeat.fresh(folder))
    return heartbeat.Heartbeat(
        folder,
        ranks,
        section.timeout_minutes * 60,
        collectives(section, cuda=device.type == "cuda"),
        advice=lambda: f"Continue with --resume {run.folder}" if published(run.checkpoints) else "",
        on_lost=lambda text: run.note(status="failed", error=text),
    )


@contextlib.contextmanager
def _status(run: Run, ranks: Ranks) -> Iterator[None]:
    """Write into run.json how training ended, also when it did not end well."""
    status = "failed"
    try:
        yield
        status = "trained"
    except Interrupted:
        status = "interrupted"
        raise
    finally:
        if ranks.main:
            # The disk that is full for a checkpoint is full for run.json too: the error under way says more.
            with contextlib.suppress(OSError) if status != "trained" else contextlib.nullcontext():
                run.note(status=status)


def inspect(recipe: Recipe, home: Path, part: str, count: int, console: Any) -> None:
    """Show `count` rows of `part` with the mask in colour on `console`, or print them as JSON when it is None."""
    tokenizer, splits = load_tokenizer(recipe.model, home), load_splits(recipe, home, (part,))
    streamed = recipe.data.streaming and part == "train"
    examples = first_rows(recipe, home) if streamed else getattr(splits, part)
    rows, dropped = encode_all(examples, tokenizer, recipe.data, recipe.objective, splits.labels)
    if console is None:
        shown = view.as_dict(rows[:count], tokenizer)
        print(
            json.dumps({**shown, "data": splits.report.as_dict(), "truncation": dropped.as_dict()}, ensure_ascii=False)
        )
        return
    view.render(rows[:count], tokenizer, console)
    console.print(
        f"{part}: {len(rows):,} of {len(examples):,} rows usable; "
        f"{dropped.truncated:,} cut at {recipe.data.max_tokens} tokens",
        highlight=False,
    )
