"""Linear layers with low-rank adapters that share an input (Hu et al. 2021): queries, keys and values; gate and up.

    y = x Wᵀ + b + sum_i f_i (drop_i(x) A_iᵀ) B_iᵀ

    with m (DoRA, Liu et al. 2024, equation 5):  y = b + s (x Wᵀ + f (x Aᵀ) Bᵀ),  s = m / |W + f B A| by row

    and under dropout, as in peft:  y = b + x Wᵀ + (s - 1) drop(x) Wᵀ + s f (drop(x) Aᵀ) Bᵀ

M rows of the activation, K inputs, N outputs, R rank. The base is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ingot_kernels.dispatch import Impl, uses_triton


class Base(Protocol):
    """A frozen weight [N, K] that is not a plain tensor: held in few bits."""

    def product(self, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        """x Wᵀ [M, N], added to `out_MN` where it is given."""
        ...

    def transposed_product(self, grad_MN: Tensor, out_MK: Tensor | None = None) -> Tensor:
        """grad W [M, K], added to `out_MK` where it is given."""
        ...

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W [N, K]."""
        ...


class Adapter(NamedTuple):
    """`a` [R, K], `b` [N, R], both float32 or in the type of the activation; `magnitude` [N] for DoRA."""

    a: Tensor
    b: Tensor
    factor: float
    dropout: float = 0.0
    magnitude: Tensor | None = None


class Projection(NamedTuple):
    """One of the layers that share an input. `weight` [N, K] and `bias` [N] get no gradient."""

    weight: Tensor | Base
    bias: Tensor | None = None
    adapters: tuple[Adapter, ...] = ()


