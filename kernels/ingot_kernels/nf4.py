"""Weights in 4 bits (NF4, Dettmers et al. 2023, section 3), in the layout of bitsandbytes.

Of 64 consecutive weights each is the nearest of 16 values, times the block's absmax; two to a byte, the first in the
upper half. With double quantization the absmax less their mean are 8-bit values, 256 to a scale.

    N outputs, K inputs, n = N·K
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ingot_kernels.codes import dynamic_codes, midpoints
from ingot_kernels.dispatch import Impl, jit, tl, triton, uses_triton

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own
# Quantiles of the normal distribution, to the digits of the paper's appendix E.
CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
TINY = 1e-38
# Bytes turned back at a time: their float32 values (4 MB) stay in the caches of a CPU.
CHUNK = 1 << 19


class Parts(NamedTuple):
    """`packed` uint8 [ceil(n / 2), 1]; `scales` float32, or with the other two uint8, one of each 64; `scale_scales`
    float32 of each 256 scales; `offset` float32 [1].
    """

    packed: Tensor
    scales: Tensor
    scale_scales: Tensor | None = None
    offset: Tensor | None = None


@cache
def _codes(device: torch.device) -> Tensor:
    return torch.tensor(CODES, dtype=torch.float32, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Both values of every byte, as one element [256] that an index fetches at once."""
    codes = _codes(device)
    return torch.stack([codes.repeat_interleave(16), codes.repeat(16)], 1).view(torch.float64).view(-1)


def quantize(weight: Tensor, double: bool = True) -> Parts:
    """weight [N, K] -> its parts.

    The bytes of bitsandbytes on a CPU, and its scales where they are not quantized. Of quantized scales about one in a
    thousand differs: this takes the nearest value, bitsandbytes there the second nearest.
    """
    packed, scales = _quantize_blocks(weight, BLOCK, (_codes(weight.device)[:-1] + _codes(weight.device)[1:]) / 2)
    if packed.numel() % 2:
        packed = torch.nn.functional.pad(packed, (0, 1), value=7)
    packed = ((packed[::2] << 4) | packed[1::2]).unsqueeze(1)
    if not double:
        return Parts(packed, scales)
    offset = scales.mean()
    codes, scale_scales = _quantize_blocks(scales - offset, SCALE_BLOCK, midpoints(True, weight.device))
    return Parts(packed, codes, scale_scales, offset.reshape(1))


def _quantize_blocks(values: Tensor, size: int, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """(nearest code uint8 [n], absmax float32 of each `size`)."""
    flat = values.detach().reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)
    scales = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / scales.clamp_min(TINY)).unsqueeze(1)).clamp_(-1, 1)
    return torch.bucketize(scaled.view(-1)[: flat.numel()], bounds, out_int32=True).to(torch.uint8), scales


