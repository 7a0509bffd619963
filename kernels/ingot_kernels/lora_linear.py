"""Linear layers with low-rank adapters that share an input (Hu et al. 2021): queries, keys and values; gate and up.

    y = x Wᵀ + b + sum_i f_i (drop_i(x) A_iᵀ) B_iᵀ

    with m (DoRA, Liu et al. 2024, equation 5):  y = b + m / |W + f B A|_row * (x Wᵀ + f (drop(x) Aᵀ) Bᵀ)

M rows of the activation, K inputs, N outputs, R rank. The base is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ingot_kernels.dispatch import Impl


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
        y = y + F.linear(F.linear(F.dropout(x, adapter.dropout), a), b) * adapter.factor
        if adapter.magnitude is not None:
            norm_N = (weight.float() + adapter.factor * (adapter.b.float() @ adapter.a.float())).norm(dim=1).detach()
            y = y * (adapter.magnitude / norm_N).to(x.dtype)
    return y if projection.bias is None else y + projection.bias.to(x.dtype)


def lora_linear(x: Tensor, projections: Sequence[Projection], *, impl: Impl = "auto") -> tuple[Tensor, ...]:
    """x [..., K] through every projection: [..., N] each, in the type of `x`. Dropout is drawn in training only: pass
    0 otherwise. Saved for the backward pass are x and x Aᵀ.
    """
    return lora_linear_reference(x, projections)
