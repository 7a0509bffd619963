"""The verbs: finetune, evaluate, package, serve, inspect, run. The one file that wires the parts together."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ingot.data import inspect as view
from ingot.data.conversation import Example
from ingot.data.splits import Splits, load_splits
from ingot.data.template import DroppedReport, encode_all, request_of
from ingot.errors import DataError, IngotError, Interrupted, ModelError, RecipeError
from ingot.evaluation import plots, report
from ingot.evaluation.measure import choose, make_items, measure
from ingot.evaluation.metrics import metric_names
from ingot.evaluation.runner import Comparison, Evaluation, Score, compare, load_comparison, load_scores
from ingot.model import adapters
from ingot.model.export import export_model, probes
from ingot.model.generate import Runtime
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
from ingot.model.source import model_folder
from ingot.packaging.bundle import package_model
from ingot.packaging.verify import verify_package
from ingot.parallel.apply import Sharded, parallelize, recompute_blocks
from ingot.progress import Progress
from ingot.ranks import Ranks, broadcast, pick_device, process_group, read_ranks
from ingot.recipe import Recipe
from ingot.recipe_io import flat_params, load_recipe, recipe_hash
from ingot.runfolder import Run, create_run, open_run, versions, write_json
from ingot.serving.server import Endpoint
from ingot.serving.server import serve as serve_forever
from ingot.track import Tracker, read_metrics
from ingot.train.loop import Fitted, Rows, StepInfo, fit, plan_steps

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
    prepared = Prepared(tokenizer, splits, Rows(encoded, watched, pad_id(tokenizer)), dropped)
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
    if recipe.parallel.backend == "auto":
        parallel["backend"] = "nccl" if device.type == "cuda" else "gloo"
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update=model), "parallel": recipe.parallel.model_copy(update=parallel)}
    )


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
    recipe, home = _opened(recipe, home)
    ranks = read_ranks()
    progress = progress if ranks.main else QUIET
    device = pick_device(ranks)
    recipe = resolve(recipe, home, ranks, device)
    decided = [f"model.dtype={recipe.model.dtype}", f"parallel.strategy={recipe.parallel.strategy}"]
    progress.note(f"{recipe.name}: {device.type}, {ranks.world} ranks, {' '.join(decided)}")
    _set_threads(recipe, ranks)
    prepared = prepare(recipe, home, progress)
    _preflight(recipe, home, prepared)
    with process_group(ranks, recipe.parallel, device):
        run = _open_or_create(recipe, home, resume, ranks)
        before = run.record().get("tracking_run") if ranks.main else None
        tracker = Tracker.start(recipe.track, run.folder, recipe.name, flat_params(recipe), ranks.main, run_id=before)
        if ranks.main:
            run.note(tracking_run=tracker.run_id)
        with tracker, _status(run, ranks):
            started = time.perf_counter()
            model, initial = _build(recipe, home, prepared.splits.labels)
            sharded = parallelize(model, ranks, recipe.parallel, device, resolve_dtype(recipe.model.dtype, device))
            fitted = _fit(sharded, prepared, recipe, run, resume is not None, tracker, progress)
            if ranks.main:
                facts = _export(sharded.plain, initial, prepared, recipe, run, fitted)
                run.note_stage("finetune", time.perf_counter() - started, **facts)
                tracker.artifact(run.folder / "resolved.yaml")
    return run


def evaluate(run: Run | Path, *, progress: Progress = QUIET) -> tuple[Evaluation | None, Evaluation, Comparison | None]:
    """Measure a run's base model (if the recipe asks for it) and tuned model on the same test rows, and test the
    difference.

    Returns (base, tuned, comparison); they are saved in the run's `evaluation` folder.
    """
    run = run if isinstance(run, Run) else open_run(run)
    recipe, started = run.recipe, time.perf_counter()
    if not run.finished("finetune"):
        raise IngotError(
            f"{run.folder} holds no finished model; continue it with: ingot finetune RECIPE --resume {run.folder}"
        )
    device = pick_device(Ranks())
    _set_threads(recipe, Ranks())
    tokenizer, splits = load_tokenizer(recipe.model, run.home), load_splits(recipe, run.home)
    examples = choose(splits.test, recipe)
    run.evaluation.mkdir(exist_ok=True)
    base = None
    if recipe.evaluate.base:
        base = _measure(
            "base", _base_model(recipe, run.home, splits.labels, device), tokenizer, examples, splits, recipe, progress
        )
        base.save(run.evaluation)
    tuned = _measure("tuned", _tuned_model(run, splits.labels, device), tokenizer, examples, splits, recipe, progress)
    tuned.save(run.evaluation)
    comparison = compare(base, tuned, recipe.evaluate) if base else None
    if comparison:
        comparison.save(run.evaluation)
    _draw(run, base, tuned)
    run.note_stage("evaluate", time.perf_counter() - started, rows=len(tuned.rows))
    _track_scores(run, base, tuned)
    return base, tuned, comparison


def evaluate_base(recipe: Recipe | str | Path, *, home: Path | None = None, progress: Progress = QUIET) -> Evaluation:
    """Measure the recipe's base model alone on its test rows; nothing is written."""
    recipe, home = _opened(recipe, home)
    device = pick_device(Ranks())
    recipe = resolve(recipe, home, Ranks(), device)
    tokenizer, splits = load_tokenizer(recipe.model, home), load_splits(recipe, home)
    model = _base_model(recipe, home, splits.labels, device)
    return _measure("base", model, tokenizer, choose(splits.test, recipe), splits, recipe, progress)


