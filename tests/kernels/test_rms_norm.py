"""Normalization, alone and with the residual's addition: every gradient, in both modes, by torch and by Triton."""

from typing import Any

import pytest
import torch
from torch import Tensor
from truth import DEVICES, check_against_truth, half_of

from ingot_kernels import rms_norm as module
from ingot_kernels.rms_norm import Mode, add_rms_norm, rms_norm, rms_norm_reference

EPS = 0.1  # so large that a row of one number does not cancel out
IMPLS = ["torch", "triton"]
SHAPES = [(13, 67), (2, 3, 5), (1, 1), (0, 7), (3, 0), (3, 128)]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that each goes through several rows."""
    monkeypatch.setattr(module, "PROGRAMS", 3)


def added(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, mode: Mode) -> tuple[Tensor, Tensor]:
    return rms_norm_reference(x + residual, weight, eps, mode), x + residual


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["llama", "gemma"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_definition(shape: tuple[int, ...], mode: Mode, dtype: torch.dtype, impl: Any, device: str) -> None:
    dtype = half_of(dtype, impl, device)
    x, residual, weight = drawn(shape, shape, shape[-1:], dtype=dtype, device=device)
    check_against_truth(
        lambda x, w: rms_norm(x, w, EPS, mode, impl=impl), lambda x, w: rms_norm_reference(x, w, EPS, mode), [x, weight]
    )
    check_against_truth(
        lambda x: rms_norm(x, None, EPS, mode, impl=impl), lambda x: rms_norm_reference(x, None, EPS, mode), [x]
    )
    upstream = drawn(shape, shape, dtype=dtype, device=device)
    check_against_truth(
        lambda x, r, w: add_rms_norm(x, r, w, EPS, mode, impl=impl),
        lambda x, r, w: added(x, r, w, EPS, mode),
        [x, residual, weight],
        upstream,
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_and_expanded_inputs(impl: Any) -> None:
    x, weight = drawn((7, 11), (7,))
    check_against_truth(
        lambda x, w: rms_norm(x.t(), w, EPS, impl=impl), lambda x, w: rms_norm_reference(x.t(), w, EPS), [x, weight]
    )
    row, weight = drawn((1, 5), (5,))
    check_against_truth(
        lambda x, w: rms_norm(x.expand(4, 5), w, EPS, impl=impl),
        lambda x, w: rms_norm_reference(x.expand(4, 5), w, EPS),
        [row, weight],
    )


@pytest.mark.parametrize("fault", ["sign", "term", "residual", "stale"])
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, forward = module._backward, module._forward

    def wrong(grad: Tensor, more: Tensor | None, x: Tensor, weight: Any, rstd: Tensor, *rest: Any) -> Any:
        if fault == "residual":
            return own(grad, None, x, weight, rstd, *rest)
        dx, dweight = own(grad, more, x, weight, rstd, *rest)
        if fault == "sign":
            return -dx, dweight
        return (grad * weight * rstd + (0 if more is None else more), dweight) if fault == "term" else (dx, dweight)

    monkeypatch.setattr(module, "_backward", wrong)
    if fault == "stale":
        monkeypatch.setattr(module, "_forward", lambda *a: (forward(*a)[0], torch.ones_like(forward(*a)[1])))
    x, residual, weight = drawn((13, 67), (13, 67), (67,))
    with pytest.raises(AssertionError, match="from the truth"):
        check_against_truth(
            lambda x, r, w: add_rms_norm(x, r, w, EPS, impl="torch"),
            lambda x, r, w: added(x, r, w, EPS, "llama"),
            [x, residual, weight],
            drawn((13, 67), (13, 67)),
        )
