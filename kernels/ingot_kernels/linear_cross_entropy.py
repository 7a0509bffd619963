"""Cross-entropy of a linear head, without its logits.

    z = softcap(scale * (h Wᵀ + b)),  softcap(u) = c tanh(u / c)
    loss = (1 - s) (lse(z) - z_y) + s (lse(z) - mean_v z_v) + zeta lse(z)²

N hidden states, M of them with a target, H hidden size, V vocabulary, R rank of an adapter on the head. s: label
smoothing (Szegedy et al. 2016), zeta: weight of the z-loss (Chowdhery et al. 2022, section 5).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ingot_kernels.cross_entropy import IGNORE as IGNORE
from ingot_kernels.cross_entropy import Form, cross_entropy_
from ingot_kernels.dispatch import Impl, uses_triton
from ingot_kernels.head import Head as Head
from ingot_kernels.head import Job, autocast_dtype, loss_of, parts_of, run, spread
from ingot_kernels.head import LowRank as LowRank
from ingot_kernels.head import logits_reference as logits_reference

Reduction = Literal["sum", "none"]


def linear_cross_entropy_reference(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    *,
    reduction: Reduction = "sum",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The definition: all logits at once."""
    logits_NV = logits_reference(hidden_NH, head)
    losses_N = F.cross_entropy(
        logits_NV, targets_N, ignore_index=IGNORE, reduction="none", label_smoothing=label_smoothing
    )
    if z_loss:
        losses_N = losses_N + z_loss * logits_NV.logsumexp(1).square() * (targets_N != IGNORE)
    return losses_N.sum() if reduction == "sum" else losses_N


def linear_cross_entropy(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    *,
    rows_M: Tensor | None = None,
    reduction: Reduction = "sum",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    group: torch.distributed.ProcessGroup | None = None,
    chunk_bytes: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Cross-entropy of `targets_N` (int64, IGNORE where there is none) under `head`: float32, summed, or [N] with 0
    where there is no target.

    `rows_M` (int64): where targets are, found by the caller on the CPU, so that others never go through the head. None:
    looked for here on a CPU; on a GPU, which would have to be waited for, all rows go through. `group`: its ranks hold
    slices of the vocabulary of one size, in their order; `targets_N` are classes of the whole, and the gradient of
    `hidden_NH` is summed over ranks. `chunk_bytes`: most memory that logits take; None: as `head.chunks` finds best.

    Products run in the type of autocast, else of `hidden_NH`; gradients of the head are summed in float32.

    Under torch.compile a `group` breaks the graph: ranks that share a vocabulary run eagerly.
    """
    uses_triton(impl, hidden_NH)
    hidden_NH = hidden_NH.to(autocast_dtype(hidden_NH))
    if rows_M is None and not hidden_NH.is_cuda and not torch.compiler.is_compiling():
        rows_M = (targets_N != IGNORE).nonzero().squeeze(1)
    targets_M = targets_N if rows_M is None else targets_N.index_select(0, rows_M)
    parts = parts_of(head)
    form = Form(head.scale, head.softcap, label_smoothing, z_loss, group)
    if torch.compiler.is_compiling() and group is None:
        numbers = [head.scale, head.softcap or 0.0, label_smoothing, z_loss, parts.factor]
        losses_M = _losses_op(hidden_NH, *parts[:4], targets_M, rows_M, numbers, chunk_bytes or 0, impl)
        return losses_M.sum() if reduction == "sum" else spread(losses_M, rows_M, hidden_NH.shape[0])

    def grade(logits_CV: Tensor, part: slice, weights_C: Tensor | None, gradient: bool) -> Tensor:
        return cross_entropy_(logits_CV, targets_M[part], form, weights_C, gradient, impl)

    tensors = (hidden_NH, *parts[:4])
    needs = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors]
    job = Job(grade, rows_M, parts.factor, chunk_bytes, group)
    return loss_of(job, reduction == "none", needs, *tensors)


def linear_logprobs(hidden_NH: Tensor, head: Head, targets_N: Tensor, **options: Any) -> Tensor:
    """Log-probabilities of `targets_N`: float32 [N], 0 where there is none. Options as of `linear_cross_entropy`."""
    return -linear_cross_entropy(hidden_NH, head, targets_N, reduction="none", **options)


# --- for torch.compile: two operations that it does not look into. The gradient's makes the logits once more.


def _job(targets_M: Tensor, rows_M: Tensor | None, numbers: list[float], chunk_bytes: int, impl: str) -> Job:
    scale, softcap, label_smoothing, z_loss, factor = numbers
    form = Form(scale, softcap or None, label_smoothing, z_loss)

    def grade(logits_CV: Tensor, part: slice, weights_C: Tensor | None, gradient: bool) -> Tensor:
        return cross_entropy_(logits_CV, targets_M[part], form, weights_C, gradient, impl)  # type: ignore[arg-type]

    return Job(grade, rows_M, factor, chunk_bytes or None)


_ARGUMENTS = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, Tensor targets, Tensor? rows, float[] numbers,"
    " int chunk_bytes, str impl"
)


def _losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    numbers: list[float],
    chunk_bytes: int,
    impl: str,
) -> Tensor:
    """Losses [M]."""
    job = _job(targets, rows, numbers, chunk_bytes, impl)
    return run(job, (hidden, weight, bias, a, b), [False] * 5, None, False)[0]


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    numbers: list[float],
    chunk_bytes: int,
    impl: str,
    weights: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Of hidden, weight, bias, a and b, for losses weighted by `weights` [M]: those that are needed."""
    job = _job(targets, rows, numbers, chunk_bytes, impl)
    _, made = run(job, (hidden, weight, bias, a, b), needs, weights, True)
    if made[0] is not None:
        made[0] = spread(made[0], rows, hidden.shape[0])
    return [gradient.clone() for gradient in made if gradient is not None]


_losses_op: Any = torch.library.custom_op(
    "ingot_kernels::linear_cross_entropy", _losses, mutates_args=(), schema=f"{_ARGUMENTS}) -> Tensor"
)
_gradients_op: Any = torch.library.custom_op(
    "ingot_kernels::linear_cross_entropy_gradients",
    _gradients,
    mutates_args=(),
    schema=f"{_ARGUMENTS}, Tensor weights, bool[] needs) -> Tensor[]",
)


@_losses_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, a: Any, b: Any, targets: Tensor, *rest: Any) -> Tensor:
    return hidden.new_empty(targets.shape, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)


@_gradients_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, a: Any, b: Any, *rest: Any) -> list[Tensor]:
    inputs = (hidden, weight, bias, a, b)
    return [torch.empty_like(t) for t, need in zip(inputs, rest[-1], strict=True) if need and t is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.numbers, ctx.chunk_bytes, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _back(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:5])
    made = iter(_gradients_op(*ctx.saved_tensors, ctx.numbers, ctx.chunk_bytes, ctx.impl, upstream, needs))
    return (*(next(made) if need else None for need in needs), None, None, None, None, None)


_losses_op.register_autograd(_back, setup_context=_keep)
