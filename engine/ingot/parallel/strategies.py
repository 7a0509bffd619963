"""A recipe's `parallel` section -> `Sharded`: one list of functions in one visible order."""

import inspect
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ingot.errors import MissingPackage, RecipeError
from ingot.model.load import few_bits, load_model
from ingot.model.split import planned
from ingot.parallel import context, tensor
from ingot.parallel.layout import Layout
from ingot.parallel.optim import make_optimizer
from ingot.parallel.sharded import Sharded
from ingot.ranks import Ranks
from ingot.recipe import Optim, Parallel, Recipe
from ingot.registry import resolve

STRATEGIES = {
    "none": "ingot.parallel.strategies:single",
    "ddp": "ingot.parallel.strategies:replicate",
    "fsdp": "ingot.parallel.fsdp:shard",
    "hsdp": "ingot.parallel.fsdp:shard",
    "zero1": "ingot.parallel.zero:stage1",
    "zero2": "ingot.parallel.zero:stage2",
    "zero3": "ingot.parallel.zero:stage3",
}


def check_model(recipe: Recipe, home: Path) -> None:
    """Raise RecipeError where the model's own shape does not allow the sharing that `recipe.parallel` asks for, or its
    weights lie there in another form than `quantization.kind`.

    Only its configuration is read.
    """
    section = recipe.parallel
    form = few_bits(recipe.model, home)
    if form is not None and form != "nf4":
        raise RecipeError(
            "model.source", recipe.model.source, f"holds its weights as {form}; use the weights in full size, or in nf4"
        )
    if form is not None and recipe.quantization.kind != "nf4":
        kind = recipe.quantization.kind
        raise RecipeError("quantization.kind", kind, f"{recipe.model.source} holds weights in few bits; use nf4")
    if form is not None and find_spec("bitsandbytes") is None:
        raise MissingPackage("bitsandbytes", f"reading the 4-bit weights of {recipe.model.source}")
    if section.context * section.tensor == 1:
        return
    with torch.device("meta"):
        described = recipe.model.model_copy(update={"initialization": "random"})
        model = load_model(described, home, recipe.objective.task, ("one", "other"))
    if section.context > 1:
        context.check(model, section.context, section.tensor)
    if section.tensor > 1:
        planned(model, section.tensor)


def parallelize(
    model: nn.Module,
    ranks: Ranks,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    fill: Callable[[nn.Module], None] | None = None,
) -> Sharded:
    """Move `model` to `device` and spread it as `recipe.parallel` says.

    `fill` (fsdp, hsdp, zero3, tensor) puts weights into a model that lies on the meta device, once it is cut.

    Raises RecipeError where rules.py does: callers ask it first, before anything is loaded.
    """
    section = recipe.parallel
    layout = Layout(ranks, context=section.context, tensor=section.tensor)
    if layout.context > 1:
        context.check(model, layout.context, layout.tensor)
    if layout.context * layout.tensor > 1:
        layout = layout.connected(device.type, timedelta(minutes=section.timeout_minutes))
    if layout.tensor > 1:
        tensor.cut(model, layout)
    strategy = resolve(STRATEGIES, "parallel.strategy", section.strategy)
    more = {} if fill is None else {"fill": fill}
    return strategy(model, layout, section, recipe.optim, device, dtype, **more)


def single(
    model: nn.Module,
    layout: Layout,
    section: Parallel,
    optim: Optim,
    device: torch.device,
    dtype: torch.dtype,
    fill: Callable[[nn.Module], None] | None = None,
) -> Sharded:
    """One rank, or one group of ranks that share a line or a matrix: the model as it is."""
    if layout.ranks.world > 1:
        return replicate(model, layout, section, optim, device, dtype, fill)
    model.to(device)
    return Sharded(model, model, layout, dtype, make_optimizer(model, optim))


def replicate(
    model: nn.Module,
    layout: Layout,
    section: Parallel,
    optim: Optim,
    device: torch.device,
    dtype: torch.dtype,
    fill: Callable[[nn.Module], None] | None = None,
) -> Sharded:
    """Every rank (or group of ranks that share matrices) holds everything, and gradients are added up."""
    if fill is not None:
        fill(model)
    model.to(device)
    if layout.tensor > 1:
        return tensor.TensorSharded(model, model, layout, dtype, make_optimizer(model, optim))
    devices = [device] if device.type == "cuda" else None
    # torch 2.13 renamed it; the old name warns there, the new one is missing before.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
    wrapped = DistributedDataParallel(model, device_ids=devices, **options)
    return Sharded(model, wrapped, layout, dtype, make_optimizer(model, optim))
