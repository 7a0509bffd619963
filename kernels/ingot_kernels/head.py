"""A linear head taken by chunks of rows: its logits, which live one chunk at a time, and the gradients of its parts.

A loss of the head says how it grades a chunk (`Grade`); everything else is here, for all of them: products, float32
sums over chunks, and autograd. C rows of a chunk, N hidden states, M of them graded, H hidden size, V vocabulary, R
rank of an adapter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of a chunk: as many as these bytes of logits hold, and no fewer than ROWS. Fewer rows make the products slower
# (2 Zen 4 cores, V 32,000, H 512: 256 rows 151, 512 rows 176, 1,024 rows 189 GFLOP/s in float32), more need memory.
CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}
ROWS = 512
# What a buffer kept between calls may hold. Fresh memory is dear on a CPU: 64 MiB were 29 ms of page faults, a third
# of the product that fills them.
KEPT_BYTES = 128 << 20
_kept = threading.local()

# Grades a chunk: losses [C] (float32) of raw logits [C, V], rows `part` of the M; where a gradient is asked for, it
# takes the logits' place, each row times its weight [C].
Grade = Callable[[Tensor, slice, Tensor | None, bool], Tensor]
# Which of hidden, weight, bias, a, b want a gradient.
Needs = Sequence[bool]


class LowRank(NamedTuple):
    """An adapter: adds factor * (x Aᵀ) Bᵀ. `a` [R, K], `b` [N, R]."""

    a: Tensor
    b: Tensor
    factor: float


class Head(NamedTuple):
    """What turns hidden states into logits: `weight` [V, H], `bias` [V], an adapter; then `scale` and `softcap`."""

    weight: Tensor
    bias: Tensor | None = None
    adapter: LowRank | None = None
    scale: float = 1.0
    softcap: float | None = None


def logits_reference(hidden_NH: Tensor, head: Head) -> Tensor:
    """Float32 logits [N, V] (float64 of float64)."""
    logits_NV = F.linear(hidden_NH, head.weight, head.bias)
    if head.adapter is not None:
        a, b, factor = head.adapter
        logits_NV = logits_NV + (hidden_NH @ a.to(hidden_NH.dtype).t()) @ b.to(hidden_NH.dtype).t() * factor
    logits_NV = (logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()) * head.scale
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


class Parts(NamedTuple):
    """The tensors of a head, in any types: the products are in that of the hidden states."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    factor: float

    def to(self, dtype: torch.dtype) -> Parts:
        weight, bias, a, b = (None if t is None else t.to(dtype) for t in self[:4])
        assert weight is not None
        return Parts(weight, bias, a, b, self.factor)


def parts_of(head: Head) -> Parts:
    a, b, factor = head.adapter if head.adapter is not None else (None, None, 1.0)
    return Parts(head.weight, head.bias, a, b, factor)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """What products of `tensor` are in: the type of autocast where it is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def workspace(name: str, shape: tuple[int, int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Uninitialised memory on the device of `like`: on a CPU one block a name and thread, kept between calls."""
    size = shape[0] * shape[1] * dtype.itemsize
    if like.device.type != "cpu" or type(like) is not Tensor or size > KEPT_BYTES:
        return torch.empty(shape, dtype=dtype, device=like.device)
    block: Tensor | None = getattr(_kept, name, None)
    if block is None or block.numel() < size:
        with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
            block = torch.empty(size, dtype=torch.uint8)
        setattr(_kept, name, block)
    return block[:size].view(dtype).view(shape)