def lora_linear_reference(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """The definition, with dropout drawn by torch's generator, adapter after adapter."""
    return tuple(_one(x, projection) for projection in projections)


def _one(x: Tensor, projection: Projection) -> Tensor:
    weight = projection.weight if isinstance(projection.weight, Tensor) else projection.weight.dequantized(x.dtype)
    y = F.linear(x, weight)
    for adapter in projection.adapters:
        a, b = adapter.a.to(x.dtype), adapter.b.to(x.dtype)
        dropped = F.dropout(x, adapter.dropout)
        low = F.linear(F.linear(dropped, a), b) * adapter.factor
        if adapter.magnitude is None:
            y = y + low
            continue
        scale_N = _row_scale(weight, adapter).to(x.dtype)
        of_base = F.linear(dropped, weight) if adapter.dropout else y
        y = y + low * scale_N + of_base * (scale_N - 1)
    return y if projection.bias is None else y + projection.bias.to(x.dtype)


def _row_scale(weight: Tensor, adapter: Adapter) -> Tensor:
    """DoRA's m / |W + f B A| by row [N], with the norm held constant (section 4.3 of the paper)."""
    assert adapter.magnitude is not None
    with torch.no_grad():
        accumulated = torch.promote_types(weight.dtype, torch.float32)
        a, b = adapter.a.to(accumulated), adapter.b.to(accumulated)
        norm_N = torch.addmm(weight.to(accumulated), b, a, alpha=adapter.factor).norm(dim=1)
    return adapter.magnitude / norm_N


def lora_linear(x: Tensor, projections: Sequence[Projection], *, impl: Impl = "auto") -> tuple[Tensor, ...]:
    """x [..., K] through every projection: [..., N] each, in the type of `x`, or of autocast. Dropout is drawn in
    training only: pass 0 otherwise. Saved for the backward pass are x and x A^T.

    `impl` chooses nothing here: all of it is products, and libraries' are as fast as Triton's are at these sizes.
    DoRA and compiled callers get the definition: the norms need W + f B A whole, and a compiler fuses by itself.
    """
    uses_triton(impl, x)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    weighed = any(adapter.magnitude is not None for projection in projections for adapter in projection.adapters)
    with torch.autocast(kind, enabled=False):
        if weighed or torch.compiler.is_compiling():
            return lora_linear_reference(x, [_cast(projection, x.dtype) for projection in projections])
        tensors = [part for projection in projections for adapter in projection.adapters for part in adapter[:2]]
        outputs: tuple[Tensor, ...] = _Linears.apply(x, tuple(projections), *tensors)
        return outputs


def _cast(projection: Projection, dtype: torch.dtype) -> Projection:
    weight = projection.weight
    return projection._replace(weight=weight.to(dtype)) if isinstance(weight, Tensor) else projection


class _Linears(torch.autograd.Function):
    """All projections of one input. Each product with a base comes last and is added to what its adapters gave.

    On a CPU the four orders that add in place are alike within the noise, and products added apart were the slowest at
    every size, by 3 to 5 % in sum (benchmarks/results/lora_variants.md). This one keeps no second copy of the weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: tuple[Projection, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        x_MK = x.reshape(-1, x.shape[-1])
        ctx.projections, ctx.shape, ctx.states = projections, x.shape, []
        downs: list[Tensor] = []  # x A^T [M, R] of every adapter
        outputs = []
        for projection in projections:
            y_MN = None
            for adapter in projection.adapters:
                dropped = x_MK
                if adapter.dropout:
                    ctx.states.append(_generator(x.device).get_state())
                    dropped = x_MK * _kept(x_MK, adapter.dropout, _generator(x.device))
                downs.append(dropped @ adapter.a.to(x.dtype).t())
                up_RN = (adapter.b * adapter.factor).to(x.dtype).t()
                y_MN = downs[-1] @ up_RN if y_MN is None else y_MN.addmm_(downs[-1], up_RN)
            y_MN = _product(x_MK, projection.weight, y_MN)
            if projection.bias is not None:
                y_MN += projection.bias.to(y_MN.dtype)
            outputs.append(y_MN.view(*x.shape[:-1], y_MN.shape[-1]))
        ctx.save_for_backward(x, *downs, *tensors)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        n_adapters = len(saved) // 3
        downs, tensors = saved[:n_adapters], saved[n_adapters:]
        x_MK = x.reshape(-1, ctx.shape[-1])
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        states, found, number = iter(ctx.states), [], 0
        dx_MK: Tensor | None = None
        for projection, grad in zip(ctx.projections, grads, strict=True):
            grad_MN = grad.reshape(-1, grad.shape[-1])
            for adapter in projection.adapters:
                a_RK, b_NR = tensors[2 * number], tensors[2 * number + 1]
                grad_MR = grad_MN @ (b_NR * adapter.factor).to(x.dtype)
                kept = _kept(x_MK, adapter.dropout, _again(next(states), x.device)) if adapter.dropout else None
                input_MK = x_MK if kept is None else x_MK * kept
                found.append((grad_MR.t() @ input_MK).to(a_RK.dtype) if needs[2 * number] else None)
                db_NR = grad_MN.t() @ downs[number] if needs[2 * number + 1] else None
                found.append(None if db_NR is None else db_NR.to(b_NR.dtype).mul_(adapter.factor))
                if needs_x:
                    dx_MK = _added(dx_MK, grad_MR, a_RK.to(x.dtype), kept)
                number += 1
            if needs_x:
                dx_MK = _transposed_product(grad_MN, projection.weight, dx_MK)
        dx = None if dx_MK is None else dx_MK.view(ctx.shape)
        return dx, None, *found


def _product(x_MK: Tensor, weight: Tensor | Base, y_MN: Tensor | None) -> Tensor:
    """x W^T, added to `y_MN` in place."""
    if not isinstance(weight, Tensor):
        return weight.product(x_MK, y_MN)
    weight_KN = weight.to(x_MK.dtype).t()
    return x_MK @ weight_KN if y_MN is None else y_MN.addmm_(x_MK, weight_KN)


def _transposed_product(grad_MN: Tensor, weight: Tensor | Base, dx_MK: Tensor | None) -> Tensor:
    """grad W, added to `dx_MK` in place."""
    if not isinstance(weight, Tensor):
        return weight.transposed_product(grad_MN, dx_MK)
    weight = weight.to(grad_MN.dtype)
    return grad_MN @ weight if dx_MK is None else dx_MK.addmm_(grad_MN, weight)


def _added(dx_MK: Tensor | None, grad_MR: Tensor, a_RK: Tensor, kept: Tensor | None) -> Tensor:
    """An adapter's part of the gradient of x, added to `dx_MK` in place."""
    if kept is not None:
        part_MK = (grad_MR @ a_RK).mul_(kept)
        return part_MK if dx_MK is None else dx_MK.add_(part_MK)
    return grad_MR @ a_RK if dx_MK is None else dx_MK.addmm_(grad_MR, a_RK)


def _generator(device: torch.device) -> torch.Generator:
    """The one that torch draws from on this device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    return torch.default_generator


def _again(state: Tensor, device: torch.device) -> torch.Generator:
    """A generator that draws once more what was drawn: a mask is not kept, but its seed is."""
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


def _kept(x_MK: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """1 / (1 - p) where an element stays, 0 where it is dropped, with probability p [M, K]."""
    return torch.empty_like(x_MK).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
