"""Linear layers with adapters: outputs and every gradient, beside the definition and beside peft."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from truth import DEVICES, check_against_truth, results

from ingot_kernels import fp8, int8, nf4, quantized
from ingot_kernels import lora_linear as module
from ingot_kernels.lora_linear import Adapter, Projection, lora_linear, lora_linear_reference
from ingot_kernels.quantized import Quantized

# M rows, K inputs, N outputs, R rank
FACTOR = 1.7


def adapted(function: Callable[..., Any], weights: list[Tensor], biases: list[Tensor | None], n_adapters: int) -> Any:
    """(x, then A and B of every adapter) -> outputs of all projections."""

    def run(x: Tensor, *tensors: Tensor) -> Any:
        parts = iter(tensors)
        projections = [
            Projection(
                weight.to(x.dtype),
                None if bias is None else bias.to(x.dtype),
                tuple(Adapter(next(parts), next(parts), FACTOR + n) for n in range(n_adapters)),
            )
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return function(x, projections)

    return run


def drawn(
    shape: tuple[int, ...], outputs: tuple[int, ...], rank: int, n_adapters: int, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], list[Tensor]]:
    """(x and adapters, weights)."""
    torch.manual_seed(0)
    K = shape[-1]
    tensors = [torch.randn(shape)]
    for N in outputs:
        for _ in range(n_adapters):
            tensors += [torch.randn(rank, K), torch.randn(N, rank)]
    weights = [torch.randn(N, K) for N in outputs]
    return [t.to(device, dtype) for t in tensors], [w.to(device, dtype) for w in weights]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "outputs", "rank", "n_adapters"),
    [
        ((13, 17), (11,), 3, 1),
        ((2, 7, 19), (5, 3, 23), 7, 1),
        ((31, 13), (29, 23), 2, 2),
        ((0, 5), (3,), 2, 1),
        ((1, 7), (5,), 1, 1),
        ((3, 5), (7,), 1, 0),
    ],
    ids=["one", "three", "two adapters", "no rows", "one row", "no adapter"],
)
def test_gradients_are_those_of_the_definition(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], outputs: tuple[int, ...], rank: int, n_adapters: int
) -> None:
    tensors, weights = drawn(shape, outputs, rank, n_adapters, dtype, device)
    biases = [None if n % 2 else torch.randn(N, device=device) for n, N in enumerate(outputs)]
    kernel, reference = (adapted(f, weights, biases, n_adapters) for f in (lora_linear, lora_linear_reference))
    check_against_truth(kernel, reference, tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_of_half_activations(dtype: torch.dtype, device: str) -> None:
    [x, *adapters], weights = drawn((96, 64), (80, 48), 8, 2, torch.float32, device)
    kernel, reference = (adapted(f, weights, [None, None], 2) for f in (lora_linear, lora_linear_reference))
    upstream = [torch.randn(96, N, device=device) for N in (80, 48)]
    check_against_truth(kernel, reference, [x.to(dtype), *adapters], upstream)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4096, 16, 1024), (257, 3, 131), (1, 1, 7), (0, 4, 8)], ids=str)
def test_float32_gradients_are_summed_and_left_in_float32(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    M, R, K = shape
    torch.manual_seed(0)
    left, right = (torch.randn(M, width, device="cuda").to(dtype) for width in (R, K))
    for one, other in ((left, right), (right, left)):
        found, exact = module._summed(one, other, torch.float32), one.double().t() @ other.double()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * M**0.5)


def test_reads_nothing_that_it_did_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, torch's own and what is kept for weights that are turned back."""
    tensors, weights = drawn((13, 17), (11, 5), 3, 2, torch.float32, "cpu")
    bases = [Quantized("int8", (w.shape[0], w.shape[1]), int8.quantize(w)) for w in weights]
    own = quantized.workspace
    monkeypatch.setattr(quantized, "workspace", lambda *a: own(*a).fill_(torch.nan))
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what it allocates (torch.utils.deterministic)
    try:
        assert torch.empty(3).isnan().all()
        for given in (weights, bases):

            def over(x: Tensor, projections: list[Projection], given: Any = given) -> Any:
                return lora_linear(x, [p._replace(weight=w) for p, w in zip(projections, given, strict=True)])

            found = results(adapted(over, weights, [None, torch.ones(5)], 2), tensors)
            assert all(part.isfinite().all() for part in found)
            dropped = [
                Projection(w, None, (Adapter(tensors[1], b, FACTOR, 0.3),))
                for w, b in zip(given, tensors[2::4], strict=True)
            ]
            x = tensors[0].clone().requires_grad_()
            y, z = lora_linear(x, dropped)
            (y.sum() + z.sum()).backward()
            assert x.grad is not None and x.grad.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(was)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "nf4", "int8", "fp8"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_waits_for_nothing(kind: str, dropout: float) -> None:
    [x, *adapters], weights = drawn((64, 128), (96, 32), 8, 1, torch.float32, "cuda")
    leaves = [t.requires_grad_() for t in (x.bfloat16(), *adapters)]
    base: Any = [w.bfloat16() for w in weights]
    if kind != "plain":
        functions: dict[str, Any] = {
            "nf4": lambda w: nf4.quantize(w, False)[:2],
            "int8": int8.quantize,
            "fp8": fp8.quantize,
        }
        base = [Quantized(kind, (w.shape[0], w.shape[1]), functions[kind](w)) for w in weights]

    def step() -> None:
        pairs = [Adapter(a, b, FACTOR, dropout) for a, b in zip(leaves[1::2], leaves[2::2], strict=True)]
        y, z = lora_linear(leaves[0], [Projection(w, None, (pair,)) for w, pair in zip(base, pairs, strict=True)])
        (y.sum() + z.sum()).backward()

    step()  # compiled before
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_strided_and_expanded_inputs() -> None:
    tensors, weights = drawn((6, 9, 8), (5,), 2, 1, torch.float32, "cpu")
    kernel, reference = (adapted(f, weights, [None], 1) for f in (lora_linear, lora_linear_reference))

    def strided(function: Any) -> Any:
        return lambda x, *rest: function(x.transpose(0, 1), *rest)

    check_against_truth(strided(kernel), strided(reference), tensors)
    one = [tensors[0][:1, :1], *tensors[1:]]

    def expanded(function: Any) -> Any:
        return lambda x, *rest: function(x.expand(4, 3, 8), *rest)

    check_against_truth(expanded(kernel), expanded(reference), one)