def chunks(n_rows: int, width: int, like: Tensor, chunk_bytes: int | None) -> list[slice]:
    """Slices of `n_rows`, about equal, whose logits [C, width] in the type of `like` fit `chunk_bytes`."""
    row_bytes = max(width * like.element_size(), 1)
    if chunk_bytes is None:
        rows = max(CHUNK_BYTES.get(like.device.type, CHUNK_BYTES["cuda"]) // row_bytes, ROWS)
    else:
        rows = max(chunk_bytes // row_bytes, 1)
    rows = -(-n_rows // max(-(-n_rows // rows), 1))
    return [slice(start, min(start + rows, n_rows)) for start in range(0, n_rows, max(rows, 1))]


def raw_logits(x_CH: Tensor, parts: Parts, out_CV: Tensor) -> Tensor | None:
    """Write h Wᵀ + b and the adapter's share into `out_CV`, without scale and softcap. Return x Aᵀ [C, R]."""
    weight_HV = parts.weight.t()
    if parts.bias is None:
        torch.mm(x_CH, weight_HV, out=out_CV)
    else:
        torch.addmm(parts.bias, x_CH, weight_HV, out=out_CV)
    if parts.a is None or parts.b is None:
        return None
    low_CR = x_CH @ parts.a.t()
    out_CV.addmm_(low_CR, parts.b.t(), alpha=parts.factor)
    return low_CR


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, single: bool) -> Tensor:
    """`total` + left @ right, in float32 where there are several chunks: bfloat16 loses small terms to a large sum."""
    kind = accumulator(left.dtype)
    if total is None:
        if single or kind == left.dtype:
            return left @ right
        total = torch.zeros(left.shape[0], right.shape[1], dtype=kind, device=left.device)
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    if left.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        return torch.addmm(total, left, right, out_dtype=kind, out=total)  # type: ignore[call-overload]
    return total.add_(
        torch.mm(left, right, out=workspace("product", (left.shape[0], right.shape[1]), left.dtype, left))
    )


class _Totals:
    """Gradients of a head's parts, summed over chunks."""

    def __init__(self, parts: Parts, needs: Needs, single: bool) -> None:
        self.parts, self.needs, self.single = parts, needs, single
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.a: Tensor | None = None
        self.b: Tensor | None = None

    def add(self, gradient_CV: Tensor, x_CH: Tensor, low_CR: Tensor | None, out_CH: Tensor | None) -> None:
        """Take in a chunk: `gradient_CV` of its raw logits. `out_CH`: where the gradient of `x_CH` goes."""
        parts, (_, weight, bias, a, b) = self.parts, self.needs
        if out_CH is not None:
            torch.mm(gradient_CV, parts.weight, out=out_CH)
        if weight:
            self.weight = _add_product(self.weight, gradient_CV.t(), x_CH, self.single)
        if bias:
            sums_V = gradient_CV.sum(0, dtype=accumulator(x_CH.dtype))
            self.bias = sums_V if self.bias is None else self.bias.add_(sums_V)
        if parts.a is None or parts.b is None or low_CR is None:
            return
        if b:
            self.b = _add_product(self.b, gradient_CV.t(), low_CR * parts.factor, self.single)
        if out_CH is not None or a:
            above_CR = (gradient_CV @ parts.b).mul_(parts.factor)
            if out_CH is not None:
                out_CH.addmm_(above_CR, parts.a)
            if a:
                self.a = _add_product(self.a, above_CR.t(), x_CH, self.single)

    def finished(self, originals: Parts) -> list[Tensor | None]:
        """In the types of `originals`; zeros where no chunk came by."""
        found: list[Tensor | None] = []
        for total, original, need in zip(
            (self.weight, self.bias, self.a, self.b), originals[:4], self.needs[1:], strict=True
        ):
            if not need or original is None:
                found.append(None)
            else:
                found.append(torch.zeros_like(original) if total is None else total.to(original.dtype))
        return found


class Job(NamedTuple):
    """A loss of a head over rows of hidden states. `rows_M`: which; None: all, in order."""

    grade: Grade
    rows_M: Tensor | None  # noqa: N815
    factor: float
    chunk_bytes: int | None
    group: torch.distributed.ProcessGroup | None = None


def run(
    job: Job, tensors: Sequence[Tensor | None], needs: Needs, weights_M: Tensor | None, gradient: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Losses [M] of hidden [N, H], weight, bias, a and b, and where asked for the gradients of their weighted sum:
    that of hidden states [M, H], then those of the parts.
    """
    hidden_NH, weight, bias, a, b = tensors
    assert hidden_NH is not None and weight is not None
    originals = Parts(weight, bias, a, b, job.factor)
    with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
        parts = originals.to(hidden_NH.dtype)
        n_rows = hidden_NH.shape[0] if job.rows_M is None else job.rows_M.shape[0]
        slices = chunks(n_rows, weight.shape[0], hidden_NH, job.chunk_bytes)
        totals = _Totals(parts, needs, len(slices) == 1)
        losses_M = torch.empty(n_rows, dtype=accumulator(hidden_NH.dtype), device=hidden_NH.device)
        gradient_MH = hidden_NH.new_empty(n_rows, hidden_NH.shape[1]) if gradient and needs[0] else None
        for part in slices:
            x_CH = hidden_NH[part] if job.rows_M is None else hidden_NH.index_select(0, job.rows_M[part])
            logits_CV = workspace("logits", (x_CH.shape[0], weight.shape[0]), x_CH.dtype, x_CH)
            low_CR = raw_logits(x_CH, parts, logits_CV)
            losses_M[part] = job.grade(logits_CV, part, None if weights_M is None else weights_M[part], gradient)
            if gradient:
                totals.add(logits_CV, x_CH, low_CR, None if gradient_MH is None else gradient_MH[part])
        found = totals.finished(originals) if gradient else [None] * 4
        if job.group is not None:  # each rank has the share of its slice of the vocabulary
            for share in (gradient_MH, found[2]):
                if share is not None:
                    torch.distributed.all_reduce(share, group=job.group)
    return losses_M, [gradient_MH, *found]


def spread(values_M: Tensor, rows_M: Tensor | None, n_rows: int) -> Tensor:
    """`values_M` [M, ...] at their rows among `n_rows`, zeros elsewhere."""
    if rows_M is None:
        return values_M
    return values_M.new_zeros(n_rows, *values_M.shape[1:]).index_copy_(0, rows_M, values_M)


def in_forward(needs: Needs, per_row: bool) -> bool:
    """Whether gradients are made beside the losses: known up to a factor, or one a row and only for hidden states."""
    return any(needs) and not (per_row and any(needs[1:]))


class ChunkedHead(torch.autograd.Function):
    """Losses of a head, summed or (`per_row`) one for each of the N.

    Summed: gradients are made in the forward while a chunk's logits are there, 2 products for a frozen head and 3 for
    a trainable one. Per row, they wait for weights: those of hidden states are made per row and weighted later; a
    trainable head computes its logits again (4 products). The backward scales what the forward made and hands it on;
    a second one (retain_graph) makes it anew.
    """

    @staticmethod
    def forward(ctx: Any, job: Job, per_row: bool, needs: Needs, *tensors: Tensor | None) -> Tensor:
        hidden_NH = tensors[0]
        assert hidden_NH is not None
        losses_M, made = run(job, tensors, needs, None, in_forward(needs, per_row))
        ctx.job, ctx.per_row, ctx.needs, ctx.n_rows = job, per_row, needs, hidden_NH.shape[0]
        ctx.made = made if in_forward(needs, per_row) else None
        ctx.save_for_backward(*tensors)
        return spread(losses_M, job.rows_M, ctx.n_rows) if per_row else losses_M.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        rows_M, made = ctx.job.rows_M, ctx.made
        ctx.made = None
        weights_M = upstream if rows_M is None or not ctx.per_row else upstream.index_select(0, rows_M)
        if made is None:
            if not ctx.per_row:
                n_rows = ctx.n_rows if rows_M is None else rows_M.shape[0]
                weights_M = upstream.expand(n_rows)
            _, made = run(ctx.job, ctx.saved_tensors, ctx.needs, weights_M, True)
        else:
            for gradient in made:
                if gradient is not None:
                    gradient.mul_(weights_M[:, None] if ctx.per_row else weights_M)
        if made[0] is not None:
            made[0] = spread(made[0], rows_M, ctx.n_rows)
        return None, None, None, *made


def loss_of(job: Job, per_row: bool, needs: Needs, *tensors: Tensor | None) -> Tensor:
    """`ChunkedHead` of hidden [N, H], weight, bias, a and b. torch.compile leaves it to eager, or fails (fullgraph)."""
    apply: Callable[..., Tensor] = ChunkedHead.apply
    if torch.compiler.is_compiling():
        # It would break up over buffers that calls share and over collectives. The import costs a second, so not above.
        apply = torch.compiler.disable(apply, reason="a head by chunks, shared by a group, is not compiled")
    return apply(job, per_row, needs, *tensors)
