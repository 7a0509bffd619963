"""A recipe -> the model that trains; what was trained -> what is exported."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ingot import watching
from ingot.errors import ModelError, RecipeError
from ingot.evaluation.measure import choose
from ingot.model import adapters, fused
from ingot.model.export import export_model, probes
from ingot.model.load import few_bits, load_model, parameter_counts, read_whole, resolve_dtype
from ingot.model.materialize import ShardReader
from ingot.model.matrices import matrices
from ingot.model.quantize import quantized, rounded
from ingot.parallel import fsdp, recompute
from ingot.parallel.sharded import MODEL, OPTIMIZER
from ingot.preparation import QUIET, Prepared
from ingot.progress import Progress
from ingot.ranks import Ranks, pick_device, read_ranks
from ingot.recipe import Parallel, Quantization, Recipe
from ingot.recipe_data import SEQUENCE_TO_SEQUENCE
from ingot.runfolder import Run
from ingot.train.loop import Fitted
from ingot.train.shards import Written


class Built(NamedTuple):
    """A model to train.

    `initial`: a copy of what its adapter starts from; empty for full fine-tuning, and for a model that lies on the meta
    device, where `fill` puts weights into what `parallelize` has cut. `kernels`: what fused operations compute.
    """

    model: nn.Module
    initial: dict[str, Tensor]
    fill: Callable[[nn.Module], None] | None
    kernels: fused.Report


def check_build(recipe: Recipe, home: Path, ranks: Ranks, device: torch.device) -> None:
    """Raise what `build` would for settings of a resolved recipe that this device or model has no place for. Only the
    model's configuration is read.
    """
    recompute.check(recipe.train, device)
    fused.check(recipe.kernels)
    computes = resolve_dtype(recipe.model.dtype, device)
    if recipe.adapter.kind == "none" and recipe.optim.weights == "bfloat16" and computes == torch.float32:
        raise RecipeError(
            "optim.weights",
            "bfloat16",
            "weights in bfloat16 multiply in bfloat16, and model.dtype is float32; set model.dtype=bfloat16 too",
        )
    if not isinstance(recipe.kernels.ops, list):
        return
    described = recipe.model.model_copy(update={"initialization": "random"})
    with torch.device("meta"):
        model = load_model(described, home, recipe.objective.task, ("one", "other"))
        model = adapters.attach_adapter(model, recipe.adapter, recipe.objective.task, 0)
    fuse(model, recipe, ranks)


def build(
    recipe: Recipe, home: Path, labels: tuple[str, ...], ranks: Ranks, progress: Progress = QUIET, *, cut: bool = True
) -> Built:
    """The model ready to be trained on these ranks; without `cut` whole on this one, whatever the strategy, and a
    quantized base as the plain weights that it computes with.

    Under fsdp, hsdp, zero3 and tensor a rank reads its part only, where that is possible.
    """
    dtype = resolve_dtype(recipe.model.dtype, pick_device(read_ranks()))
    full = recipe.adapter.kind == "none"
    reader = None
    section = recipe.parallel
    if cut and ranks.world > 1 and (section.strategy in ("fsdp", "hsdp", "zero3") or section.tensor > 1):
        reason = _whole_because(recipe)
        if reason is None:
            copies, size = _grid(section, ranks)
            offloaded = torch.device("cpu") if section.offload == "parameters" else None
            reader = ShardReader(size, copies, offloaded, section.tensor)
        else:
            progress.note(f"load: every rank holds the whole model in CPU memory until it is cut, because {reason}")
    # Full fine-tuning holds weights as `optim.weights` says and computes in `dtype`; a frozen base is held in `dtype`.
    model = load_model(
        recipe.model,
        home,
        recipe.objective.task,
        labels,
        dtype=getattr(torch, recipe.optim.weights) if full else dtype,
        seed=recipe.train.seed,
        read=reader or read_whole,
    )
    if recipe.quantization.kind != "none":
        _note_unquantized(model, recipe, progress)
        model = (quantized if cut else rounded)(model, recipe.quantization)
    tied = adapters.tied_head(model)
    model = adapters.attach_adapter(model, recipe.adapter, recipe.objective.task, recipe.train.seed)
    if tied and not adapters.tied_head(model):
        progress.note("adapter.targets: the output head was tied to the embedding and now has its own weight")
    kernels = fused.Report()
    if cut:  # not where a trained model is only rebuilt
        kernels = fuse(model, recipe, ranks)
        for text in kernels.lines():
            progress.note(text)
        recompute.apply_activations(model, recipe.train, pick_device(read_ranks()))
        if recipe.train.compile:
            progress.note("train.compile: blocks are compiled in the first steps, which take minutes")
    if reader is not None:
        reader.lay_out(model)
        return Built(model, {}, reader.fill, kernels)
    initial = {} if full else {name: p.detach().cpu().clone() for name, p in adapters.trainable_tensors(model)}
    return Built(model, initial, None, kernels)


def _note_unquantized(model: nn.Module, recipe: Recipe, progress: Progress) -> None:
    """Only linear layers are quantized: say so where most of the model are experts."""
    found = matrices(model)
    experts = sum(matrix.size for matrix in found if matrix.kind == "experts")
    if experts:
        share = experts / sum(matrix.size for matrix in found)
        kind = recipe.quantization.kind
        progress.note(f"quantization.kind={kind}: {share:.0%} of the weights are fused experts and stay in full size")


def _whole_because(recipe: Recipe) -> str | None:
    """Why a model that will be cut has to be loaded whole first."""
    if recipe.model.initialization == "random":
        return "model.initialization=random draws one tensor after another from one seed"
    if recipe.adapter.kind == "lora" and recipe.adapter.dora:
        return "adapter.dora starts from the norms of whole weights"
    if recipe.quantization.kind != "none":
        return f"quantization.kind={recipe.quantization.kind} needs whole weights"
    return None


def fuse(model: nn.Module, recipe: Recipe, ranks: Ranks) -> fused.Report:
    """`fused.apply` as `recipe` says, to a model that these ranks will share."""
    tensor = recipe.parallel.tensor if ranks.world > 1 else 1
    return fused.apply(model, recipe.kernels, hooked=_hooked(recipe.parallel, ranks), tensor=tensor)


def _hooked(section: Parallel, ranks: Ranks) -> str | None:
    """Who hooks into single layers, so that several must not be computed at once."""
    if ranks.world == 1:
        return None
    if section.tensor > 1:
        return "parallel.tensor"
    return "zero3" if section.strategy == "zero3" else None


def _grid(section: Parallel, ranks: Ranks) -> tuple[int, int]:
    """(copies of the model, ranks or groups of ranks that cut one copy)."""
    groups = ranks.world // section.tensor
    if section.strategy in ("none", "ddp"):
        return groups, 1
    return fsdp.grid(section, ranks) if section.tensor == 1 else (1, groups)


def rebuilt(
    recipe: Recipe, home: Path, labels: tuple[str, ...], checkpoint: Path, device: torch.device
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The whole model with the trained weights of `checkpoint`, for one rank alone; and what its adapter started from.

    In CPU memory, or on `device` if twice its size is free there. Raises CheckpointError when the files do not fit.
    """
    gc.collect()
    model, initial, *_ = build(recipe, home, labels, Ranks(), cut=False)
    state = {MODEL + name: parameter.detach() for name, parameter in adapters.trainable_tensors(model)}
    written = Written(checkpoint)
    written.fill(state, others=[name for name in written.tensors if name.startswith(OPTIMIZER)])
    if device.type == "cuda":
        torch.cuda.empty_cache()
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        if torch.cuda.mem_get_info(device)[0] > 2 * size:
            model.to(device)
    return model, initial


