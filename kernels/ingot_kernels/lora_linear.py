"""Linear layers with low-rank adapters that share an input (Hu et al. 2021): queries, keys and values; gate and up.

    y = x Wᵀ + b + sum_i f_i (drop_i(x) A_iᵀ) B_iᵀ

    with m (DoRA, Liu et al. 2024, equation 5):  y = b + s (x Wᵀ + f (x Aᵀ) Bᵀ),  s = m / |W + f B A| by row

    and under dropout, as in peft:  y = b + x Wᵀ + (s - 1) drop(x) Wᵀ + s f (drop(x) Aᵀ) Bᵀ

M rows of the activation, K inputs, N outputs, R rank. The base is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ingot_kernels.dispatch import Impl, uses_triton
from ingot_kernels.dropout import again, generator_of, mask_of
from ingot_kernels.quantized import PARTS, Quantized


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

    def parts(self) -> Quantized | None:
        """The same as plain values, for compiled callers. None: there is no such form, and they get the definition."""
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
    Compiled callers get one operation that the compiler does not look into. DoRA gets the definition: the norms need
    W + f B A whole.
    """
    uses_triton(impl, x)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    weighed = any(adapter.magnitude is not None for projection in projections for adapter in projection.adapters)
    with torch.autocast(kind, enabled=False):
        if weighed:
            return lora_linear_reference(x, [_cast(projection, x.dtype) for projection in projections])
        if torch.compiler.is_compiling():
            return _compiled(x, projections)
        tensors = [part for projection in projections for adapter in projection.adapters for part in adapter[:2]]
        outputs: tuple[Tensor, ...] = _Linears.apply(x, tuple(projections), *tensors)
        return outputs


def _cast(projection: Projection, dtype: torch.dtype) -> Projection:
    weight = projection.weight
    return projection._replace(weight=weight.to(dtype)) if isinstance(weight, Tensor) else projection


class _Linears(torch.autograd.Function):
    """All projections of one input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: tuple[Projection, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.projections, ctx.states = projections, []
        outputs, downs = _forward(x, projections, ctx.states)
        ctx.save_for_backward(x, *downs, *tensors)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        n_downs = len(saved) - 2 * sum(len(projection.adapters) for projection in ctx.projections)
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        dx, *found = _backward(x, ctx.projections, saved[:n_downs], saved[n_downs:], grads, needs, ctx.states)
        return dx, None, *found


def _forward(x: Tensor, projections: Sequence[Projection], states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs [..., N], what adapters made of x: `_stacked`'s first, where there is one, then x A^T [M, R] of each
    that drops). Where dropout is drawn its generator's state goes to `states`.

    Each product with a base comes last and is added to what its adapters gave. On a CPU the four orders that add in
    place are alike within the noise, and products added apart were the slowest at every size, by 4 to 20 % in sum
    (benchmarks/results/lora_variants.md). This one keeps no second copy of the weight.
    """
    x_MK = x.reshape(-1, x.shape[-1])
    sharing = [adapter.a for projection in projections for adapter in projection.adapters if not adapter.dropout]
    a_SK, ranks = _stacked(sharing, x.dtype)
    downs = [] if a_SK is None else [x_MK @ a_SK.t()]
    shared, outputs = iter(downs[0].split(ranks, 1) if downs else ()), []
    for projection in projections:
        y_MN: Tensor | None = None
        for adapter in projection.adapters:
            if adapter.dropout:
                states.append(generator_of(x.device).get_state())
                dropped = x_MK * mask_of(x_MK, adapter.dropout, generator_of(x.device))
                downs.append(dropped @ adapter.a.to(x.dtype).t())
            down_MR = downs[-1] if adapter.dropout else next(shared)
            up_RN = (adapter.b * adapter.factor).to(x.dtype).t()
            y_MN = down_MR @ up_RN if y_MN is None else y_MN.addmm_(down_MR, up_RN)
        y_MN = _product(x_MK, projection.weight, y_MN)
        if projection.bias is not None:
            y_MN += projection.bias.to(y_MN.dtype)
        outputs.append(y_MN.view(*x.shape[:-1], y_MN.shape[-1]))
    return outputs, downs


def _stacked(parts: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor | None, list[int]]:
    """(the A's of adapters that drop nothing, one below the other [S, K]; their ranks), or (None, []): x is read once
    for queries, keys and values, and once for their gradients (2 to 10 % of theirs, lora_variants.md).
    """
    if not parts:
        return None, []
    whole = parts[0] if len(parts) == 1 else torch.cat([a_RK.to(dtype) for a_RK in parts])
    return whole.to(dtype), [len(a_RK) for a_RK in parts]