def package(run: Run | Path, *, progress: Progress = QUIET) -> Path:
    """Write the run's tuned model as an MLflow model and prove that a clean process loads it and gets the same answers.

    Raises PackageError when it does not.
    """
    run = run if isinstance(run, Run) else open_run(run)
    recipe, started = run.recipe, time.perf_counter()
    if not run.finished("finetune"):
        raise IngotError(
            f"{run.folder} holds no finished model; continue it with: ingot finetune RECIPE --resume {run.folder}"
        )
    with progress.stage("package", total=1 + recipe.package.verify, unit="steps") as bar:
        facts = json.loads((run.model / "ingot.json").read_text(encoding="utf-8"))
        metadata = {
            "recipe": recipe.name,
            "recipe_hash": recipe_hash(recipe),
            "base_model": recipe.model.source,
            "ingot": versions()["ingot"],
        }
        out = package_model(
            run.model,
            run.package,
            name=recipe.package.name or recipe.name,
            task=recipe.objective.task,
            example_input=facts["example"],
            metadata=metadata,
            license=recipe.package.license,
        )
        bar.advance(1)
        if recipe.package.verify:
            examples, expected = _examples(run)
            verify_package(out, examples, expected)
            bar.advance(1)
    run.note_stage("package", time.perf_counter() - started, verified=recipe.package.verify)
    return out


