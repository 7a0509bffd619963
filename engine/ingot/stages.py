"""What a verb does inside: prepare data, build and train a model, export it, measure it, ask it."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ingot.data.conversation import Example
from ingot.data.splits import Splits, load_splits
from ingot.data.template import DroppedReport, encode_all, prompt_text, request_of
from ingot.errors import DataError, ModelError
from ingot.evaluation import plots
from ingot.evaluation.measure import choose, make_items, measure
from ingot.evaluation.metrics import metric_names
from ingot.evaluation.runner import Evaluation
from ingot.evaluation.statistics import detectable_difference
from ingot.model import adapters
from ingot.model.export import export_model, probes
from ingot.model.load import (
    Tokenizer,
    context_length,
    load_model,
    load_tokenizer,
    pad_id,
    parameter_counts,
    resolve_dtype,
    resolve_pooling,
)
from ingot.model.runtime import Runtime
from ingot.model.source import model_folder
from ingot.data.plan import PlannedFeed
from ingot.data.rows import ListRows
from ingot.parallel.sharded import Sharded, recompute_blocks
from ingot.progress import Progress
from ingot.ranks import Ranks, pick_device, read_ranks
from ingot.recipe import Recipe
from ingot.recipe_io import recipe_hash
from ingot.runfolder import Run, open_run
from ingot.serving.server import Endpoint
from ingot.track import Tracker, read_metrics
from ingot.train.loop import Fitted, Rows, StepInfo, fit
from ingot.train.checkpoint import Checkpoints

QUIET = Progress(quiet=True)


@dataclass(frozen=True)
class Prepared:
    """What a recipe becomes before any model is loaded."""

    tokenizer: Tokenizer
    splits: Splits
    rows: Rows
    dropped: DroppedReport


def prepare(recipe: Recipe, home: Path, progress: Progress = QUIET) -> Prepared:
    """Read, split and encode the data. All errors that the data and the tokenizer can raise are raised here.

    Raises DataError when no row with a trainable token is left, ModelError when the tokenizer does not fit the task.
    """
    tokenizer = load_tokenizer(recipe.model, home)
    splits = load_splits(recipe, home)
    settings = (tokenizer, recipe.data, recipe.objective, splits.labels)
    with progress.stage("encode", total=len(splits.train), unit="rows") as bar:
        encoded, dropped = encode_all(splits.train, *settings, progress=lambda done, _: bar.advance(done - bar.done))
    if not encoded:
        fix = f"none of {len(splits.train)} training rows keeps a trainable token; raise it"
        raise DataError("data.max_tokens", recipe.data.max_tokens, fix)
    watched, _ = encode_all(splits.validation, *settings)
    prepared = Prepared(
        tokenizer,
        splits,
        Rows(PlannedFeed(ListRows(encoded), recipe.data, recipe.train), ListRows(watched), pad_id(tokenizer)),
        dropped,
    )
    for line in _findings(prepared, recipe):
        progress.note(line)
    return prepared


def _findings(prepared: Prepared, recipe: Recipe) -> Iterator[str]:
    """What the user should know about the data, a line each."""
    found, dropped = prepared.splits.report, prepared.dropped
    parts = (f"{count:,} {name} ({found.origins[name]})" for name, count in found.counts.items())
    yield f"data: {', '.join(parts)}"
    for name, rows in found.bad_rows.items():
        if rows:
            first = rows[0]
            yield f"data: {len(rows):,} unusable rows left out of {name}; the first is {first.where}: {first.reason}"
    for name, count in found.shared_with_train.items():
        if count:
            yield f"data: {count:,} {name} rows ask what a training row asks too"
    if dropped.truncated:
        lost = (
            f"{dropped.count:,} of them lost every trainable token and are left out"
            if dropped.count
            else "all still learn"
        )
        yield f"data: {dropped.truncated:,} training rows cut at {recipe.data.max_tokens} tokens; {lost}"


def resolve(recipe: Recipe, home: Path, ranks: Ranks, device: torch.device) -> Recipe:
    """The recipe with every "auto" decided for this machine; what `resolved.yaml` holds."""
    dtype = str(resolve_dtype(recipe.model.dtype, device)).removeprefix("torch.")
    model: dict[str, Any] = {"dtype": dtype}
    if recipe.objective.task == "text-classification":
        model["pooling"] = resolve_pooling(recipe.model, home)
    parallel: dict[str, Any] = {}
    if recipe.parallel.strategy == "auto":
        parallel["strategy"] = "ddp" if ranks.world > 1 else "none"
    data: dict[str, Any] = {}
    if recipe.data.batches == "auto":
        data["batches"] = "padded" if recipe.objective.task == "text-classification" else "padding-free"
    if recipe.parallel.backend == "auto":
        parallel["backend"] = "nccl" if device.type == "cuda" else "gloo"
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "data": recipe.data.model_copy(update=data),
            "parallel": recipe.parallel.model_copy(update=parallel),
        }
    )


def set_threads(recipe: Recipe, ranks: Ranks) -> None:
    """CPU threads of this rank: `train.threads`, or its share of the cores."""
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    elif ranks.local_world > 1:  # each rank would otherwise take every core, and they would fight over them
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world))


def preflight(recipe: Recipe, home: Path, prepared: Prepared, progress: Progress) -> None:
    """Everything about the later stages that can be known to fail before training is paid for."""
    model_folder(recipe.model, home, weights=recipe.model.initialization == "pretrained")
    if recipe.evaluate.enabled:
        examples = choose(prepared.splits.test, recipe)
        items = make_items(examples, prepared.tokenizer, recipe, context_length(recipe.model, home))
        metric_names(recipe.evaluate, recipe.objective.task, [item.references for item in items])
        points = 100 * detectable_difference(len(items))
        seen = (
            f"sees differences of shares from about {points:.1f} points on"
            if points < 100
            else "is too small to see any"
        )
        progress.note(f"evaluate: a paired test on {len(items):,} rows {seen} (80 % power, models disagreeing on 20 %)")


def build(recipe: Recipe, home: Path, labels: tuple[str, ...]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model ready to be trained, and a copy of what its adapter starts from (empty for full fine-tuning)."""
    dtype = resolve_dtype(recipe.model.dtype, pick_device(read_ranks()))
    full = recipe.adapter.kind == "none"
    # Full fine-tuning keeps float32 master weights and computes in `dtype`; a frozen base is held in `dtype` itself.
    model = load_model(
        recipe.model,
        home,
        recipe.objective.task,
        labels,
        dtype=torch.float32 if full else dtype,
        seed=recipe.train.seed,
    )
    model = adapters.attach_adapter(model, recipe.adapter, recipe.objective.task, recipe.train.seed)
    if recipe.train.gradient_checkpointing:
        recompute_blocks(model)
    initial = {} if full else {name: p.detach().cpu().clone() for name, p in adapters.trainable_tensors(model)}
    return model, initial


