"""What a verb does inside: train a model, measure it, ask it."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ingot import watching
from ingot.data.splits import load_splits
from ingot.data.template import request_of
from ingot.errors import DataError
from ingot.evaluation import plots
from ingot.evaluation.measure import TEST, choose
from ingot.evaluation.page import log_report
from ingot.evaluation.result import Evaluation
from ingot.model.kinds import POOLED
from ingot.model.load import load_model, read_tokenizer, resolve_dtype, resolve_pooling
from ingot.model.runtime import Runtime
from ingot.parallel.heartbeat import Heartbeat
from ingot.parallel.sharded import Sharded
from ingot.preparation import Prepared
from ingot.progress import Progress
from ingot.ranks import Ranks
from ingot.recipe import Recipe
from ingot.recipe_data import CLASSES
from ingot.recipe_io import recipe_hash
from ingot.runfolder import Run, open_run
from ingot.serving.server import Endpoint, Options
from ingot.track import Tracker, read_metrics
from ingot.train import profile
from ingot.train.checkpoint import Checkpoints, published
from ingot.train.checkpoint import Progress as State
from ingot.train.distillation import settled
from ingot.train.loop import Fitted, StepInfo, fit
from ingot.train.meter import Meter
from ingot.train.reference import with_reference
from ingot.train.watch import VALIDATION_LOSS, Measured
from ingot.watching import Watched


def resolve(
    recipe: Recipe,
    home: Path,
    ranks: Ranks,
    device: torch.device,
    notify: Callable[[str], None] = lambda text: None,
) -> Recipe:
    """The recipe with every "auto" decided for this machine; what `resolved.yaml` holds. `notify` hears what could not
    be decided as usual, and why.
    """
    dtype = resolve_dtype(recipe.model.dtype, device)
    batches, attention, notes = settled(recipe, home, device, dtype)
    for note in notes:
        notify(note)
    model: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "attention": attention}
    if recipe.objective.task in POOLED:
        model["pooling"] = resolve_pooling(recipe.model, home)
    parallel: dict[str, Any] = {}
    if recipe.parallel.strategy == "auto":
        parallel["strategy"] = "ddp" if ranks.world > 1 else "none"
    if recipe.parallel.backend == "auto":
        parallel["backend"] = "nccl" if device.type == "cuda" else "gloo"
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "data": recipe.data.model_copy(update={"batches": batches}),
            "parallel": recipe.parallel.model_copy(update=parallel),
        }
    )


def set_threads(recipe: Recipe, ranks: Ranks) -> None:
    """CPU threads of this rank: `train.threads`, or its share of the cores."""
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    elif ranks.local_world > 1:  # each rank would otherwise take every core, and they would fight over them
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world))


def train(
    sharded: Sharded,
    prepared: Prepared,
    recipe: Recipe,
    run: Run,
    resume: bool,
    tracker: Tracker,
    progress: Progress,
    heartbeat: Heartbeat,
    watched: Watched | None = None,
) -> Fitted:
    """Run the loop, with a bar on `progress` and every step's numbers in `tracker`; `heartbeat` hears of each phase.
    `watched`: tasks to measure on the way.
    """
    checkpoints = Checkpoints(
        run.checkpoints,
        sharded.layout.ranks,
        recipe_hash(recipe),
        recipe.train.keep_checkpoints,
        strategy=recipe.parallel.strategy,
    )
    begun = [checkpoint.name for checkpoint in published(run.checkpoints)] if resume else []
    done = int(begun[-1].removeprefix("step-")) if begun else 0
    first, forwarded = True, False
    meter = Meter()
    profiled = profile.recorded(
        recipe.diagnose, run.folder / "profile", sharded.layout.ranks.rank, sharded.device, progress.note
    )
    rows = with_reference(
        sharded,
        prepared.rows,
        recipe,
        run.folder,
        progress,
        begun=bool(begun),
        alive=lambda: heartbeat.at(0, "reference"),
    )
    with progress.stage("finetune", total=prepared.rows.train.steps, unit="steps") as bar, profiled as looks:

        def here(phase: str) -> None:
            nonlocal forwarded
            forwarded |= phase == "forward"
            before = phase == "checkpoint" or (phase == "evaluation" and not forwarded)  # the base model's is step 0
            heartbeat.at(done if before else done + 1, phase)

        def count(info: StepInfo) -> None:
            nonlocal done, first
            done = info.step
            if first:  # lines of steps that are done again
                tracker.rewind(done - 1)
            first = False

        def show(info: StepInfo) -> None:
            bar.advance(
                info.step - bar.done, loss=f"{info.loss:.3f}", tokens_per_s=f"{info.rates['tokens_per_second']:,.0f}"
            )

        def track(info: StepInfo) -> None:
            values = {"train_loss": info.loss, "lr": info.lr, "grad_norm": info.grad_norm, **info.rates}
            if info.validation_loss is not None:
                values["validation_loss"] = info.validation_loss
            tracker.metrics(values, info.step)

        def measured(point: Measured, state: State) -> None:
            progress.note(watching.line(point, state))
            tracker.metrics({f"validation/{name}": it.value for name, it in point.scores.items()}, point.step)

        meter.on_phase = here
        fitted = fit(
            sharded,
            rows,
            recipe,
            checkpoints,
            resume=resume,
            on_step=(count, show, track, *looks),
            watch=watching.watch_of(recipe, watched, prepared.tokenizer, lambda: here("evaluation")),
            on_measured=measured,
            notify=progress.note,
            meter=meter,
            folder=run.folder,
        )
    progress.note(f"speed: {meter.split()}")
    if watched is not None:
        progress.note(f"model: {watching.chosen(fitted)}")
    return fitted


def base_model(recipe: Recipe, home: Path, labels: tuple[str, ...], device: torch.device) -> nn.Module:
    """The model that training started from, with the same new weights (a classifier's head) if it needs any."""
    dtype = resolve_dtype(recipe.model.dtype, device)
    return load_model(recipe.model, home, recipe.objective.task, labels, dtype=dtype, seed=recipe.train.seed).to(device)


def tuned_model(run: Run, labels: tuple[str, ...], device: torch.device) -> nn.Module:
    """The run's merged model, read from its folder as any user of it would."""
    runtime = Runtime.load(run.model, str(device))
    if runtime.labels != labels and run.recipe.objective.task in CLASSES:
        raise DataError(
            "data",
            list(labels)[:3],
            f"the training rows' labels are not those of {run.model}; the data changed since training",
        )
    return runtime.model


def draw(run: Run, base: Evaluation | None, tuned: Evaluation) -> None:
    """Draw the run's picture from its metrics and these scores."""
    points = read_metrics(run.metrics)
    train = [(p["step"], p["metrics"]["train_loss"]) for p in points if "train_loss" in p["metrics"]]
    watched = [(p["step"], p["metrics"]["validation_loss"]) for p in points if "validation_loss" in p["metrics"]]
    course = _course(run.record()["stages"].get("finetune", {}))
    plots.run_picture(train, watched, base.scores if base else None, tuned.scores, run.picture, run.recipe.name, course)


def _course(record: dict[str, Any]) -> plots.Course | None:
    """What training left in a run's record of the tasks that it measured: what decided, else the first metric."""
    points = record.get("measured") or []
    if not points:
        return None
    name = record["best_by"] if record["best_by"] != VALIDATION_LOSS else next(iter(points[0]["scores"]))
    seen = [(it["step"], it["scores"][name]) for it in points if name in it["scores"]]
    return plots.Course(name, [(step, it["value"], it["low"], it["high"]) for step, it in seen], record["final_step"])


def track_scores(run: Run, models: Mapping[str, Mapping[str, Evaluation]]) -> None:
    """Add scores, picture and evaluation files to the MLflow run that training started."""
    with Tracker.start(
        run.recipe.track, run.folder, run.recipe.name, {}, True, run_id=run.record().get("tracking_run")
    ) as tracker:
        values = {
            f"{model}/{'' if task == TEST else f'{task}/'}{metric}".replace("@", ":"): score.value
            for model, tasks in models.items()
            for task, found in tasks.items()
            for metric, score in found.scores.items()
        }  # MLflow takes no @ in a name
        tracker.metrics(values, run.record()["stages"]["finetune"]["final_step"])
        tracker.artifact(run.picture)
        beside = [run.evaluation / name for name in ("comparison.json", "contamination.json", "verdict.json")]
        for path in sorted([*filter(Path.is_file, beside), *run.evaluation.glob("*/*.json")]):
            tracker.artifact(path, f"evaluation/{path.parent.relative_to(run.evaluation)}".removesuffix("/."))
        log_report(tracker, run.evaluation)
        if verdict := run.record().get("promotion", {}).get("verdict"):
            promotion = run.record()["promotion"]
            tracker.tag(
                {"promotion": "granted" if promotion["granted"] else "not granted", "promotion.verdict": verdict}
            )


def track_override(run: Run, sentence: str) -> None:
    """Say in the MLflow run that training started who let its model pass, and log the report that says so too."""
    with Tracker.start(
        run.recipe.track, run.folder, run.recipe.name, {}, True, run_id=run.record().get("tracking_run")
    ) as tracker:
        tracker.tag({"promotion": "overridden", "promotion.override": sentence})
        if (run.evaluation / "report.html").is_file():
            log_report(tracker, run.evaluation)


def requests_of(run: Run) -> list[dict[str, Any]]:
    """Three test rows as requests to the run's packages."""
    examples = choose(load_splits(run.recipe, run.home, ("test",)).test, run.recipe)[:3]
    tokenizer = read_tokenizer(run.model)
    rows = [request_of(example, run.recipe.objective.task, tokenizer) for example in examples]
    return [row for row in rows if row.keys() == rows[0].keys()]  # a table has one set of columns


def ask_endpoint(run: Run, progress: Progress) -> None:
    """Start an endpoint on the run's package (or model), ask it one question over HTTP, stop it, note both."""
    started, section = time.perf_counter(), run.recipe.serve
    facts = json.loads((run.model / "ingot.json").read_text(encoding="utf-8"))
    with progress.stage("serve", total=1, unit="questions") as bar:
        question, options = section.question or facts["example"], Options.of(section)
        with Endpoint(
            servable(run.folder),
            section.host,
            section.port or 0,
            engine=section.engine or "own",
            passes=section.passes or "threads",
            options=options,
        ) as endpoint:
            reply = endpoint.ask(question)
        bar.advance(1)
    asked = next(iter(question.values())) if isinstance(question, dict) else question
    if isinstance(asked, list) and isinstance(asked[-1], dict):  # turns of a conversation
        asked = asked[-1]["content"]
    shown = asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)
    run.note_stage("serve", time.perf_counter() - started, question=shown, answer=reply)


def servable(target: Path) -> Path:
    """A run's folder stands for its package, or for its model when it has no package."""
    if not (target / "run.json").is_file():
        return target
    run = open_run(target)
    return run.package if run.package.is_dir() else run.model
