"""The criterion of every kernel: its error against a float64 truth, beside that of plain torch in the same type."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ingot_kernels import cross_entropy, head

Function = Callable[..., Any]
# Devices that kernels run on: the CPU by Triton's interpreter (tests/conftest.py switches it on), and a GPU.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
K_OUTPUT, K_GRADIENT = 3.0, 2.0


def half_of(dtype: torch.dtype, impl: str, device: str) -> torch.dtype:
    """`dtype`, or float16 in the place of bfloat16 for the interpreter, which cuts off bits where a GPU rounds."""
    return torch.float16 if dtype == torch.bfloat16 and impl == "triton" and device == "cpu" else dtype


# Below this share of the truth's size both are exact: differences of one rounding.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


def results(function: Function, tensors: Sequence[Tensor], upstream: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Outputs of `function(*tensors)` and the gradient of each floating tensor, for outputs weighted by `upstream`."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    found = function(*leaves)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    weights = upstream or [torch.ones_like(output) for output in outputs]
    total = sum((o.double() * w.double()).sum() for o, w in zip(outputs, weights, strict=True))
    assert isinstance(total, Tensor)
    total.backward()
    gradients = [
        torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves if leaf.is_floating_point()
    ]
    return [output.detach() for output in outputs] + gradients


def check_against_truth(
    kernel: Function, reference: Function, tensors: Sequence[Tensor], upstream: Sequence[Tensor] | None = None
) -> None:
    """Assert that outputs and all gradients of `kernel` are as near to the float64 truth as those of `reference` in
    the tensors' own type, times K_OUTPUT and K_GRADIENT.
    """
    exact = [t.double() if t.is_floating_point() else t for t in tensors]
    # Both are asked in this order, so that `kernel` cannot read what `reference` left in memory that it did not write.
    ours = results(kernel, tensors, upstream)
    truth = results(reference, exact, None if upstream is None else [u.double() for u in upstream])
    plain = results(reference, tensors, upstream)
    n_outputs = len(truth) - sum(t.is_floating_point() for t in tensors)
    for number, (own, true, other) in enumerate(zip(ours, truth, plain, strict=True)):
        assert own.shape == true.shape and own.dtype == other.dtype, f"result {number}: {own.dtype} {own.shape}"
        if own.numel() == 0:
            continue
        size, factor = true.abs().max().item(), K_OUTPUT if number < n_outputs else K_GRADIENT
        error, allowed = ((part.double() - true).abs().max().item() for part in (own, other))
        limit = factor * allowed + ROUNDING[own.dtype] * size
        assert error <= limit, f"result {number} is {error:.3g} from the truth (size {size:.3g}), torch {allowed:.3g}"


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let uninitialised memory hold NaN, or the largest integer, and keep no buffers between calls."""

    def filled(function: Function) -> Function:
        def make(*a: Any, **k: Any) -> Tensor:
            made: Tensor = function(*a, **k)
            return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).max)

        return make

    own = head.workspace
    for place, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(place, name, filled(getattr(place, name)))
    for place in (head, cross_entropy):
        monkeypatch.setattr(place, "workspace", filled(own))
