"""Linear layers with adapters under torch.compile: one operation, over plain and quantized bases; and FSDP2's ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from truth import check_against_truth

from ingot_kernels import fp8, int8, nf4
from ingot_kernels import lora_linear as module
from ingot_kernels.lora_linear import Adapter, Projection, lora_linear, lora_linear_reference
from ingot_kernels.quantized import Quantized

# M rows, K inputs, N outputs, R rank
M, K, R = 13, 26, 3
OUTPUTS = (11, 5, 23)
KINDS = ["plain", "nf4", "nf4_double", "int8", "fp8"]
FACTORS = (1.7, 0.3)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is imported


@pytest.fixture(autouse=True)
def _anew() -> None:
    torch._dynamo.reset()


def base_of(kind: str, weight: Tensor) -> Any:
    if kind == "plain":
        return weight
    if kind.startswith("nf4"):
        parts = [part for part in nf4.quantize(weight, kind == "nf4_double") if part is not None]
    else:
        parts = list((int8 if kind == "int8" else fp8).quantize(weight))
    return Quantized(kind, (weight.shape[0], weight.shape[1]), parts)


def drawn(n_adapters: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, then A and B of every adapter of each projection."""
    torch.manual_seed(0)
    shapes = [shape for N in OUTPUTS for _ in range(n_adapters) for shape in ((R, K), (N, R))]
    return [torch.randn(M, K, dtype=dtype), *(torch.randn(shape, dtype=dtype) for shape in shapes)]


def of_bases(function: Any, kind: str, n_adapters: int = 2, dropout: float = 0.0) -> Any:
    """`function` of (x, then A and B of every adapter), over three bases that stay as they are."""
    torch.manual_seed(1)
    bases = [base_of(kind, torch.randn(N, K)) for N in OUTPUTS]
    biases = [torch.randn(OUTPUTS[0]), None, torch.randn(OUTPUTS[2])]

    def run(x: Tensor, *tensors: Tensor) -> Any:
        parts = iter(tensors)
        projections = []
        for base, bias in zip(bases, biases, strict=True):
            adapters = tuple(Adapter(next(parts), next(parts), FACTORS[n], dropout) for n in range(n_adapters))
            weight = base.to(x.dtype) if isinstance(base, Tensor) else base
            projections.append(Projection(weight, bias, adapters))
        return function(x, projections)

    return run


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def gradients(function: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Outputs, then the gradient of every tensor."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = list(function(*leaves))
    total = sum((output.float() * torch.linspace(-1, 2, output.shape[-1])).sum() for output in outputs)
    assert isinstance(total, Tensor)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("n_adapters", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_whole_is_eager_and_the_definition(kind: str, n_adapters: int) -> None:
    tensors = drawn(n_adapters)
    eager = of_bases(lora_linear, kind, n_adapters)
    for one, other in zip(gradients(compiled(eager), tensors), gradients(eager, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)
    check_against_truth(compiled(eager), of_bases(lora_linear_reference, kind, n_adapters), tensors)


@pytest.mark.parametrize("kind", ["plain", "nf4_double"])
def test_half_activations_and_float32_adapters(kind: str) -> None:
    x, *adapters = drawn()
    eager = of_bases(lora_linear, kind)
    # Weights that are drawn: with ones all rows of a gradient of B are the same, and so is their rounding.
    upstream = [torch.randn(M, N) for N in OUTPUTS]
    check_against_truth(compiled(eager), of_bases(lora_linear_reference, kind), [x.bfloat16(), *adapters], upstream)

    def autocast(x: Tensor, *tensors: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return eager(x, *tensors)

    for one, other in zip(
        gradients(compiled(autocast), [x, *adapters]), gradients(autocast, [x, *adapters]), strict=True
    ):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)
    assert autocast(x, *adapters)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, K), (1, K), (K,), (2, 7, K)], ids=str)
