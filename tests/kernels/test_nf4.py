"""Weights in 4 bits: the bits of bitsandbytes, by plain torch and by Triton."""

import bitsandbytes.functional as bnb
import pytest
import torch
from truth import poison

from ingot_kernels import nf4
from ingot_kernels.codes import dynamic_codes

SHAPES = [(64, 172), (50, 33), (256, 256), (1, 7), (1, 1), (3, 64)]


def theirs(shape, double):
    weight = torch.randn(shape, generator=torch.manual_seed(0)) * 0.02
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    nested = (state.state2.absmax, state.offset.reshape(1)) if double else (None, None)
    return weight, state, (packed, state.absmax, *nested)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_8_bits_are_those_of_bitsandbytes(signed):
    assert torch.equal(dynamic_codes(signed, torch.device("cpu")), bnb.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantizes_to_the_bits_of_bitsandbytes(shape, double, impl, dtype):
    _, state, parts = theirs(shape, double)
    state.dtype = dtype
    out = torch.full(shape, float("nan"), dtype=dtype)
    found = nf4.dequantize(*parts, shape, dtype, out, impl=impl)
    assert found is out
    expected = bnb.dequantize_4bit(parts[0], state).view(shape)
    if impl == "triton" and dtype == torch.bfloat16:  # Triton's interpreter cuts off where a GPU rounds
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("double", [True, False])
def test_strided_parts_and_memory_of_its_own(impl, double, monkeypatch):
    """In portions of few bytes, as a large weight is."""
    weight = torch.randn(50, 33, generator=torch.manual_seed(0))
    parts = nf4.quantize(weight.t().contiguous().t(), double)
    assert all(torch.equal(a, b) for a, b in zip(parts, nf4.quantize(weight, double), strict=True) if a is not None)
    strided = [t if t is None else torch.stack([t, t + 1], 1)[:, 0] for t in parts]
    monkeypatch.setattr(nf4, "CHUNK", 64)
    poison(monkeypatch)
    for dtype in (torch.float32, torch.float16):
        expected = nf4.dequantize_reference(*parts, (50, 33), dtype)
        assert torch.equal(nf4.dequantize(*strided, (50, 33), dtype, impl=impl), expected)
    with pytest.raises(ValueError, match="out must be contiguous"):
        nf4.dequantize(*parts, (50, 33), torch.float32, torch.empty(33, 50).t(), impl=impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_weight_without_elements(impl):
    parts = nf4.quantize(torch.empty(0, 3))
    assert nf4.dequantize(*parts, (0, 3), torch.bfloat16, impl=impl).shape == (0, 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_quantizes_to_the_bits_of_bitsandbytes_where_scales_are_not_quantized(shape):
    weight, state, parts = theirs(shape, double=False)
    found = nf4.quantize(weight, double=False)
    assert torch.equal(found.packed, parts[0])
    assert torch.equal(found.scales, state.absmax)


def test_quantized_scales_are_never_farther_than_those_of_bitsandbytes():
    """Its CPU code takes the second nearest value for about one scale in a thousand."""
    weight, _, parts = theirs((256, 1024), double=True)
    found, plain = nf4.quantize(weight), nf4.quantize(weight, double=False).scales
    wide = (plain - found.offset) / found.scale_scales.repeat_interleave(256)[: plain.numel()]
    codes = dynamic_codes(True, torch.device("cpu"))
    ours, other = ((codes[part.int()] - wide).abs() for part in (found.scales, parts[1]))
    assert torch.equal(found.packed, parts[0])
    assert (ours - other).max() < 1e-7
    assert (found.scales != parts[1]).float().mean() < 0.005


def test_a_fault_is_seen(monkeypatch):
    """One wrong value of the code-book, or a scale of a neighbouring block."""
    _, state, parts = theirs((64, 172), double=False)
    expected = bnb.dequantize_4bit(parts[0], state).view(64, 172)
    shifted = (parts[0], parts[1].roll(1), None, None)
    assert not torch.equal(nf4.dequantize(*shifted, (64, 172), torch.float32), expected)
    wrong = nf4._pairs(torch.device("cpu")).clone()
    wrong[0x12] = wrong[0x21]
    monkeypatch.setattr(nf4, "_pairs", lambda device: wrong)
    assert not torch.equal(nf4.dequantize(*parts, (64, 172), torch.float32), expected)