@pytest.mark.parametrize("fault", ["sign", "factor", "term", "stale", "order"])
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, weights = drawn((13, 17), (11, 5), 3, 1, torch.float32, "cpu")
    kernel, reference = (adapted(f, weights, [None, None], 1) for f in (lora_linear, lora_linear_reference))
    own, summed, product, stacked = module._transposed_product, module._summed, module._product, module._stacked

    def upside_down(*arguments: Any) -> Any:
        a_SK, ranks = stacked(*arguments)
        return torch.cat(a_SK.split(ranks)[::-1]), ranks

    faults: dict[str, tuple[str, Any]] = {
        "sign": ("_summed", lambda left, right, dtype: -summed(left, right, dtype)),
        "factor": ("_product", lambda x, w, y: product(x, w, None if y is None else y / FACTOR)),
        "term": ("_transposed_product", lambda g, w, dx: own(g, w, None)),
        "stale": ("_transposed_product", lambda g, w, dx: own(g, w, dx + dx)),
        "order": ("_stacked", upside_down),
    }
    monkeypatch.setattr(module, *faults[fault])
    with pytest.raises(AssertionError, match="from the truth"):
        check_against_truth(kernel, reference, tensors)


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_is_drawn_again_for_the_backward_pass(reentrant: bool) -> None:
    tensors, weights = drawn((64, 48), (32,), 4, 1, torch.float32, "cpu")
    x, a, b = (t.requires_grad_() for t in tensors)
    projection = [Projection(weights[0], None, (Adapter(a, b, FACTOR, dropout=0.4),))]
    torch.manual_seed(3)
    [y] = lora_linear(x, projection)
    torch.manual_seed(3)
    kept = module.mask_of(x.detach(), 0.4, torch.default_generator)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.6]) and 0.55 < (kept > 0).float().mean() < 0.65
    wanted = x @ weights[0].t() + ((x * kept) @ a.t()) @ b.t() * FACTOR
    torch.testing.assert_close(y, wanted)
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad((wanted * upstream).sum(), (x, a, b))
    torch.rand(5)  # whatever else draws between the two passes
    torch.testing.assert_close(torch.autograd.grad((y * upstream).sum(), (x, a, b)), gradients, rtol=1e-4, atol=1e-4)
    torch.manual_seed(3)
    again = checkpoint(lambda x: lora_linear(x, projection)[0], x, use_reentrant=reentrant)
    (again * upstream).sum().backward()
    for leaf, gradient in zip((x, a, b), gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("second", [False, True], ids=["one adapter", "two adapters"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.5}, {"lora_dropout": 0.5}],
    ids=str,
)
def test_equals_peft(options: dict[str, Any], second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dropout = options.get("lora_dropout", 0.0)
    fixed = (torch.arange(3 * 7 * 24).view(3, 7, 24) % 3 > 0).float() / (1 - dropout)
    if dropout:
        # The same elements stay in both, in place of a draw.
        monkeypatch.setattr(F, "dropout", lambda x, *_: x * fixed)
        monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x * fixed)
        monkeypatch.setattr(module, "mask_of", lambda x, *_: fixed.view(x.shape))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 40))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(plain, config)
        if second:
            model.add_adapter("other", config)
            model.base_model.set_adapter(["default", "other"])
    layer: Any = model.base_model.model[0]
    for name in layer.active_adapters:
        nn.init.normal_(layer.lora_B[name].weight)
    x = torch.randn(3, 7, 24, requires_grad=True)
    wanted = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    upstream = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * upstream).sum(), (x, *trained))
    adapters = tuple(
        Adapter(
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
            dropout,
            layer.lora_magnitude_vector[name].weight if "use_dora" in options else None,
        )
        for name in layer.active_adapters
    )
    [got] = lora_linear(x, [Projection(layer.base_layer.weight, layer.base_layer.bias, adapters)])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad((got * upstream).sum(), (x, *trained)), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