def train(
    sharded: Sharded, prepared: Prepared, recipe: Recipe, run: Run, resume: bool, tracker: Tracker, progress: Progress
) -> Fitted:
    """Run the loop, with a bar on `progress` and every step's numbers in `tracker`."""
    checkpoints = Checkpoints(
        run.checkpoints, sharded.layout.ranks, recipe_hash(recipe), recipe.train.keep_checkpoints
    )
    with progress.stage("finetune", total=prepared.rows.train.steps, unit="steps") as bar:

        def show(info: StepInfo) -> None:
            bar.advance(
                info.step - bar.done, loss=f"{info.loss:.3f}", tokens_per_s=f"{info.rates['tokens_per_second']:,.0f}"
            )

        def track(info: StepInfo) -> None:
            values = {"train_loss": info.loss, "lr": info.lr, "grad_norm": info.grad_norm, **info.rates}
            if info.validation_loss is not None:
                values["validation_loss"] = info.validation_loss
            tracker.metrics(values, info.step)

        return fit(
            sharded,
            prepared.rows,
            recipe,
            checkpoints,
            resume=resume,
            on_step=(show, track),
            notify=progress.note,
        )


def export(
    model: nn.Module, initial: dict[str, torch.Tensor], prepared: Prepared, recipe: Recipe, run: Run, fitted: Fitted
) -> dict[str, Any]:
    """Save adapter and merged model, with the proofs that the adapter is alive and that merging kept it."""
    facts: dict[str, Any] = {
        "steps": fitted.steps,
        "final_step": fitted.final_step,
        "best_validation_loss": fitted.best_loss,
        "training_seconds": fitted.seconds,
        **fitted.rates,
    }
    facts["trainable_parameters"], facts["parameters"] = parameter_counts(model)
    facts["rows"] = len(prepared.rows.train.rows)
    facts["data"] = prepared.splits.report.as_dict() | {"truncation": prepared.dropped.as_dict()}
    if recipe.adapter.kind == "lora":
        # The first step moves only one of A and B, since the other starts at zero.
        dead = adapters.dead_tensors(model, initial) if fitted.final_step > 1 else []
        if dead:
            raise ModelError(
                "adapter",
                dead[0],
                f"{len(dead)} of {len(initial)} adapter tensors did not change in {fitted.final_step} steps; "
                "raise optim.lr",
            )
        adapters.save_adapter(model, run.adapter, recipe.model.source.removeprefix("hf://"))
        watched = prepared.rows.validation if len(prepared.rows.validation) else prepared.rows.train.rows
        rows = [watched[index] for index in range(min(4, len(watched)))]
        model, facts["merge_difference"] = adapters.merge(model, probes(rows, next(model.parameters()).device))
    dtype = resolve_dtype(recipe.model.dtype, next(model.parameters()).device)
    example = prepared.splits.test[0] if prepared.splits.test else prepared.splits.train[0]
    described = {
        "task": recipe.objective.task,
        "labels": list(prepared.splits.labels),
        "pooling": recipe.model.pooling,
        "max_tokens": recipe.data.max_tokens,
        "max_new_tokens": recipe.evaluate.max_new_tokens,
        "example": request_of(example),
        "base_model": recipe.model.source,
    }
    export_model(model, prepared.tokenizer, run.model, dtype, described)
    return facts


