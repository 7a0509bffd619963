"""Weights in 8 bits with a scale a row."""

import pytest
import torch
from truth import poison

from ingot_kernels import fp8, int8

SHAPES = [(7, 13), (1, 1), (64, 172), (2, 4099), (0, 3)]


@pytest.mark.parametrize("kind", [int8, fp8], ids=["int8", "fp8"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_reference(kind, impl, dtype, shape):
    packed, scales = kind.quantize(torch.randn(shape, generator=torch.manual_seed(0)))
    out = torch.full(shape, float("nan"), dtype=dtype)
    found, expected = (
        kind.dequantize(packed, scales, dtype, out, impl=impl),
        kind.dequantize_reference(packed, scales, dtype),
    )
    if impl == "triton" and dtype == torch.bfloat16:  # Triton's interpreter cuts off where a GPU rounds
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [int8, fp8], ids=["int8", "fp8"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strided_parts_and_memory_of_its_own(kind, impl, dtype, monkeypatch):
    packed, scales = kind.quantize(torch.randn(7, 13, generator=torch.manual_seed(0)))
    expected = kind.dequantize_reference(packed, scales, dtype)
    turned, every_other = packed.t().contiguous().t(), torch.stack([scales, scales * 2], 1)[:, 0]
    poison(monkeypatch)
    assert torch.equal(kind.dequantize(turned, every_other, dtype, impl=impl), expected)
    with pytest.raises(ValueError, match="out must be contiguous"):
        kind.dequantize(packed, scales, dtype, torch.empty(13, 7, dtype=dtype).t(), impl=impl)


def test_int8_rounds_each_row_to_half_a_step():
    weight = torch.randn(50, 33, generator=torch.manual_seed(0))
    found = int8.dequantize(*int8.quantize(weight), torch.float32)
    assert ((found - weight).abs() <= 0.501 * weight.abs().amax(1, keepdim=True) / 127).all()


def test_a_row_of_zeros_stays_zero():
    for kind in (int8, fp8):
        assert (kind.dequantize(*kind.quantize(torch.zeros(2, 5)), torch.float32) == 0).all()