def _backward(
    x: Tensor,
    projections: Sequence[Projection],
    downs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
    needs: Sequence[bool],
    states: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of x and of `tensors`, A and B of every adapter in turn: those that `needs` says, None otherwise."""
    x_MK, grads_MN = x.reshape(-1, x.shape[-1]), [grad.reshape(-1, grad.shape[-1]) for grad in grads]
    pairs = [(g, adapter) for g, one in zip(grads_MN, projections, strict=True) for adapter in one.adapters]
    sharing = [a_RK for a_RK, (_, adapter) in zip(tensors[::2], pairs, strict=True) if not adapter.dropout]
    a_SK, ranks = _stacked(sharing, x.dtype)
    shared, dropping = iter(downs[0].split(ranks, 1) if ranks else ()), iter(downs[1:] if ranks else downs)
    left, found = iter(states), list[Tensor | None]([None] * len(tensors))
    dx_MK: Tensor | None = None
    stacked: list[tuple[int, Tensor]] = []  # place of A among `tensors`, gradient of x A^T [M, R]
    for place, (grad_MN, adapter) in zip(range(0, len(tensors), 2), pairs, strict=True):
        a_RK, b_NR = tensors[place : place + 2]
        grad_MR = grad_MN @ (b_NR * adapter.factor).to(x.dtype)
        down_MR = next(dropping if adapter.dropout else shared)
        if needs[place + 2]:
            found[place + 1] = _summed(grad_MN, down_MR, b_NR.dtype).mul_(adapter.factor)
        if not adapter.dropout:
            stacked.append((place, grad_MR))
            continue
        kept = mask_of(x_MK, adapter.dropout, again(next(left), x.device))
        if needs[place + 1]:
            found[place] = _summed(grad_MR, x_MK * kept, a_RK.dtype)
        if needs[0]:
            part_MK = (grad_MR @ a_RK.to(x.dtype)).mul_(kept)
            dx_MK = part_MK if dx_MK is None else dx_MK.add_(part_MK)
    if a_SK is not None:
        grad_MS = torch.cat([grad_MR for _, grad_MR in stacked], 1)
        if any(needs[place + 1] for place, _ in stacked):
            da_SK = _summed(grad_MS, x_MK, tensors[stacked[0][0]].dtype)
            for (place, _), da_RK in zip(stacked, da_SK.split(ranks), strict=True):
                found[place] = da_RK.to(tensors[place].dtype, copy=True) if needs[place + 1] else None
        if needs[0]:
            dx_MK = grad_MS @ a_SK if dx_MK is None else dx_MK.addmm_(grad_MS, a_SK)
    if needs[0]:
        for grad_MN, projection in zip(grads_MN, projections, strict=True):
            dx_MK = _transposed_product(grad_MN, projection.weight, dx_MK)
    return [None if dx_MK is None else dx_MK.view(x.shape), *found]


def _summed(left_MI: Tensor, right_MJ: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient leftᵀ right [I, J] of an adapter of type `dtype`.

    On a GPU a float32 one gets the float32 sums of half factors as they are. On a CPU torch 2.13 has no such product:
    sums are rounded once to the factors' type. Float32 sums would take float32 copies of the factors, which are
    activations, and four times as long (M and K 2,048, R 16, bfloat16: 0.55 ms, by float32 in pieces of 128 rows 2.5).
    """
    wider = dtype == torch.float32 and left_MI.dtype in (torch.float16, torch.bfloat16)
    if wider and left_MI.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8 and later
        return torch.mm(left_MI.t(), right_MJ, out_dtype=dtype)
    return (left_MI.t() @ right_MJ).to(dtype)


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


# --- for torch.compile: two operations that it does not look into. They take plain values only: parts of the bases, A
# and f B of the adapters. None of them tells layers of one shape apart, so these share a compiled graph.


def _compiled(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """`lora_linear` for a caller that is compiled. Biases are added outside, where they fuse with what comes after.

    Adapters with dropout are the definition's: a mask must be drawn where the compiler sees it, and keeps its seed.
    The base beside them stays the operation's, which keeps no copy of a weight that is turned back.
    """
    bases: list[Tensor] = []
    adapters: list[Tensor] = []
    kinds, sizes, counts = [], [], []
    for projection in projections:
        parts = _parts(projection.weight)
        if parts is None:
            return lora_linear_reference(x, [_cast(projection, x.dtype) for projection in projections])
        inside = [adapter for adapter in projection.adapters if not adapter.dropout]
        bases += parts.tensors
        adapters += [part for adapter in inside for part in (adapter.a, adapter.b * adapter.factor)]
        kinds.append(parts.kind)
        sizes.append(parts.shape[0])
        counts.append(len(inside))
    outputs = _linears_op(x, bases, adapters, " ".join(kinds), sizes, counts)
    return tuple(_finished(x, y, projection) for y, projection in zip(outputs, projections, strict=False))


def _parts(weight: Tensor | Base) -> Quantized | None:
    """A base as plain values; None where it cannot be."""
    return (
        weight.parts()
        if not isinstance(weight, Tensor)
        else Quantized("plain", (weight.shape[0], weight.shape[1]), [weight])
    )


def _finished(x: Tensor, y: Tensor, projection: Projection) -> Tensor:
    """`y` with what the operation leaves out: adapters with dropout, and the bias."""
    for adapter in projection.adapters:
        if adapter.dropout:
            a, b = adapter.a.to(x.dtype), adapter.b.to(x.dtype)
            y = y + F.linear(F.linear(F.dropout(x, adapter.dropout), a), b) * adapter.factor
    return y if projection.bias is None else y + projection.bias.detach().to(y.dtype)


def _rebuilt(
    x: Tensor,
    bases: Sequence[Tensor],
    adapters: Sequence[Tensor],
    kinds: str,
    sizes: Sequence[int],
    counts: Sequence[int],
) -> list[Projection]:
    """What `_compiled` took apart."""
    parts, tensors, projections = iter(bases), iter(adapters), []
    for kind, size, count in zip(kinds.split(), sizes, counts, strict=True):
        weight: Tensor | Base
        if kind == "plain":
            weight = next(parts)
        else:
            weight = Quantized(kind, (size, x.shape[-1]), [next(parts) for _ in range(PARTS[kind])])
        pairs = tuple(Adapter(next(tensors), next(tensors), 1.0) for _ in range(count))
        projections.append(Projection(weight, None, pairs))
    return projections


def _linears(
    x: Tensor, bases: list[Tensor], adapters: list[Tensor], kinds: str, sizes: list[int], counts: list[int]
) -> list[Tensor]:
    """Outputs [..., N], then x with the A's of all adapters [M, S], where there are any."""
    outputs, downs = _forward(x, _rebuilt(x, bases, adapters, kinds, sizes, counts), [])
    return [*outputs, *downs]


def _gradients(
    x: Tensor,
    bases: list[Tensor],
    adapters: list[Tensor],
    kinds: str,
    sizes: list[int],
    counts: list[int],
    downs: list[Tensor],
    grads: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """Of x and of `adapters`: those that are needed."""
    projections = _rebuilt(x, bases, adapters, kinds, sizes, counts)
    made = _backward(x, projections, downs, adapters, grads, needs, [])
    return [gradient for gradient in made if gradient is not None]


_ARGUMENTS = "(Tensor x, Tensor[] bases, Tensor[] adapters, str kinds, SymInt[] sizes, int[] counts"
_linears_op: Any = torch.library.custom_op(
    "ingot_kernels::lora_linear", _linears, mutates_args=(), schema=f"{_ARGUMENTS}) -> Tensor[]"
)
_gradients_op: Any = torch.library.custom_op(
    "ingot_kernels::lora_linear_gradients",
    _gradients,
    mutates_args=(),
    schema=f"{_ARGUMENTS}, Tensor[] downs, Tensor[] grads, bool[] needs) -> Tensor[]",
)


@_linears_op.register_fake
def _(x: Tensor, bases: Any, adapters: list[Tensor], kinds: str, sizes: list[int], counts: Any) -> list[Tensor]:
    rows = x.shape[:-1]
    outputs = [x.new_empty(*rows, size) for size in sizes]
    return outputs + ([x.new_empty(math.prod(rows), sum(a.shape[0] for a in adapters[::2]))] if adapters else [])


@_gradients_op.register_fake
def _(x: Tensor, bases: Any, adapters: list[Tensor], *rest: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip((x, *adapters), rest[-1], strict=True) if need]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, bases, adapters, ctx.kinds, ctx.sizes, ctx.counts = inputs
    ctx.n_bases, ctx.n_adapters = len(bases), len(adapters)
    ctx.set_materialize_grads(False)  # x A^T has none
    ctx.save_for_backward(x, *bases, *adapters, *output[len(ctx.sizes) :])


def _back(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors
    bases, saved = saved[: ctx.n_bases], saved[ctx.n_bases :]
    adapters, downs = saved[: ctx.n_adapters], saved[ctx.n_adapters :]
    upstream = [
        x.new_zeros(*x.shape[:-1], size) if grad is None else grad for size, grad in zip(ctx.sizes, grads, strict=False)
    ]
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2]]
    made = iter(_gradients_op(x, bases, adapters, ctx.kinds, ctx.sizes, ctx.counts, downs, upstream, needs))
    dx, *found = [next(made) if need else None for need in needs]
    return dx, [None] * ctx.n_bases, found, None, None, None


_linears_op.register_autograd(_back, setup_context=_keep)
