"""Rows that lie more than 2^31 elements from the first, and steps that never wait for the GPU: every small operation.

A CPU does the same over few elements, so that these tests are known to run. Heads have such tests of their own.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from truth import DEVICES

from ingot_kernels import fp8, int8, nf4
from ingot_kernels.adamw import AdamW, Moment, Update, adamw
from ingot_kernels.gated import geglu
from ingot_kernels.rms_norm import add_rms_norm
from ingot_kernels.rope import qk_rope

Found = tuple[Tensor, ...]
SIZES = [pytest.param("cpu", 1 << 14, id="small"), pytest.param("cuda", 2**31, marks=pytest.mark.gpu, id="large")]
LAST = 16  # rows that are looked at; of 1024 columns they hold 256 blocks of nf4, which share a scale


def rows(n: int, device: str, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """More than `n` elements in rows of 1024: zeros, and behind all others LAST rows of numbers."""
    found = torch.zeros(n // 1024 + LAST, 1024, dtype=dtype, device=device)
    found[-LAST:] = torch.randn(LAST, 1024, generator=torch.manual_seed(seed)).to(device, dtype)
    return found


def norm(n: int, device: str) -> Callable[[slice], Found]:
    x, residual = rows(n, device, 0), rows(n, device, 1)
    weight = torch.linspace(0.5, 1, 1024, device=device, dtype=x.dtype)

    def run(part: slice) -> Found:
        given, other = (t[part].detach().requires_grad_() for t in (x, residual))
        outputs = add_rms_norm(given, other, weight, 0.1, impl="triton")
        return *outputs, *torch.autograd.grad(outputs, given, (other.detach(), given.detach()))

    return run


def product(n: int, device: str) -> Callable[[slice], Found]:
    gate, up = rows(n, device, 0), rows(n, device, 1)

    def run(part: slice) -> Found:
        given = tuple(t[part].detach().requires_grad_() for t in (gate, up))
        y = geglu(*given, impl="triton")
        return y, *torch.autograd.grad(y, given, given[0].detach())

    return run


def positions(n: int, device: str) -> Callable[[slice], Found]:
    """Heads of a gradient lie a whole sequence apart, the last of four as many as `n`."""
    q, upstream = rows(n * 4 // 3, device, 0).view(-1, 4, 256), rows(n * 4 // 3, device, 1).view(-1, 4, 256)
    angle = torch.linspace(0, 9, len(q) * 8, device=device).view(1, -1, 8)

    def run(part: slice) -> Found:
        given = q[None, part].detach().requires_grad_()
        cos, sin = angle[:, part].cos(), angle[:, part].sin()
        turned, _ = qk_rope(given, given.detach()[:, :, :1], cos, sin, impl="triton")
        [gradient] = torch.autograd.grad(turned, given, upstream[part].transpose(0, 1).contiguous()[None])
        return turned[0].transpose(0, 1), gradient[0]

    return run


def four(n: int, device: str) -> Callable[[slice], Found]:
    """With scales of scales."""
    packed = rows(n // 2, device, 0, torch.float32).abs_().mul_(50).to(torch.uint8).view(-1, 512)
    scales = (torch.arange(len(packed) * 16, device=device) % 251).to(torch.uint8)
    above = torch.linspace(1, 2, -(-len(scales) // 256), device=device)

    def run(part: slice) -> Found:
        start, stop, _ = part.indices(len(packed))
        own = scales[start * 16 : stop * 16], above[start // 16 : stop // 16], above[:1]
        return (nf4.dequantize(packed[part], *own, (stop - start, 1024), torch.float16, impl="triton"),)

    return run


def eight(n: int, device: str) -> Callable[[slice], Found]:
    """Both kinds, and rows that are quantized."""
    x = rows(n, device, 0)
    packed = x.mul(9).to(torch.int8)
    scales = torch.linspace(1, 2, len(x), device=device)

    def run(part: slice) -> Found:
        as_int8 = int8.dequantize(packed[part], scales[part], torch.float16, impl="triton")
        in_float8, found = fp8.quantize_rows(x[part], impl="triton")
        back = fp8.dequantize(in_float8.view(torch.uint8), found, torch.float16, impl="triton")
        return as_int8, in_float8.view(torch.uint8), found, back

    return run


def update(n: int, device: str) -> Callable[[slice], Found]:
    weight, grad = rows(n, device, 0, torch.bfloat16), rows(n, device, 1, torch.bfloat16)

    def run(part: slice) -> Found:
        given, (R, K) = weight[part].clone(), weight[part].shape
        moments = [
            Moment(torch.zeros(R, K, dtype=torch.uint8, device=device), torch.zeros(R, 4, device=device), signed)
            for signed in (True, False)
        ]
        numbers = Update(0.01, (0.9, 0.99), 1e-8, 0.1, 1, key=99, start=part.indices(len(weight))[0] * K)
        adamw(given, grad[part], *moments, numbers, impl="triton")
        return given, *(m.values for m in moments), *(m.scales for m in moments if m.scales is not None)

    return run


@pytest.mark.parametrize(("device", "n"), SIZES)
@pytest.mark.parametrize("make", [norm, product, positions, four, eight, update], ids=lambda make: make.__name__)
def test_last_rows_are_those_of_few(make: Callable[..., Any], device: str, n: int) -> None:
    run = make(n, device)
    many = [t[-LAST:].clone() for t in run(slice(None))]
    few = run(slice(-LAST, None))
    for one, other in zip(many, few, strict=True):
        assert one.any()
        assert torch.equal(one, other)


@pytest.mark.parametrize(("device", "n"), SIZES)
def test_a_vector_of_many_groups(device: str, n: int) -> None:
    """More than the 65,535 programs of a GPU's second dimension."""
    size = n // 64
    vector, grad = torch.ones(size, device=device), torch.ones(size, device=device)
    first, second = (Moment(torch.zeros(size, device=device), None, signed) for signed in (True, False))
    adamw(vector, grad, first, second, Update(0.25, (0.9, 0.99), 0.0, 0.0, 1), impl="triton")
    torch.testing.assert_close(vector, torch.full_like(vector, 0.75))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [norm, product, positions, four, eight, update], ids=lambda make: make.__name__)
def test_waits_for_nothing(make: Callable[..., Any], device: str) -> None:
    run = make(0, device)
    run(slice(None))  # compiled, and tables made, before
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        run(slice(None))
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_steps_of_the_optimizer_wait_for_nothing() -> None:
    parameters = [torch.ones(shape, device="cuda", dtype=torch.bfloat16) for shape in ((64, 96), (8,))]
    optimizer = AdamW(parameters, stochastic=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