def dequantize_reference(
    packed: Tensor,
    scales: Tensor,
    scale_scales: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """The definition."""
    n = math.prod(shape)
    flat = packed.view(-1).int()
    codes = _codes(packed.device)[torch.stack([flat >> 4, flat & 15], 1).view(-1)[:n]]
    absmax = _absmax(scales, scale_scales, offset)
    return (codes * absmax.repeat_interleave(BLOCK)[:n]).to(dtype).view(shape)


def _absmax(scales: Tensor, scale_scales: Tensor | None, offset: Tensor | None) -> Tensor:
    if scale_scales is None:
        return scales
    assert offset is not None
    codes = dynamic_codes(True, scales.device)[scales.int()]
    return codes * scale_scales.repeat_interleave(SCALE_BLOCK)[: codes.numel()] + offset


def dequantize(
    packed: Tensor,
    scales: Tensor,
    scale_scales: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    out: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Parts of `quantize` -> the weight of `shape` in `dtype`, written to `out` (contiguous) where it is given.

    The same bits as bitsandbytes: products in float32, rounded once.
    """
    found = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
    if found.numel() == 0:
        return found
    if not found.is_contiguous() or found.dtype != dtype or tuple(found.shape) != tuple(shape):
        raise ValueError(f"out must be contiguous, {dtype} {list(shape)}; it is {found.dtype} {list(found.shape)}")
    packed = packed.contiguous()
    if uses_triton(impl, packed):
        _dequantize_triton(packed, scales, scale_scales, offset, found)
    else:
        _dequantize_torch(packed.view(-1), _absmax(scales, scale_scales, offset), found.view(-1))
    return found


def _dequantize_torch(packed: Tensor, absmax: Tensor, out: Tensor) -> None:
    """A byte fetches both of its values at once; what is wider than `out` exists for CHUNK bytes at a time."""
    pairs, n = _pairs(packed.device), out.numel()
    direct = out.dtype == torch.float32 and n % BLOCK == 0
    size = min(CHUNK, packed.numel())
    index = torch.empty(size, dtype=torch.int32, device=packed.device)
    wide = out if direct else torch.empty(-(-2 * size // BLOCK) * BLOCK, dtype=torch.float32, device=packed.device)
    for start in range(0, packed.numel(), size):
        part = packed[start : start + size]
        number = index[: part.numel()].copy_(part)
        values = wide[2 * start : 2 * (start + part.numel())] if direct else wide[: 2 * part.numel()]
        torch.index_select(pairs, 0, number, out=values.view(torch.float64))
        scales = absmax[2 * start // BLOCK : -(-2 * (start + part.numel()) // BLOCK)]
        blocks = wide[2 * start :][: values.numel()] if direct else wide[: scales.numel() * BLOCK]
        target = out[2 * start : 2 * (start + part.numel())]
        if direct or target.numel() == blocks.numel():
            torch.mul(blocks.view(-1, BLOCK), scales.unsqueeze(1), out=target.view(-1, BLOCK))
        else:  # the weight ends within a block
            target.copy_(blocks.view(-1, BLOCK).mul_(scales.unsqueeze(1)).view(-1)[: target.numel()])


@jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    packed_ptr,
    codes_ptr,
    scales_ptr,
    scale_codes_ptr,
    scale_scales_ptr,
    offset_ptr,
    out_ptr,
    n,
    n_blocks,
    NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
    HALF: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    """BLOCKS blocks of 2 HALF weights: the scale of a block is made once, in registers."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = block < n_blocks
    if NESTED:
        number = tl.load(scales_ptr + block, mask=is_block, other=0).to(tl.int32)
        wide = tl.load(scale_scales_ptr + block // SCALE_BLOCK, mask=is_block, other=0.0)
        scale = tl.load(scale_codes_ptr + number) * wide + tl.load(offset_ptr)
    else:
        scale = tl.load(scales_ptr + block, mask=is_block, other=0.0)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(packed_ptr + byte, mask=byte < (n + 1) // 2, other=0).to(tl.int32)
    first = tl.load(codes_ptr + (pair >> 4)) * scale[:, None]
    second = tl.load(codes_ptr + (pair & 15)) * scale[:, None]
    place = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_ptr + place, tl.interleave(first, second).to(out_ptr.dtype.element_ty), mask=place < n)


def _dequantize_triton(
    packed: Tensor, scales: Tensor, scale_scales: Tensor | None, offset: Tensor | None, out: Tensor
) -> None:
    n, blocks = out.numel(), 16
    n_blocks = -(-n // BLOCK)
    nested = scale_scales is not None
    grid = (triton.cdiv(n_blocks, blocks),)
    with torch.cuda.device_of(packed):
        # Without fusion the scale is rounded between product and sum, as where another kernel adds.
        _dequantize_kernel[grid](
            packed,
            _codes(packed.device),
            scales.contiguous(),
            dynamic_codes(True, packed.device) if nested else scales,
            scales if scale_scales is None else scale_scales.contiguous(),
            offset if nested else scales,
            out,
            n,
            n_blocks,
            NESTED=nested,
            BLOCKS=blocks,
            HALF=BLOCK // 2,
            SCALE_BLOCK=SCALE_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