def test_other_shapes_and_strides(shape: tuple[int, ...]) -> None:
    _, *adapters = drawn()
    run, x = of_bases(lora_linear, "int8"), torch.randn(shape)

    def turned(x: Tensor, *tensors: Tensor) -> Any:
        return run(x.flip(0).t() if x.ndim == 2 else x, *tensors)

    given = x.t().contiguous() if x.ndim == 2 else x
    for one, other in zip(
        gradients(compiled(turned), [given, *adapters]), gradients(turned, [given, *adapters]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_custom_operations_keep_their_word(kind: str) -> None:
    x, a, b, c, d, *_ = drawn(1)
    x = x.t().contiguous().t()  # what is not contiguous comes out contiguous
    bases = [base_of(kind, torch.randn(N, K)) for N in OUTPUTS[:2]]
    parts = [part for base in bases for part in ([base] if isinstance(base, Tensor) else base.tensors)]
    rest = (f"{kind} {kind}", list(OUTPUTS[:2]), [1, 1])
    leaves = [t.clone().requires_grad_() for t in (x, a, b, c, d)]
    torch.library.opcheck(module._linears_op, (leaves[0], parts, leaves[1:], *rest))
    downs, grads = [x @ torch.cat([a, c]).t()], [torch.randn(M, N) for N in OUTPUTS[:2]]
    for needs in ([True] * 5, [False, True, False, False, True]):
        torch.library.opcheck(module._gradients_op, (x, parts, [a, b, c, d], *rest, downs, grads, needs))


def test_output_that_nobody_reads_and_what_needs_no_gradient() -> None:
    x, *adapters = drawn()
    eager = of_bases(lora_linear, "nf4")
    last = adapters[-1].requires_grad_()
    found = []
    for run in (compiled(eager), eager):
        run(x, *adapters)[2].square().sum().backward()
        assert last.grad is not None
        found.append(last.grad)
        last.grad = None
    torch.testing.assert_close(*found)
    assert x.grad is None and all(t.grad is None for t in adapters)
    with torch.no_grad():
        assert not compiled(eager)(x, *adapters)[0].requires_grad


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_no_weight_in_full_size_is_kept(kind: str, dropout: float) -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    tensors = [t.requires_grad_() for t in drawn()]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        compiled(of_bases(lora_linear, kind, dropout=dropout))(*tensors)
    assert kept
    assert not [t.shape for t in kept if t.is_floating_point() and t.numel() in {N * K for N in OUTPUTS}]


def test_dropout_keeps_its_masks_for_the_backward_pass() -> None:
    tensors = drawn(1)
    run = compiled(of_bases(lora_linear, "int8", 1, dropout=0.4))
    zeros = [tensors[0], *(torch.zeros_like(t) if n % 2 else t for n, t in enumerate(tensors[1:]))]
    torch.manual_seed(3)
    found = gradients(run, tensors)
    torch.manual_seed(3)
    bare = gradients(run, zeros)
    grads = found[3:]
    for n, (y, without) in enumerate(zip(found[:3], bare[:3], strict=True)):
        assert not torch.allclose(y, without)
        # Linear in B: what an adapter adds to the sum is the product of B and its gradient.
        share = ((y - without) * torch.linspace(-1, 2, y.shape[-1])).sum()
        torch.testing.assert_close(share, (grads[2 + 2 * n] * tensors[2 + 2 * n]).sum(), rtol=1e-4, atol=1e-3)
    undropped = gradients(compiled(of_bases(lora_linear, "int8", 1)), tensors)
    assert not torch.allclose(undropped[0], found[0])


def test_dora_and_foreign_bases_get_the_definition() -> None:
    x, a, b, *_ = drawn(1)
    weight, magnitude = torch.randn(OUTPUTS[0], K), torch.rand(OUTPUTS[0])

    class Foreign:
        def dequantized(self, dtype: torch.dtype) -> Tensor:
            return weight.to(dtype)

        def parts(self) -> None:
            return None

    foreign: Any = Foreign()
    for base, m in ((weight, magnitude), (foreign, None)):
        one = compiled(
            lambda x, a, b, w=base, m=m: lora_linear(x, [Projection(w, None, (Adapter(a, b, 0.7, 0.0, m),))])
        )
        adapter = lambda a, b, m=m: (Adapter(a, b, 0.7, 0.0, m),)  # noqa: E731
        other = lambda x, a, b, adapter=adapter: lora_linear_reference(x, [Projection(weight, None, adapter(a, b))])  # noqa: E731
        for found, wanted in zip(gradients(one, [x, a, b]), gradients(other, [x, a, b]), strict=True):
            torch.testing.assert_close(found, wanted)


class Layer(nn.Module):
    """A block of an adapted layer, as the engine hands it on."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(R, K)), nn.Parameter(torch.randn(K, R))
        base = base_of(kind, torch.randn(K, K))
        self.kind, parts = kind, [base] if isinstance(base, Tensor) else list(base.tensors)
        self.held = nn.ParameterList([nn.Parameter(part, requires_grad=False) for part in parts])

    def forward(self, x: Tensor) -> Tensor:
        base = self.held[0] if self.kind == "plain" else Quantized(self.kind, (K, K), [*self.held])
        [y] = lora_linear(x, [Projection(base, None, (Adapter(self.a, self.b, 2.0),))])
        return y.tanh()


@pytest.mark.parametrize("kind", ["plain", "nf4_double", "fp8"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_layers_of_a_shape_are_compiled_once(kind: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(Layer(kind) for _ in range(4)))
    x = torch.randn(M, K, requires_grad=True)
    expected = torch.autograd.grad(layers(x).sum(), [x, *(p for p in layers.parameters() if p.requires_grad)])
    for layer in layers:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    counters.clear()
    for rows in (M, 2 * M, 1 + M) if dynamic else (M,):
        layers(torch.randn(rows, K, requires_grad=True)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    found = torch.autograd.grad(layers(x).sum(), [x, *(p for p in layers.parameters() if p.requires_grad)])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# --- ranks


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One launch for all cases of two ranks: case -> the largest difference on rank 0 and 1."""
    folder, here = tmp_path_factory.mktemp("ranks"), Path(__file__).resolve()
    roots = os.pathsep.join(str(here.parents[2] / name) for name in ("engine", "kernels"))
    env = os.environ | {"PYTHONPATH": roots, "OMP_NUM_THREADS": "1"}
    strict = ("-W", "error", "-W", "ignore:The .grad attribute")  # torch's own, where it looks at a block's input
    command = [sys.executable, *strict, str(here.with_name("lora_ranks.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {case: [found[case] for found in seen] for case in seen[0]}


@pytest.mark.parametrize("case", ["plain", "nf4", "int8", "fp8", "plain compiled", "nf4 compiled"])
def test_gradients_under_fsdp2_are_those_of_one_rank(case: str, on_ranks: dict[str, Any]) -> None:
    assert max(on_ranks[case]) < 1e-5
