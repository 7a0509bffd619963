"""A frozen weight by its kind and its parts: plain values, which an operation of torch.compile can be given.

M rows, N outputs, K inputs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ingot_kernels import fp8, int8, nf4
from ingot_kernels.head import workspace

# How many parts a kind has, in the order in which its module's `quantize` gives them.
PARTS = {"nf4": 2, "nf4_double": 4, "int8": 2, "fp8": 2}


class Turned(Protocol):
    """A weight in few bits that can be turned back."""

    @property
    def kind(self) -> str:
        """One of PARTS, or nf4 with either number of parts."""
        ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Its parts."""
        ...

    def turned_back(self, like: Tensor) -> Tensor:
        """W [N, K] in the type of `like`, for a product that is made at once: the next weight may take its memory."""
        ...


class Quantized(NamedTuple):
    """W [N, K] in the parts of `nf4`, `int8` or `fp8`; `kind` is one of PARTS. A `lora_linear.Base`."""

    kind: str
    shape: tuple[int, int]
    tensors: Sequence[Tensor]

    def parts(self) -> Quantized:
        """Itself."""
        return self

    def dequantized(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """W [N, K]; in the memory of `out` where it is given."""
        packed, scales, *rest = self.tensors
        if self.kind in ("int8", "fp8"):
            return (int8 if self.kind == "int8" else fp8).dequantize(packed, scales, dtype, out)
        nested, offset = rest or (None, None)
        return nf4.dequantize(packed, scales, nested, offset, self.shape, dtype, out)

    def product(self, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        """x Wᵀ [M, N], added to `out_MN` in place."""
        return product(self, x_MK, out_MN)

    def transposed_product(self, grad_MN: Tensor, out_MK: Tensor | None = None) -> Tensor:
        """grad W [M, K], added to `out_MK` in place."""
        return transposed_product(self, grad_MN, out_MK)

    def turned_back(self, like: Tensor) -> Tensor:
        """W in the type of `like`, for a product that is made at once: on a CPU in memory that is used again."""
        return self.dequantized(like.dtype, workspace("turned", self.shape, like.dtype, like))


def product(base: Turned, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
    """x Wᵀ [M, N], added to `out_MN` in place. fp8: in float8 where the GPU multiplies it."""
    if in_float8(base.kind, base.tensors[0], x_MK):
        y_MN = fp8.product(x_MK, *base.tensors)
        return y_MN if out_MN is None else out_MN.add_(y_MN)
    weight_KN = base.turned_back(x_MK).t()
    return x_MK @ weight_KN if out_MN is None else out_MN.addmm_(x_MK, weight_KN)


def transposed_product(base: Turned, grad_MN: Tensor, out_MK: Tensor | None = None) -> Tensor:
    """grad W [M, K], added to `out_MK` in place. fp8: in float8 where the GPU multiplies it."""
    if in_float8(base.kind, base.tensors[0], grad_MN):
        dx_MK = fp8.transposed_product(grad_MN, *base.tensors)
        return dx_MK if out_MK is None else out_MK.add_(dx_MK)
    weight = base.turned_back(grad_MN)
    return grad_MN @ weight if out_MK is None else out_MK.addmm_(grad_MN, weight)


def in_float8(kind: str, packed: Tensor, like: Tensor) -> bool:
    """Whether products of `like` with a weight of this kind are made in float8."""
    return kind == "fp8" and like.dtype == torch.bfloat16 and fp8.has_products(like) and fp8.fits(packed)
