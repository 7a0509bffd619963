"""Root-mean-square normalization (Zhang & Sennrich 2019), with the addition to the residual before it.

    n = x / sqrt(mean(x²) + eps);   y = w n (llama), (1 + w) n (gemma), n without a weight

M rows, H features. llama: n is rounded to the type of x before it is multiplied; gemma: after it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ingot_kernels.dispatch import Impl

Mode = Literal["llama", "gemma"]


def rms_norm_reference(x: Tensor, weight_H: Tensor | None, eps: float, mode: Mode = "llama") -> Tensor:
    """The definition."""
    x_32 = x if x.dtype == torch.float64 else x.float()
    normed = x_32 * torch.rsqrt(x_32.square().mean(-1, keepdim=True) + eps)
    if weight_H is None:
        return normed.to(x.dtype)
    if mode == "gemma":
        return (normed * (1 + weight_H.to(normed.dtype))).to(x.dtype)
    return weight_H * normed.to(x.dtype)


def rms_norm(x: Tensor, weight_H: Tensor | None, eps: float, mode: Mode = "llama", *, impl: Impl = "auto") -> Tensor:
    """x [..., H] normalized, in its type."""
    return rms_norm_reference(x, weight_H, eps, mode)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_H: Tensor | None, eps: float, mode: Mode = "llama", *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both [..., H]."""
    total = x + residual
    return rms_norm_reference(total, weight_H, eps, mode), total
