"""Cross-entropy of a chunk of raw logits, and its gradient in their place: the inner loop of `linear_cross_entropy`.

    z = c tanh(k u / c),  loss = lse(z) - (1 - s) z_y - s mean_v z_v + zeta lse(z)²
    dloss/du_v = k (1 - (z_v / c)²) (p_v (1 + 2 zeta lse) - (1 - s) [v = y] - s / V),  p = softmax(z)

C rows, V vocabulary (of this rank, where a group shares it), u raw logits, k scale, c softcap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ingot_kernels.dispatch import Impl, jit, tl, triton, uses_triton
from ingot_kernels.head import accumulator, workspace

IGNORE = -100
# Elements that are worked on at once on a CPU: they stay in its cache (2 Zen 4 cores, 512 rows of 32,000 bfloat16
# logits: 15 ms, and 48 ms with all rows at once).
BLOCK_ELEMENTS = 1 << 20
TRITON_BLOCK = 8192


class Form(NamedTuple):
    """The numbers of the loss; `group` shares the vocabulary among its ranks, in their order."""

    scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    group: torch.distributed.ProcessGroup | None = None

    def shard(self) -> tuple[int, int]:
        """This rank and the number of ranks."""
        if self.group is None:
            return 0, 1
        return torch.distributed.get_rank(self.group), torch.distributed.get_world_size(self.group)


def cross_entropy_(
    raw_CV: Tensor, targets_C: Tensor, form: Form, weights_C: Tensor | None, gradient: bool, impl: Impl
) -> Tensor:
    """Losses [C] (float32) of contiguous `raw_CV`, which then holds the gradient times `weights_C`, or is used up.

    A target that is IGNORE has loss 0 and a gradient of zeros.
    """
    if uses_triton(impl, raw_CV) and raw_CV.dtype != torch.float64:
        return _by_triton(raw_CV, targets_C, form, weights_C, gradient)
    kind, (n_rows, width) = accumulator(raw_CV.dtype), raw_CV.shape
    at_once = n_rows if raw_CV.is_cuda or form.group is not None else max(BLOCK_ELEMENTS // width, 1)
    losses_C = torch.empty(n_rows, dtype=kind, device=raw_CV.device)
    for start in range(0, n_rows, max(at_once, 1)):
        part = slice(start, start + at_once)
        block_BV = raw_CV[part]
        if raw_CV.dtype != kind:
            block_BV = workspace("block", (block_BV.shape[0], width), kind, raw_CV).copy_(block_BV)
        weights_B = None if weights_C is None else weights_C[part]
        losses_C[part] = _block_(block_BV, targets_C[part], form, weights_B, gradient)
        if gradient and raw_CV.dtype != kind:
            raw_CV[part] = block_BV
    return losses_C


def _block_(z_BV: Tensor, targets_B: Tensor, form: Form, weights_B: Tensor | None, gradient: bool) -> Tensor:
    """`cross_entropy_` of a float32 block, overwritten by each step."""
    slope_BV = _cap_(z_BV, form, gradient)
    at_B1, mine_B1 = _places(targets_B, z_BV.shape[1], form)
    true_B = z_BV.gather(1, at_B1).masked_fill_(~mine_B1, 0.0)[:, 0]
    sum_B = z_BV.sum(1) if form.label_smoothing else torch.zeros_like(true_B)
    peak_B = z_BV.amax(1)
    # One fused kernel: torch.logsumexp takes twice its time. The largest probability gives lse; it is at least 1 / V.
    torch.softmax(z_BV, 1, out=z_BV)
    lse_B = peak_B - z_BV.amax(1).log()
    share_B, lse_B, true_B, sum_B = _joined(lse_B, true_B, sum_B, form)
    if gradient:
        weights_B = torch.ones_like(lse_B) if weights_B is None else weights_B.to(lse_B.dtype)
        weights_B = (weights_B * form.scale).masked_fill_(targets_B == IGNORE, 0.0)
        factor_B = weights_B * (1.0 + 2.0 * form.z_loss * lse_B)
        factor_B = factor_B if share_B is None else factor_B * share_B
        if z_BV.is_cuda or not bool((factor_B == 1.0).all()):  # asked on a CPU only: a GPU would have to be waited for
            z_BV.mul_(factor_B[:, None])
        if form.label_smoothing:
            n_classes = z_BV.shape[1] * form.shard()[1]
            z_BV.sub_((weights_B * (form.label_smoothing / n_classes))[:, None])
        z_BV.scatter_add_(1, at_B1, (weights_B * (form.label_smoothing - 1.0))[:, None] * mine_B1)
        if slope_BV is not None:
            z_BV.mul_(slope_BV)
    return _losses(lse_B, true_B, sum_B, targets_B, form, z_BV.shape[1])


def _cap_(z_BV: Tensor, form: Form, gradient: bool) -> Tensor | None:
    """Scale and cap in place; the cap's derivative, where the gradient wants it."""
    if form.scale != 1.0:
        z_BV.mul_(form.scale)
    if form.softcap is None:
        return None
    z_BV.div_(form.softcap).tanh_()
    slope_BV = None
    if gradient:
        slope_BV = workspace("slope", (z_BV.shape[0], z_BV.shape[1]), z_BV.dtype, z_BV)
        torch.mul(z_BV, z_BV, out=slope_BV).neg_().add_(1.0)
    z_BV.mul_(form.softcap)
    return slope_BV


