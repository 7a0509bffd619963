"""Cut a model's matrices among ranks by its own tensor-parallel plan, with the adapters that sit on them.

The plan and its styles (which matrix is cut how, where products are joined) are transformers'; they are applied here to
the model that one rank would train, adapters included, so that nothing is drawn or named differently.
"""

# M elements of a mesh (ranks), I and O features in and out of a layer

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

# Both lie here in 5.17, where the second has no module of its own yet, and in 5.23.
from transformers.distributed.tensor_parallel import (  # type: ignore[attr-defined]
    ALL_PARALLEL_STYLES,
    replace_layer_number_by_wildcard,
)

from ingot.errors import RecipeError

SUMMED = "replicated_with_grad_allreduce"
# What an adapter's two factors (A: features in -> rank, B: rank -> features out) become beside a base layer of a style.
# None: whole on every rank. Where the base layer takes or gives whole features, so does the adapter.
FACTORS: dict[str, tuple[str | None, str | None]] = {
    "colwise": (None, "colwise"),
    "rowwise": ("rowwise", None),
    "colwise_gather_output": (None, "colwise_gather_output"),
    "colwise_rep": (None, "colwise_rep"),
    "rowwise_split_input": (None, None),
    "rowwise_rep": (None, None),
}


def split(model: nn.Module, mesh: DeviceMesh, rank: int) -> None:
    """Leave in `model` this rank's part of each matrix of its plan, as DTensors on the 1-D `mesh`; `rank` in it.

    No rank talks to another: each cuts its part out of the whole model that it holds. Raises RecipeError for a model
    without a plan, with heads that cannot be shared evenly, or with an adapter on a layer that cannot be cut with it.
    """
    inner, plan = planned(model, mesh.size())
    styled = list(_styles(inner, plan))
    whole = _held_elsewhere(inner, styled)
    cut: dict[int, nn.Parameter] = {}  # tied weights are cut once
    for name, module, style in styled:
        if any(id(parameter) in whole for parameter in module.parameters(recurse=False)):
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            own = plan.get(replace_layer_number_by_wildcard(f"{name}.{key}"), style)
            if own is None or own == SUMMED:
                continue
            if own.startswith("packed") and parameter.requires_grad:
                raise RecipeError(
                    "parallel.tensor",
                    mesh.size(),
                    f"{name}.{key} of {type(inner).__name__} is cut in stripes, which a checkpoint cannot put together "
                    "for other ranks; train adapters, or all weights by parallel.strategy=fsdp",
                )
            if id(parameter) not in cut:
                ALL_PARALLEL_STYLES[own].shard_param(module, key, mesh)
                cut[id(parameter)] = getattr(module, key)
            module._parameters[key] = cut[id(parameter)]
        if style == SUMMED:
            _sum_gradients(module, mesh.get_group())
        elif style is not None:
            if style == "mla_kv_a_proj":  # reads there where its output is cut
                vars(module)["config"] = inner.config.get_text_config()
            ALL_PARALLEL_STYLES[style].install_forward(module, mesh)
    for name, module in inner.named_modules():
        style = plan.get(replace_layer_number_by_wildcard(name))
        if style is not None and hasattr(module, "lora_A"):
            _split_adapter(name, module, style, mesh, rank)