def serve(target: Path, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a run, a package or a Hugging Face folder until Ctrl-C. Loopback unless INGOT_API_KEY is set."""
    serve_forever(_servable(target), host=host, port=port)


def run(
    recipe: Recipe | str | Path, *, home: Path | None = None, resume: Path | None = None, progress: Progress = QUIET
) -> dict[str, Any]:
    """The whole path: fine-tune, evaluate base and tuned, package, verify, ask the endpoint one question.

    Returns the summary that is also saved as the run's summary.json: `metrics.base` and `metrics.tuned` (each metric:
    value,
    interval), `comparison`, `stages` with seconds, `paths`, `question` and `answer`. With `resume`, finished stages
    are kept.
    """
    recipe, home = _opened(recipe, home)
    if resume is not None and open_run(resume).finished("finetune"):
        done = _continued(resolve(recipe, home, read_ranks(), pick_device(read_ranks())), resume)
    else:
        done = finetune(recipe, home=home, resume=resume, progress=progress)
    if not read_ranks().main:
        return {}
    if recipe.evaluate.enabled and not done.finished("evaluate"):
        evaluate(done, progress=progress)
    if recipe.package.enabled and not done.finished("package"):
        package(done, progress=progress)
    if recipe.serve.enabled and not done.finished("serve"):
        _ask_endpoint(done, progress)
    done.note(status="finished")
    summary = _summary(done)
    write_json(done.folder / "summary.json", summary)
    return summary


def _opened(recipe: Recipe | str | Path, home: Path | None) -> tuple[Recipe, Path]:
    if isinstance(recipe, Recipe):
        return recipe, home or Path.cwd()
    return load_recipe(recipe), home or Path(recipe).resolve().parent


def _set_threads(recipe: Recipe, ranks: Ranks) -> None:
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    elif ranks.local_world > 1:  # each rank would otherwise take every core, and they would fight over them
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world))


def _preflight(recipe: Recipe, home: Path, prepared: Prepared) -> None:
    """Everything about the later stages that can be known to fail before training is paid for."""
    model_folder(recipe.model, home, weights=recipe.model.initialization == "pretrained")
    if recipe.evaluate.enabled:
        examples = choose(prepared.splits.test, recipe)
        items = make_items(examples, prepared.tokenizer, recipe, context_length(recipe.model, home))
        metric_names(recipe.evaluate, recipe.objective.task, [item.references for item in items])


def _open_or_create(recipe: Recipe, home: Path, resume: Path | None, ranks: Ranks) -> Run:
    """Rank 0 makes or opens the run's folder; the others are told which, or that it failed."""
    found: Run | IngotError | None = None
    if ranks.main:
        try:
            found = create_run(recipe, home) if resume is None else _resumable(recipe, resume)
        except IngotError as error:
            found = error
    found = broadcast(found)
    if isinstance(found, IngotError):
        raise found
    assert found is not None
    return found


def _continued(recipe: Recipe, folder: Path) -> Run:
    """The run in `folder`, if it was started with this (resolved) recipe."""
    run = open_run(folder)
    if recipe_hash(run.recipe) != recipe_hash(recipe):
        raise RecipeError(
            "--resume",
            str(folder),
            "it was started with another recipe; start a new run, or restore that recipe (resolved.yaml)",
        )
    return run


def _resumable(recipe: Recipe, folder: Path) -> Run:
    run = _continued(recipe, folder)
    if run.finished("finetune"):
        raise RecipeError(
            "--resume",
            str(folder),
            "its fine-tuning is finished; `ingot run RECIPE --resume` goes on with the next stage",
        )
    if not (run.checkpoints / "last").exists():
        raise RecipeError("--resume", str(folder), "it has no checkpoint yet; start a new run")
    return run


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


def _build(recipe: Recipe, home: Path, labels: tuple[str, ...]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
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


def _fit(
    sharded: Sharded, prepared: Prepared, recipe: Recipe, run: Run, resume: bool, tracker: Tracker, progress: Progress
) -> Fitted:
    steps = len(plan_steps([len(row.ids) for row in prepared.rows.train], recipe.train))
    with progress.stage("finetune", total=steps, unit="steps") as bar:

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
            sharded, prepared.rows, recipe, run.checkpoints, recipe_hash(recipe), resume=resume, on_step=(show, track)
        )