def base_model(recipe: Recipe, home: Path, labels: tuple[str, ...], device: torch.device) -> nn.Module:
    """The model that training started from, with the same new weights (a classifier's head) if it needs any."""
    dtype = resolve_dtype(recipe.model.dtype, device)
    return load_model(recipe.model, home, recipe.objective.task, labels, dtype=dtype, seed=recipe.train.seed).to(device)


def tuned_model(run: Run, labels: tuple[str, ...], device: torch.device) -> nn.Module:
    """The run's merged model, read from its folder as any user of it would."""
    runtime = Runtime.load(run.model, str(device))
    if runtime.labels != labels and run.recipe.objective.task == "text-classification":
        raise DataError(
            "data",
            list(labels)[:3],
            f"the training rows' labels are not those of {run.model}; the data changed since training",
        )
    return runtime.model


def measured(
    name: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: list[Example],
    splits: Splits,
    recipe: Recipe,
    progress: Progress,
) -> Evaluation:
    """`measure` with a bar on `progress`."""
    total = len({prompt_text(e) for e in examples}) if recipe.evaluate.merge_references else len(examples)
    with progress.stage(f"evaluate {name}", total=total, unit="rows") as bar:
        return measure(name, model, tokenizer, examples, splits.labels, recipe, bar.advance)


def draw(run: Run, base: Evaluation | None, tuned: Evaluation) -> None:
    """Draw the run's picture from its metrics and these scores."""
    points = read_metrics(run.metrics)
    train = [(p["step"], p["metrics"]["train_loss"]) for p in points if "train_loss" in p["metrics"]]
    watched = [(p["step"], p["metrics"]["validation_loss"]) for p in points if "validation_loss" in p["metrics"]]
    plots.run_picture(train, watched, base.scores if base else None, tuned.scores, run.picture, run.recipe.name)


def track_scores(run: Run, base: Evaluation | None, tuned: Evaluation) -> None:
    """Add scores, picture and evaluation files to the MLflow run that training started."""
    with Tracker.start(
        run.recipe.track, run.folder, run.recipe.name, {}, True, run_id=run.record().get("tracking_run")
    ) as tracker:
        values = {f"tuned/{name}": score.value for name, score in tuned.scores.items()}
        values |= {f"base/{name}": score.value for name, score in base.scores.items()} if base else {}
        tracker.metrics(values, run.record()["stages"]["finetune"]["final_step"])
        tracker.artifact(run.picture)
        for path in sorted(run.evaluation.glob("*.json")):
            tracker.artifact(path, "evaluation")


def examples_with_answers(run: Run) -> tuple[list[dict[str, Any]], list[str]]:
    """Three test rows as requests to the package, and what the run's model answers in this process."""
    examples = choose(load_splits(run.recipe, run.home).test, run.recipe)[:3]
    inputs = [request_of(example) for example in examples]
    runtime = Runtime.load(run.model)
    if runtime.task == "text-classification":
        return inputs, [label for label, _ in runtime.classify([row["text"] for row in inputs])]
    if runtime.task == "chat-completion":
        prompts = [runtime.chat_ids(row["messages"]) for row in inputs]
    else:
        prompts = [runtime.prompt_ids(row["input_string"]) for row in inputs]
    return inputs, [answer.text for answer in runtime.generate(prompts)]


def ask_endpoint(run: Run, progress: Progress) -> None:
    """Start an endpoint on the run's package (or model), ask it one question over HTTP, stop it, note both."""
    started = time.perf_counter()
    facts = json.loads((run.model / "ingot.json").read_text(encoding="utf-8"))
    with progress.stage("serve", total=1, unit="questions") as bar:
        question = run.recipe.serve.question or next(iter(facts["example"].values()))
        with Endpoint(servable(run.folder), host=run.recipe.serve.host, port=run.recipe.serve.port) as endpoint:
            reply = endpoint.ask(question)
        bar.advance(1)
    asked = question if isinstance(question, str) else question[-1]["content"]
    run.note_stage("serve", time.perf_counter() - started, question=asked, answer=reply)


def servable(target: Path) -> Path:
    """A run's folder stands for its package, or for its model when it has no package."""
    if not (target / "run.json").is_file():
        return target
    run = open_run(target)
    return run.package if run.package.is_dir() else run.model