def _places(targets_B: Tensor, width: int, form: Form) -> tuple[Tensor, Tensor]:
    """Columns [B, 1] of the targets, and whether they are on this rank; column 0 for those that are not."""
    mine_B = targets_B != IGNORE
    local_B = targets_B
    if form.group is not None:
        local_B = targets_B - form.shard()[0] * width
        mine_B = mine_B & (local_B >= 0) & (local_B < width)
    return local_B.masked_fill(~mine_B, 0)[:, None], mine_B[:, None]


def _joined(lse_B: Tensor, true_B: Tensor, sum_B: Tensor, form: Form) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """This rank's share of the softmax, and lse, true logit and sum over the vocabulary of all ranks."""
    if form.group is None:
        return None, lse_B, true_B, sum_B
    own_3B = torch.stack((lse_B, true_B, sum_B))
    shares = [torch.empty_like(own_3B) for _ in range(form.shard()[1])]
    torch.distributed.all_gather(shares, own_3B, group=form.group)
    all_W3B = torch.stack(shares)
    whole_B = all_W3B[:, 0].logsumexp(0)
    return (lse_B - whole_B).exp_(), whole_B, all_W3B[:, 1].sum(0), all_W3B[:, 2].sum(0)


def _losses(lse_B: Tensor, true_B: Tensor, sum_B: Tensor, targets_B: Tensor, form: Form, width: int) -> Tensor:
    smoothing = form.label_smoothing
    losses_B = lse_B - true_B
    if smoothing:
        losses_B = losses_B + smoothing * (true_B - sum_B / (width * form.shard()[1]))
    if form.z_loss:
        losses_B = losses_B + form.z_loss * lse_B.square()
    return losses_B.masked_fill(targets_B == IGNORE, 0.0)