def planned(model: nn.Module, size: int) -> tuple[PreTrainedModel, dict[str, str]]:
    """The transformers model in `model`, and its plan. Raises RecipeError where `size` ranks cannot follow it."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    plan = inner.tp_plan
    if not plan:
        raise RecipeError(
            "parallel.tensor",
            size,
            f"transformers has no tensor-parallel plan for {type(inner).__name__}; cut it by parallel.strategy=fsdp",
        )
    _check_heads(inner, plan, size)
    return inner, plan


def whole_because_tied(model: nn.Module, size: int) -> bool:
    """Whether something that the plan would cut stays whole here: it is tied to something that the plan leaves out."""
    inner, plan = planned(model, size)
    styled = list(_styles(inner, plan))
    whole = _held_elsewhere(inner, styled)
    return any(id(p) in whole for _, module, _ in styled for p in module.parameters(recurse=False))


def style_of(model: nn.Module, module: nn.Module, size: int) -> str | None:
    """How `split` cuts the parameters of `module`, a layer or an adapted one; None: they stay whole.

    Raises RecipeError where `size` ranks cannot follow the model's plan.
    """
    inner, plan = planned(model, size)
    styled = list(_styles(inner, plan))
    whole = _held_elsewhere(inner, styled)
    for _, other, style in styled:
        if other in (module, getattr(module, "base_layer", None)):
            return None if any(id(p) in whole for p in other.parameters(recurse=False)) else style
    return None


def _styles(inner: PreTrainedModel, plan: dict[str, str]) -> Iterator[tuple[str, nn.Module, str | None]]:
    """(name, module, its style) of everything that the plan or a parameter in it names; base layers of adapters stand
    for themselves.
    """
    for name, module in inner.named_modules():
        name = name.removesuffix(".base_layer")
        keys = [name, *(f"{name}.{key}" for key, _ in module.named_parameters(recurse=False))]
        if any(replace_layer_number_by_wildcard(key) in plan for key in keys) and not hasattr(module, "lora_A"):
            yield name, module, plan.get(replace_layer_number_by_wildcard(name))


def _held_elsewhere(inner: nn.Module, styled: list[tuple[str, nn.Module, str | None]]) -> set[int]:
    """Ids of parameters of modules without a place in the plan. What is tied to one of them stays whole."""
    planned = {id(module) for _, module, _ in styled}
    others = [module for module in inner.modules() if id(module) not in planned]
    return {id(parameter) for module in others for parameter in module.parameters(recurse=False)}


def _split_adapter(name: str, module: Any, style: str, mesh: DeviceMesh, rank: int) -> None:
    """Cut the factors of the adapter around a base layer of `style`."""
    if len(module.lora_magnitude_vector):
        fix = f"its norms are those of whole rows, which parallel.tensor={mesh.size()} cuts; use false"
        raise RecipeError("adapter.dora", True, fix)
    if style not in FACTORS or hasattr(module, "parameter_name"):  # peft adds that one's update to the whole weight
        fix = (
            f"parallel.tensor={mesh.size()} cuts this layer as {style}, and no adapter can be cut with it; leave it out"
        )
        raise RecipeError("adapter.targets", name, fix)
    for factors, factor_style in zip((module.lora_A, module.lora_B), FACTORS[style], strict=True):
        for factor in factors.values():
            if factor_style is not None:
                for key, _ in list(factor.named_parameters(recurse=False)):
                    ALL_PARALLEL_STYLES[factor_style].shard_param(factor, key, mesh)
                ALL_PARALLEL_STYLES[factor_style].install_forward(factor, mesh)
    if style == "rowwise":  # the adapter's input is cut too, and so is what dropout draws for it
        for key, dropout in module.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[key] = PartDropout(dropout.p, module.in_features, mesh.size(), rank)


class PartDropout(nn.Module):
    """Dropout on a part [.., I/M] of features [.., I] whose other parts stand on other ranks.

    Every rank draws for all of them and takes its own, so ranks that start from the same seed drop what one rank would.
    """

    def __init__(self, p: float, features: int, size: int, rank: int) -> None:
        super().__init__()
        self.p, self.features, self.size, self.rank = p, features, size, rank

    def forward(self, part: Tensor) -> Tensor:
        """Drop elements of `part` and scale the others by 1 / (1 - p)."""
        if not self.training:
            return part
        scale = F.dropout(part.new_ones(*part.shape[:-1], self.features), self.p)
        return part * scale.chunk(self.size, dim=-1)[self.rank]


def _check_heads(inner: PreTrainedModel, plan: dict[str, str], size: int) -> None:
    """Raise RecipeError where attention's projections are cut and ranks would get parts of heads."""
    if not any(style == "colwise" and ("attn" in name or "attention" in name) for name, style in plan.items()):
        return
    config = inner.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % size or groups % size:
        allowed = ", ".join(str(n) for n in range(1, groups + 1) if heads % n == 0 and groups % n == 0)
        raise RecipeError(
            "parallel.tensor",
            size,
            f"each rank takes whole heads, and {type(inner).__name__} has {heads} for queries and {groups} for keys "
            f"and values; use one of {allowed}",
        )


class _SumBackward(torch.autograd.Function):
    """Itself; its gradient is summed over the group."""

    @staticmethod
    def forward(context: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        return value.view_as(value)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, None]:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient, group=context.group)
        return gradient, None


def _sum_gradients(module: nn.Module, group: dist.ProcessGroup) -> None:
    """For a norm of heads: whole on every rank, which sees only its heads.

    transformers 5.23 sums `parameter.grad` after each backward instead, which counts earlier microbatches once more at
    every later one.
    """
    forward = module.forward

    def summed(*args: Any, **kwargs: Any) -> Any:
        own = dict(module._parameters)
        module._parameters.update(
            {key: _SumBackward.apply(value, group) for key, value in own.items() if value is not None}
        )
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(own)

    module.forward = summed