class Halves:
    """A base that is held as halves of its weight: what a quantized one has to do."""

    def __init__(self, weight_NK: Tensor) -> None:
        self.half = weight_NK / 2

    def product(self, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        found = x_MK @ self.half.to(x_MK.dtype).t() * 2
        return found if out_MN is None else out_MN.add_(found)

    def transposed_product(self, grad_MN: Tensor, out_MK: Tensor | None = None) -> Tensor:
        found = grad_MN @ self.half.to(grad_MN.dtype) * 2
        return found if out_MK is None else out_MK.add_(found)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return (self.half * 2).to(dtype)

    def parts(self) -> None:
        return None


@pytest.mark.parametrize("n_adapters", [0, 1])
def test_base_that_is_not_a_tensor(n_adapters: int) -> None:
    tensors, weights = drawn((13, 17), (11, 5), 3, n_adapters, torch.float32, "cpu")

    def halved(x: Tensor, projections: list[Projection]) -> Any:
        return lora_linear(x, [p._replace(weight=Halves(weights[n])) for n, p in enumerate(projections)])

    kernel, reference = (adapted(f, weights, [None, None], n_adapters) for f in (halved, lora_linear_reference))
    check_against_truth(kernel, reference, tensors)


def test_autocast_leaves_the_activation_in_bfloat16_and_adapters_in_float32() -> None:
    tensors, weights = drawn((33, 24), (16,), 4, 1, torch.float32, "cpu")
    x, a, b = (t.requires_grad_() for t in tensors)
    with torch.autocast("cpu", torch.bfloat16):
        [y] = lora_linear(x, [Projection(weights[0], None, (Adapter(a, b, FACTOR),))])
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and a.grad is not None and a.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.float32
    exact_adapter = Adapter(a.double(), b.double(), FACTOR)
    [exact] = lora_linear_reference(x.double(), [Projection(weights[0].double(), None, (exact_adapter,))])
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2 * float(exact.detach().abs().max()))


def test_what_needs_no_gradient_gets_none_and_gradients_add_up() -> None:
    tensors, weights = drawn((9, 8), (6,), 2, 1, torch.float32, "cpu")
    x, a, b = tensors
    b.requires_grad_()
    [y] = lora_linear(x, [Projection(weights[0], None, (Adapter(a, b, FACTOR),))])
    y.sum().backward(retain_graph=True)
    assert b.grad is not None
    first = b.grad.clone()
    y.sum().backward()
    assert a.grad is None and x.grad is None
    torch.testing.assert_close(b.grad, 2 * first)
