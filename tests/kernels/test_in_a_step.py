"""What a training step does around small operations: recompute, autocast, accumulate, compile; all in one table.

The heads of test_linear_cross_entropy.py and test_linear_kl.py have tests of their own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from truth import check_against_truth, poison

from ingot_kernels.gated import gated_reference, geglu, swiglu
from ingot_kernels.linear_cross_entropy import Head, linear_cross_entropy, linear_cross_entropy_reference
from ingot_kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from ingot_kernels.rope import qk_rope, qk_rope_reference

EPS = 0.1
ANGLES = torch.linspace(0, 3, 2 * 3 * 5).view(2, 3, 5).repeat(1, 1, 2)


def added(x: Tensor, residual: Tensor, weight: Tensor, eps: float, mode: Any) -> tuple[Tensor, Tensor]:
    return rms_norm_reference(x + residual, weight, eps, mode), x + residual


def turned(function: Callable[..., Any], q: Tensor, k: Tensor, *norms: Tensor, **more: Any) -> Any:
    """Ten of the features of each head."""
    cos, sin = ANGLES[:, : q.shape[1]].cos(), ANGLES[:, : q.shape[1]].sin()
    return function(q, k, cos.to(q.dtype), sin.to(q.dtype), norms, EPS, **more)


class Op(NamedTuple):
    """`run` and `reference` of tensors of `shapes`, the first `n_inputs` of which come from layers before."""

    run: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    n_inputs: int


OPS = {
    "rms_norm": Op(partial(rms_norm, eps=EPS), partial(rms_norm_reference, eps=EPS), ((5, 67), (67,)), 1),
    "add_rms_norm": Op(
        partial(add_rms_norm, eps=EPS, mode="llama"),
        partial(added, eps=EPS, mode="llama"),
        ((5, 67), (5, 67), (67,)),
        2,
    ),
    "add_rms_norm gemma": Op(
        partial(add_rms_norm, eps=EPS, mode="gemma"),
        partial(added, eps=EPS, mode="gemma"),
        ((5, 67), (5, 67), (67,)),
        2,
    ),
    "qk_rope": Op(
        partial(turned, qk_rope), partial(turned, qk_rope_reference), ((2, 2, 2, 14), (2, 2, 1, 14), (14,), (14,)), 2
    ),
    "swiglu": Op(swiglu, gated_reference, ((5, 67), (5, 67)), 2),
    "geglu": Op(geglu, partial(gated_reference, act="gelu_tanh"), ((5, 67), (5, 67)), 2),
}
EACH = pytest.mark.parametrize(("name", "impl"), [(name, impl) for name in OPS for impl in ("torch", "triton")])


def leaves_of(op: Op, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(shape, requires_grad=True) for shape in op.shapes]


def listed(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def uneven(like: Tensor) -> Tensor:
    return torch.linspace(-1, 2, like.numel()).view(like.shape)


def loss_of(found: Any) -> Tensor:
    """Outputs weighted unevenly."""
    return torch.stack([(output * uneven(output)).sum() for output in listed(found)]).sum()


@EACH
def test_reads_nothing_that_it_did_not_write(name: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS[name]
    poison(monkeypatch)
    check_against_truth(partial(op.run, impl=impl), op.reference, leaves_of(op))


@EACH
def test_gradients_add_up_and_are_recomputed(name: str, impl: str) -> None:
    op, run = OPS[name], partial(OPS[name].run, impl=impl)
    leaves = leaves_of(op)
    copies = [leaf.detach().clone() for leaf in leaves]
    batches = [leaves, [*leaves_of(op, 1)[: op.n_inputs], *leaves[op.n_inputs :]]]  # of the same weights
    first, second = (torch.autograd.grad(loss_of(run(*batch)), batch) for batch in batches)
    for wrapped in (run, *(partial(checkpoint, run, use_reentrant=reentrant) for reentrant in (False, True))):
        for leaf in leaves:
            leaf.grad = None
        for batch in batches:
            loss_of(wrapped(*batch)).backward()
        for number, leaf in enumerate(leaves):
            expected = first[number] + (second[number] if number >= op.n_inputs else 0)
            torch.testing.assert_close(leaf.grad, expected)
    outputs = listed(run(*leaves))
    upstream = [uneven(output) for output in outputs]
    for _ in range(2):  # twice of what was kept
        found = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
        for gradient, expected in zip(found, first, strict=True):
            torch.testing.assert_close(gradient, expected)
    assert all(torch.equal(one, uneven(one)) for one in upstream), "the gradient of an output was overwritten"
    for leaf, copy in zip(leaves, copies, strict=True):
        assert torch.equal(leaf, copy)


@EACH
def test_autocast_changes_nothing(name: str, impl: str) -> None:
    """There is no product of matrices here, and none may hide in a backward pass that runs inside of it."""
    op, found = OPS[name], []
    for enabled in (False, True):
        leaves = leaves_of(op)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss_of(op.run(*leaves, impl=impl)).backward()
        found.append([leaf.grad for leaf in leaves])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@EACH
def test_activations_of_autocast_beside_weights_in_float32(name: str, impl: str) -> None:
    op = OPS[name]
    tensors = [t.half() if n < op.n_inputs else t for n, t in enumerate(leaves_of(op))]
    check_against_truth(partial(op.run, impl=impl), op.reference, tensors)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_half_of_a_layer_is_added_to_a_float32_residual(impl: Any) -> None:
    op = OPS["add_rms_norm"]
    x, residual, weight = leaves_of(op)
    check_against_truth(partial(op.run, impl=impl), op.reference, [x.half(), residual, weight])


def block(add_norm: Any, norm: Any, rope: Any, silu: Any, gelu: Any, head: Any) -> Callable[..., Tensor]:
    """All operations in a row: x and residual [6, 24] and weights -> a loss."""

    def run(x: Tensor, residual: Tensor, weight: Tensor, q_norm: Tensor, k_norm: Tensor, classes: Tensor) -> Tensor:
        normed, total = add_norm(x, residual, weight, EPS, "gemma")
        heads = normed.view(2, 3, 4, 6)
        cos, sin = (t[..., :4].to(x.dtype) for t in (ANGLES.cos(), ANGLES.sin()))
        turned = rope(heads[:, :, :3], heads[:, :, 3:], cos, sin, (q_norm, k_norm), EPS)
        mixed = torch.cat(turned, 1).transpose(1, 2).reshape(6, 24)
        last = norm(silu(mixed, total) + gelu(total, mixed), weight, EPS)
        found: Tensor = head(last, Head(classes), torch.arange(6), reduction="none")
        return found

    return run


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of what inductor imports
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend: str) -> None:
    shapes = ((6, 24), (6, 24), (24,), (6,), (6,), (17, 24))
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in shapes]
    ours = block(add_rms_norm, rms_norm, qk_rope, swiglu, geglu, linear_cross_entropy)
    plain = block(
        added, rms_norm_reference, qk_rope_reference, gated_reference, OPS["geglu"].reference,
        linear_cross_entropy_reference,
    )  # fmt: skip
    check_against_truth(torch.compile(ours, backend=backend, fullgraph=True), plain, tensors)
    check_against_truth(ours, plain, tensors)
    torch._dynamo.reset()
