"""Clipping of plain gradients; of parts on several ranks: tests/distributed."""

import math

import pytest
import torch

from ingot.parallel.norm import clip


def gradients() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 5), torch.randn(7), torch.zeros(0)]


@pytest.mark.parametrize("limit", [0.5, 100.0, math.inf])
def test_clips_as_torch_does(limit: float) -> None:
    found, parameters = gradients(), [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients()]
    for parameter, gradient in zip(parameters, gradients(), strict=True):
        parameter.grad = gradient
    expected = torch.nn.utils.clip_grad_norm_(parameters, limit)
    assert clip(found, limit) == pytest.approx(expected.item(), rel=1e-6)
    for gradient, parameter in zip(found, parameters, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad)


def test_nothing_to_clip() -> None:
    assert clip([], 1.0) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_told(bad: float) -> None:
    found = gradients()
    found[0][0, 0] = bad
    assert not math.isfinite(clip(found, 1.0))
