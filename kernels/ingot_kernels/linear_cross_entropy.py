"""Cross-entropy of a linear head, without its logits.

    z = softcap(scale * (h Wᵀ + b)),  softcap(u) = c tanh(u / c)
    loss = (1 - s) (lse(z) - z_y) + s (lse(z) - mean_v z_v) + zeta lse(z)²

N hidden states, M of them with a target, H hidden size, V vocabulary, R rank of an adapter on the head. s: label
smoothing (Szegedy et al. 2016), zeta: weight of the z-loss (Chowdhery et al. 2022, section 5).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ingot_kernels.dispatch import Impl

IGNORE = -100
Reduction = Literal["sum", "none"]


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
    where there is no target. `rows_M` (int64): where targets are, found by the caller on the CPU; None: looked for
    here, which on a GPU waits for it.
    """
    return linear_cross_entropy_reference(
        hidden_NH, head, targets_N, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss
    )