def _export(
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
    facts["rows"] = len(prepared.rows.train)
    facts["data"] = prepared.splits.report.as_dict() | {"truncation": prepared.dropped.as_dict()}
    if recipe.adapter.kind == "lora":
        dead = (
            adapters.dead_tensors(model, initial) if fitted.final_step > 1 else []
        )  # the first step moves only one of A and B
        if dead:
            raise ModelError(
                "adapter",
                dead[0],
                f"{len(dead)} of {len(initial)} adapter tensors did not change in {fitted.final_step} steps; "
                "raise optim.lr",
            )
        adapters.save_adapter(model, run.adapter, recipe.model.source.removeprefix("hf://"))
        rows = (prepared.rows.validation or prepared.rows.train)[:4]
        model, facts["merge_difference"] = adapters.merge(model, probes(rows, next(model.parameters()).device))
    dtype = resolve_dtype(recipe.model.dtype, next(model.parameters()).device)
    example = prepared.splits.test[0] if prepared.splits.test else prepared.splits.train[0]
    described = {
        "task": recipe.objective.task,
        "labels": list(prepared.splits.labels),
        "max_new_tokens": recipe.evaluate.max_new_tokens,
        "example": request_of(example),
        "base_model": recipe.model.source,
    }
    export_model(model, prepared.tokenizer, run.model, dtype, described)
    return facts


def _base_model(recipe: Recipe, home: Path, labels: tuple[str, ...], device: torch.device) -> nn.Module:
    dtype = resolve_dtype(recipe.model.dtype, device)
    return load_model(recipe.model, home, recipe.objective.task, labels, dtype=dtype, seed=recipe.train.seed).to(device)


def _tuned_model(run: Run, labels: tuple[str, ...], device: torch.device) -> nn.Module:
    """The run's merged model, read from its folder as any user of it would."""
    runtime = Runtime.load(run.model, str(device))
    if runtime.labels != labels and run.recipe.objective.task == "text-classification":
        raise DataError(
            "data",
            list(labels)[:3],
            f"the training rows' labels are not those of {run.model}; the data changed since training",
        )
    return runtime.model


def _measure(
    name: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: list[Example],
    splits: Splits,
    recipe: Recipe,
    progress: Progress,
) -> Evaluation:
    with progress.stage(f"evaluate {name}", total=len(examples), unit="rows") as bar:
        return measure(name, model, tokenizer, examples, splits.labels, recipe, bar.advance)


def _draw(run: Run, base: Evaluation | None, tuned: Evaluation) -> None:
    points = read_metrics(run.metrics)
    train = [(p["step"], p["metrics"]["train_loss"]) for p in points if "train_loss" in p["metrics"]]
    watched = [(p["step"], p["metrics"]["validation_loss"]) for p in points if "validation_loss" in p["metrics"]]
    plots.run_picture(train, watched, base.scores if base else None, tuned.scores, run.picture, run.recipe.name)


def _track_scores(run: Run, base: Evaluation | None, tuned: Evaluation) -> None:
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


def _examples(run: Run) -> tuple[list[dict[str, Any]], list[str]]:
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


def _ask_endpoint(run: Run, progress: Progress) -> None:
    started = time.perf_counter()
    facts = json.loads((run.model / "ingot.json").read_text(encoding="utf-8"))
    with progress.stage("serve", total=1, unit="questions") as bar:
        question = run.recipe.serve.question or next(iter(facts["example"].values()))
        with Endpoint(_servable(run.folder), host=run.recipe.serve.host, port=run.recipe.serve.port) as endpoint:
            reply = endpoint.ask(question)
        bar.advance(1)
    asked = question if isinstance(question, str) else question[-1]["content"]
    run.note_stage("serve", time.perf_counter() - started, question=asked, answer=reply)


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


def inspect(recipe: Recipe, home: Path, part: str, count: int, console: Any) -> None:
    """Show `count` rows of `part` with the mask in colour on `console`, or print them as JSON when it is None."""
    tokenizer, splits = load_tokenizer(recipe.model, home), load_splits(recipe, home)
    examples = getattr(splits, part)
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


def _summary(run: Run) -> dict[str, Any]:
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


def _servable(target: Path) -> Path:
    """A run's folder stands for its package, or for its model when it has no package."""
    if not (target / "run.json").is_file():
        return target
    run = open_run(target)
    return run.package if run.package.is_dir() else run.model
