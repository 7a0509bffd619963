"""Weights in float8 (e4m3, Micikevicius et al. 2022) with a scale a row, and products in float8 where a GPU has them.

    y = x Wᵀ,  W ≈ diag(s) Q:   y = (x Qᵀ) diag(s),   dx = (dy diag(s)) Q

A row of x is quantized with a scale of its own at each product. The scales of W belong to the dimension that dx sums
over, where a product cannot apply them; they go into dy before it is quantized. So both products see the very same Q,
which is kept once; dx turns its bytes over (2 bytes of traffic a weight, less than the 3 of turning it back into
bfloat16).

    M rows, N outputs, K inputs
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingot_kernels.dispatch import Impl, jit, tl, triton, uses_triton
from ingot_kernels.int8 import scale_rows

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
TINY = 1e-30


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> (uint8 [N, K], the bytes of float8; scales float32 [N]).

    Bytes: gloo sends no float8, and safetensors of old do not know it.
    """
    packed, scales = quantize_rows_reference(weight.detach())
    return packed.view(torch.uint8), scales


def quantize_rows_reference(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K], times factors [K] -> (float8 [M, K], scales float32 [M]) with the largest of a row at 448."""
    whole = x.float() if factors is None else x.float() * factors
    largest = whole.abs().amax(1) if x.shape[1] else whole.new_zeros(x.shape[0])
    scales = largest.clamp_min(TINY) / LARGEST
    # Clamped: float8 e4m3 has no infinity, and what rounding lifts above 448 would become NaN.
    return (whole / scales.unsqueeze(1)).clamp_(-LARGEST, LARGEST).to(FLOAT8), scales


def quantize_rows(x: Tensor, factors: Tensor | None = None, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """`quantize_rows_reference`; on a GPU in one launch."""
    if not _by_triton(impl, x) or x.numel() == 0:
        return quantize_rows_reference(x, factors)
    x = x.contiguous()
    n_rows, n_columns = x.shape
    packed = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    scales = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _quantize_rows_kernel[(n_rows,)](
            x,
            x if factors is None else factors.contiguous(),
            packed,
            scales,
            n_columns,
            SCALED=factors is not None,
            LARGEST=LARGEST,
            TINY=TINY,
            BLOCK=min(2048, triton.next_power_of_2(n_columns)),
            num_warps=4,
        )
    return packed, scales


@jit
def _quantize_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    factors_ptr,
    out_ptr,
    scales_ptr,
    K,
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its largest value, then its float8; the second reading comes from cache."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * K + column, mask=column < K, other=0.0).to(tl.float32)
        if SCALED:
            x = x * tl.load(factors_ptr + column, mask=column < K, other=0.0)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.maximum(tl.max(largest, axis=0), TINY) / LARGEST
    tl.store(scales_ptr + row, scale)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * K + column, mask=column < K, other=0.0).to(tl.float32)
        if SCALED:
            x = x * tl.load(factors_ptr + column, mask=column < K, other=0.0)
        x = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
        tl.store(out_ptr + row * K + column, x.to(out_ptr.dtype.element_ty), mask=column < K)


def dequantize_reference(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition."""
    return (packed.view(FLOAT8).float() * scales.unsqueeze(1)).to(dtype)


def dequantize(
    packed: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """packed uint8 [N, K] and scales [N] of `quantize` -> the weight [N, K] in `dtype`, written to `out` (contiguous)
    where it is given. Products in float32, rounded once.
    """
    found = torch.empty(packed.shape, dtype=dtype, device=packed.device) if out is None else out
    if not found.is_contiguous() or found.dtype != dtype or found.shape != packed.shape:
        raise ValueError(f"out must be contiguous, {dtype} {list(packed.shape)}; it is {found.dtype}")
    if found.numel() == 0:
        return found
    if _by_triton(impl, packed):
        scale_rows(packed.contiguous().view(FLOAT8), scales, found)
    elif dtype == torch.float32:
        found.copy_(packed.view(FLOAT8)).mul_(scales.unsqueeze(1))
    else:
        torch.mul(packed.view(FLOAT8).float(), scales.unsqueeze(1), out=found)
    return found


def _by_triton(impl: Impl, tensor: Tensor) -> bool:
    """`uses_triton`, but for `auto` torch on GPUs before capability 8.9 (A100): Triton has no float8 e4m3 for them."""
    return uses_triton(impl, tensor) and (impl == "triton" or _capability(tensor) >= (8, 9))


def _capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (0, 0)


def has_products(tensor: Tensor) -> bool:
    """Whether this device multiplies float8 with a scale a row: compute capability 9.0 (Hopper) and later."""
    return _capability(tensor) >= (9, 0)


def fits(packed: Tensor) -> bool:
    """Whether float8 products take this weight: both of its sizes are multiples of 16."""
    return packed.shape[0] % 16 == 0 and packed.shape[1] % 16 == 0


def product(x: Tensor, packed: Tensor, scales: Tensor, *, impl: Impl = "auto") -> Tensor:
    """x [M, K] -> x Wᵀ [M, N] in the type of `x` (bfloat16 on a GPU), with x in float8.

    On a device without float8 products they are simulated: the same rounded operands, multiplied in the type of `x`.
    """
    x8, scale_M = quantize_rows(x, impl=impl)
    if has_products(x):
        return torch._scaled_mm(
            x8,
            packed.view(FLOAT8).t(),
            scale_a=scale_M.unsqueeze(1),
            scale_b=scales.unsqueeze(0),
            out_dtype=torch.bfloat16,
        ).to(x.dtype)
    wide = x8.to(x.dtype) @ packed.view(FLOAT8).to(x.dtype).t()
    return (wide * scale_M.unsqueeze(1).to(x.dtype)).mul_(scales.to(x.dtype))


def transposed_product(grad: Tensor, packed: Tensor, scales: Tensor, *, impl: Impl = "auto") -> Tensor:
    """grad [M, N] -> grad W [M, K] in the type of `grad`, with grad times the scales of W in float8."""
    grad8, scale_M = quantize_rows(grad, scales, impl=impl)
    if has_products(grad):
        bytes_KN = packed.t().contiguous()
        ones = torch.ones((1, packed.shape[1]), dtype=torch.float32, device=grad.device)
        return torch._scaled_mm(
            grad8, bytes_KN.view(FLOAT8).t(), scale_a=scale_M.unsqueeze(1), scale_b=ones, out_dtype=torch.bfloat16
        ).to(grad.dtype)
    wide = grad8.to(grad.dtype) @ packed.view(FLOAT8).to(grad.dtype)
    return wide.mul_(scale_M.unsqueeze(1).to(grad.dtype))