@jit
def _capped(u, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    z = u.to(tl.float32) * SCALE
    if SOFTCAP != 0.0:
        z = SOFTCAP * (1.0 - 2.0 / (tl.exp(z * (2.0 / SOFTCAP)) + 1.0))  # tanh: the interpreter has no libdevice
    return z


@jit
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    raw, targets, weights, stats, n_rows, width, first,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, MEAN: tl.constexpr, Z_LOSS: tl.constexpr,
    WEIGHTED: tl.constexpr, MEASURE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row a program. MEASURE: one sweep writes lse, true logit and sum to `stats` [3, C]. GRADIENT: a sweep over the
    row, by then in the cache, puts the gradient in its place; alone, it reads lse. `first`: class of column 0.
    """
    row = tl.program_id(0)
    target = tl.load(targets + row)
    raw += row.to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    ignored = target == -100
    local = tl.where(ignored, -1, target - first)
    if MEASURE:
        peak = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        true = tl.full((), 0.0, tl.float32)
        logits_sum = tl.full((), 0.0, tl.float32)
        for start in range(0, width, BLOCK):
            at = start + columns
            inside = at < width
            z = _capped(tl.load(raw + at, mask=inside, other=0.0), SCALE, SOFTCAP)
            true += tl.sum(tl.where(at == local, z, 0.0))
            if SMOOTHING != 0.0:
                logits_sum += tl.sum(tl.where(inside, z, 0.0))
            z = tl.where(inside, z, float("-inf"))
            higher = tl.maximum(peak, tl.max(z))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(peak - base) + tl.sum(tl.exp(z - base))
            peak = higher
        lse = peak + tl.log(total)
        tl.store(stats + row, lse)
        tl.store(stats + n_rows + row, true)
        tl.store(stats + 2 * n_rows + row, logits_sum)
    else:
        lse = tl.load(stats + row)
    if GRADIENT:
        weight = tl.full((), SCALE, tl.float32)
        if WEIGHTED:
            weight *= tl.load(weights + row)
        for start in range(0, width, BLOCK):
            at = start + columns
            inside = at < width
            z = _capped(tl.load(raw + at, mask=inside, other=0.0), SCALE, SOFTCAP)
            # The true class's p - 1 is formed before it is rounded: in bfloat16 a p near 1 would leave nothing.
            g = tl.exp(z - lse) * (1.0 + 2.0 * Z_LOSS * lse) - MEAN
            g = tl.where(at == local, g - (1.0 - SMOOTHING), g) * weight
            if SOFTCAP != 0.0:
                g *= 1.0 - (z / SOFTCAP) * (z / SOFTCAP)
            g = tl.where(ignored, 0.0, g)
            tl.store(raw + at, g.to(raw.dtype.element_ty), mask=inside)


def _by_triton(raw_CV: Tensor, targets_C: Tensor, form: Form, weights_C: Tensor | None, gradient: bool) -> Tensor:
    (n_rows, width), (rank, world) = raw_CV.shape, form.shard()
    stats_3C = torch.empty(3, n_rows, dtype=torch.float32, device=raw_CV.device)
    if n_rows == 0:
        return stats_3C[0]
    targets_C = targets_C.contiguous()
    weights_C = None if weights_C is None else weights_C.float().contiguous()

    def launch(measure: bool, gradient: bool) -> None:
        # Smaller blocks in the interpreter's tests would leave the loop over blocks untried.
        block = min(TRITON_BLOCK, triton.next_power_of_2(width))
        _cross_entropy_kernel[(n_rows,)](
            raw_CV, targets_C, targets_C if weights_C is None else weights_C, stats_3C, n_rows, width, rank * width,
            SCALE=form.scale, SOFTCAP=form.softcap or 0.0, SMOOTHING=form.label_smoothing,
            MEAN=form.label_smoothing / (width * world), Z_LOSS=form.z_loss, WEIGHTED=weights_C is not None,
            MEASURE=measure, GRADIENT=gradient, BLOCK=block, num_warps=16 if block >= 4096 else 4,
        )  # fmt: skip

    with torch.cuda.device_of(raw_CV):
        launch(True, gradient and form.group is None)
        _, lse_C, true_C, sum_C = _joined(stats_3C[0], stats_3C[1], stats_3C[2], form)
        if gradient and form.group is not None:
            stats_3C[0] = lse_C
            launch(False, True)
    return _losses(lse_C, true_C, sum_C, targets_C, form, width)
