"""Gated products: every gradient, by torch and by Triton."""

from typing import Any

import pytest
import torch
from torch import Tensor
from truth import DEVICES, check_against_truth, half_of

from ingot_kernels import gated as module
from ingot_kernels.gated import Act, gated, gated_reference, geglu, swiglu

IMPLS = ["torch", "triton"]
ACTS: tuple[Act, ...] = ("silu", "gelu_tanh", "gelu")


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    return [(3 * torch.randn(shape)).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", [(13, 67), (2, 3, 5), (1, 1), (0, 7), (3, 0), (2, 1031)], ids=str)
def test_is_the_definition(shape: tuple[int, ...], act: Act, dtype: torch.dtype, impl: Any, device: str) -> None:
    dtype = half_of(dtype, impl, device)
    check_against_truth(
        lambda g, u: gated(g, u, act, impl=impl),
        lambda g, u: gated_reference(g, u, act),
        drawn(shape, shape, dtype=dtype, device=device),
        drawn(shape, dtype=dtype, device=device),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_halves_of_one_product_and_other_strides(impl: Any) -> None:
    def halves(function: Any) -> Any:
        return lambda both: function(*both.chunk(2, dim=-1))

    both = drawn((3, 5, 14))
    check_against_truth(halves(lambda g, u: swiglu(g, u, impl=impl)), halves(gated_reference), both)
    tanh = lambda g, u: gated_reference(g, u, "gelu_tanh")  # noqa: E731
    check_against_truth(halves(lambda g, u: geglu(g, u, impl=impl)), halves(tanh), both)

    def turned(function: Any) -> Any:
        return lambda g, u: function(g.t(), u.expand(7, 5))

    check_against_truth(turned(lambda g, u: swiglu(g, u, impl=impl)), turned(gated_reference), drawn((5, 7), (1, 5)))


@pytest.mark.parametrize("fault", ["act", "swapped", "stale"])
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = module._activated
    faults = {
        "act": lambda gate, act: own(gate, "gelu"),
        "swapped": lambda gate, act: own(-gate, act),
        "stale": lambda gate, act: own(torch.zeros_like(gate) + gate[:1], act),
    }
    monkeypatch.setattr(module, "_activated", faults[fault])
    with pytest.raises(AssertionError, match="from the truth"):
        check_against_truth(swiglu, gated_reference, drawn((13, 67), (13, 67)))
