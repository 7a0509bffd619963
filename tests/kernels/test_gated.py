"""Gated products: every gradient, by torch and by Triton."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
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
@pytest.mark.parametrize("shape", [(13, 67), (2, 3, 5), (1, 1), (0, 7), (2, 1031)], ids=str)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_and_gradients_stay_as_they_are(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: like(*a, **k).fill_(torch.nan))
    gate, up, upstream = drawn((6, 9), (6, 9), (6, 9))
    copies = [t.clone() for t in (gate, up, upstream)]
    gate.requires_grad_()
    up.requires_grad_()
    y = swiglu(gate, up, impl=impl)
    y.backward(upstream, retain_graph=True)
    assert gate.grad is not None
    first = gate.grad.clone()
    y.backward(upstream)
    torch.testing.assert_close(gate.grad, 2 * first)
    for now, before in zip((gate, up, upstream), copies, strict=True):
        assert torch.equal(now, before)
    for reentrant in (False, True):
        gate.grad = None
        checkpoint(lambda g, u: swiglu(g, u, impl=impl), gate, up, use_reentrant=reentrant).backward(upstream)
        torch.testing.assert_close(gate.grad, first)


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


def test_compiled_equals_eager() -> None:
    compiled = torch.compile(swiglu, backend="aot_eager", fullgraph=True)
    check_against_truth(compiled, gated_reference, drawn((9, 33), (9, 33)))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    M, size = 2**31 // 4096 + 3, 4096
    gate = torch.zeros(M, size, device="cuda", dtype=torch.bfloat16)
    gate[-1] = torch.linspace(-4, 4, size, device="cuda")
    torch.testing.assert_close(swiglu(gate, gate)[-1], gated_reference(gate[-1], gate[-1]))
