"""Rotary positions with the normalization of heads: every gradient, by torch and by Triton."""

import mmap
from typing import Any

import pytest
import torch
from torch import Tensor
from truth import DEVICES, check_against_truth, half_of

from ingot_kernels import rope as module
from ingot_kernels.rms_norm import Mode
from ingot_kernels.rope import qk_rope, qk_rope_reference

IMPLS = ["torch", "triton"]


def angles(positions_BT: Tensor, turned: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, P] as transformers makes them."""
    angle = positions_BT[..., None].double() * 10.0 ** -(torch.arange(turned // 2, device=positions_BT.device) / 3)
    both = angle.repeat_interleave(2, dim=-1) if interleaved else torch.cat([angle, angle], dim=-1)
    return both.cos().float(), both.sin().float()


def drawn(
    shape: tuple[int, int, int, int, int], turned: int, dtype: torch.dtype, device: str, *, interleaved: bool = False
) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    B, T, G, keys, D = shape
    q, k = torch.randn(B, T, G, D), torch.randn(B, T, keys, D)
    positions = torch.randint(0, 50, (B if B > 1 else 1, T))  # in no order: rows that lie end to end
    cos, sin = (t.to(device) for t in angles(positions, turned, interleaved))
    return [t.to(device, dtype) for t in (q, k)], cos, sin


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [None, "llama", "gemma"])
@pytest.mark.parametrize(
    ("shape", "turned", "interleaved"),
    [
        pytest.param((2, 5, 3, 1, 10), 10, False, id="halves"),
        pytest.param((1, 7, 4, 2, 14), 6, False, id="partial"),
        pytest.param((2, 3, 3, 3, 10), 10, True, id="interleaved"),
        pytest.param((1, 3, 5, 1, 14), 4, True, id="partial, interleaved"),
        pytest.param((1, 0, 2, 1, 4), 4, False, id="no token"),
        pytest.param((1, 1, 1, 1, 2), 2, False, id="one pair"),
    ],
)
def test_is_the_definition(
    shape: Any, turned: int, interleaved: bool, mode: Mode | None, dtype: torch.dtype, impl: Any, device: str
) -> None:
    dtype = half_of(dtype, impl, device)
    (q, k), cos, sin = drawn(shape, turned, dtype, device, interleaved=interleaved)
    weights = [] if mode is None else [torch.randn(shape[-1]).to(device, dtype) for _ in range(2)]

    def run(function: Any, **options: Any) -> Any:
        def call(q: Tensor, k: Tensor, *norms: Tensor) -> Any:
            given = tuple(norms) if norms else None
            cast = (t.to(q.dtype) for t in (cos, sin))
            return function(q, k, *cast, given, 1e-3, mode or "llama", interleaved=interleaved, **options)

        return call

    upstream = [torch.randn(shape[0], heads, shape[1], shape[4]).to(device, dtype) for heads in shape[2:4]]
    check_against_truth(run(qk_rope, impl=impl), run(qk_rope_reference), [q, k, *weights], upstream)


@pytest.mark.parametrize("impl", IMPLS)
def test_projections_that_are_parts_of_one(impl: Any) -> None:
    torch.manual_seed(0)
    both = torch.randn(2, 5, 5 * 6)
    cos, sin = angles(torch.arange(5)[None], 6, False)

    def run(function: Any, **options: Any) -> Any:
        def call(both: Tensor) -> Any:
            q, k = both.unflatten(-1, (5, 6)).split([3, 2], dim=2)
            return function(q, k, cos.to(both.dtype), sin.to(both.dtype), **options)

        return call

    check_against_truth(run(qk_rope, impl=impl), run(qk_rope_reference), [both])


@pytest.mark.parametrize("impl", IMPLS)
def test_float32_angles_keep_the_projections_type(impl: Any) -> None:
    (q, k), cos, sin = drawn((2, 5, 3, 1, 10), 10, torch.bfloat16, "cpu")
    got = qk_rope(q, k, cos, sin, impl=impl)
    exact = qk_rope_reference(q.double(), k.double(), cos.double(), sin.double())
    for one, other in zip(got, exact, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=2e-2)


def test_heads_that_lie_more_than_31_bits_apart() -> None:
    """As in a gradient of a long sequence. Memory is only claimed, twice over: a place cut to 32 bits holds a zero."""
    size, no_reserve = 2**31 + 64, 0x4000
    claimed = mmap.mmap(-1, 2 * 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    q = torch.frombuffer(claimed, dtype=torch.float16)[size:].as_strided((1, 2, 3, 8), (0, 8, 2**30, 1))
    q.copy_(torch.randn(q.shape, generator=torch.manual_seed(0)))
    turned, _ = qk_rope(q, q[:, :, :1], torch.ones(1, 2, 8), torch.zeros(1, 2, 8), impl="triton")
    assert torch.equal(turned.transpose(1, 2), q)


@pytest.mark.parametrize("fault", ["sign", "term", "stale"])
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = module._turn_all

    def wrong(x: Tensor, cos: Tensor, sin: Tensor, weight: Any, options: Any, *, back: bool = False) -> Any:
        if fault == "sign":
            return own(x, cos, sin, weight, options, back=False)
        if fault == "term":
            return own(x, cos, sin * (not back), weight, options, back=back)
        return own(x, cos[:, :1].expand_as(cos), sin, weight, options, back=back)

    monkeypatch.setattr(module, "_turn_all", wrong)
    (q, k), cos, sin = drawn((2, 5, 3, 1, 10), 10, torch.float32, "cpu")
    with pytest.raises(AssertionError, match="from the truth"):
        check_against_truth(
            lambda q, k: qk_rope(q, k, cos.to(q.dtype), sin.to(q.dtype), impl="torch"),
            lambda q, k: qk_rope_reference(q, k, cos.to(q.dtype), sin.to(q.dtype)),
            [q, k],
        )