def export(
    model: nn.Module, initial: dict[str, Tensor], prepared: Prepared, recipe: Recipe, run: Run, fitted: Fitted
) -> dict[str, Any]:
    """Save adapter and merged model, with the proofs that the adapter is alive and that merging kept it."""
    facts: dict[str, Any] = {
        "steps": fitted.steps,
        "final_step": fitted.final_step,
        "best_validation_loss": fitted.best_loss,
        **watching.facts(fitted),
        "training_seconds": fitted.seconds,
        **fitted.rates,
    }
    facts["trainable_parameters"], facts["parameters"] = parameter_counts(model)
    facts |= prepared.data_facts()
    fused.restore(model)  # what is exported is the architecture's own
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
        decoder = recipe.objective.task in SEQUENCE_TO_SEQUENCE
        probed = probes(rows, next(model.parameters()).device, decoder=decoder)
        tuned = adapters.answers(model, probed) if recipe.quantization.kind != "none" else []
        model, facts["merge_difference"] = adapters.merge(model, probed)
    # As in training: a model rebuilt in CPU memory beside a GPU is exported in the GPU's type.
    dtype = resolve_dtype(recipe.model.dtype, pick_device(read_ranks()))
    described = {
        "task": recipe.objective.task,
        "labels": list(prepared.facts.labels),
        "pooling": recipe.model.pooling,
        "max_tokens": recipe.data.max_tokens,
        "max_new_tokens": recipe.evaluate.max_new_tokens,
        "example": prepared.facts.example,
        "base_model": recipe.model.source,
    }
    if recipe.objective.task == "question-answering":
        described["overlap_tokens"] = recipe.data.overlap_tokens
        # As evaluation does: none is said where some test row has no answer.
        described["no_answer"] = any(row.reference == "" for row in choose(prepared.facts.questions, recipe))
    export_model(model, prepared.tokenizer, run.model, dtype, described)
    if recipe.quantization.kind != "none" and few_bits(recipe.model, run.home) is None:
        model.to("meta")  # what is exported gives its memory to the other base
        labels = prepared.facts.labels
        facts["merge_difference_full_base"] = over_full_base(recipe, run.home, labels, run.adapter, probed, tuned)
    return facts


def over_full_base(
    recipe: Recipe,
    home: Path,
    labels: tuple[str, ...],
    folder: Path,
    probed: Sequence[dict[str, Tensor]],
    tuned: Sequence[Tensor],
) -> float:
    """How far what people get who merge the adapter in `folder` into the base in full size is from the logits `tuned`
    of what was trained over a quantized one, on `probed`; as a share of these logits. Reads the base once more.
    """
    full = recipe.model_copy(update={"quantization": Quantization()})
    model: Any = build(full, home, labels, Ranks(), cut=False).model
    model.to(tuned[0].device)
    return adapters.merge_onto(model, folder, probed, tuned)
