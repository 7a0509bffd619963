"""Weights in 8 bits, a scale a row: w ≈ q s / 127, with s the row's absmax (for weights only, Dettmers et al. 2022).

N outputs, K inputs
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingot_kernels.dispatch import Impl, jit, tl, triton, uses_triton

LEVELS = 127.0


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> (int8 [N, K], absmax float32 [N])."""
    whole = weight.detach().float()
    scales = whole.abs().amax(1) if whole.shape[1] else whole.new_zeros(whole.shape[0])
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny)
    return (whole * (LEVELS / scales).unsqueeze(1)).round_().to(torch.int8), scales


def dequantize_reference(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition."""
    return (packed.float() * (scales / LEVELS).unsqueeze(1)).to(dtype)


def dequantize(
    packed: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """packed [N, K] and scales [N] of `quantize` -> the weight [N, K] in `dtype`, written to `out` (contiguous) where
    it is given. Products in float32, rounded once.
    """
    found = torch.empty(packed.shape, dtype=dtype, device=packed.device) if out is None else out
    if not found.is_contiguous() or found.dtype != dtype or found.shape != packed.shape:
        raise ValueError(f"out must be contiguous, {dtype} {list(packed.shape)}; it is {found.dtype}")
    if found.numel() == 0:
        return found
    if uses_triton(impl, packed):
        scale_rows(packed.contiguous(), scales / LEVELS, found)
    elif dtype == torch.float32:
        # In place: as one product torch would convert into a float32 copy of its own first.
        found.copy_(packed).mul_((scales / LEVELS).unsqueeze(1))
    else:
        torch.mul(packed.float(), (scales / LEVELS).unsqueeze(1), out=found)
    return found


@jit
def _scale_rows_kernel(packed_ptr, scales_ptr, out_ptr, K, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out = packed x the scale of its row, BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scales_ptr + row)
    packed = tl.load(packed_ptr + row * K + column, mask=column < K, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * K + column, (packed * scale).to(out_ptr.dtype.element_ty), mask=column < K)


def scale_rows(packed: Tensor, scales: Tensor, out: Tensor) -> None:
    """out [N, K] = packed [N, K] x scales [N], by Triton; `packed` int8 or float8, all contiguous."""
    block = min(4096, triton.next_power_of_2(packed.shape[1]))
    grid = (packed.shape[0], triton.cdiv(packed.shape[1], block))
    with torch.cuda.device_of(packed):
        _scale_rows_kernel[grid](packed, scales.contiguous(), out, packed.shape[1], BLOCK=block, num_warps=4)
