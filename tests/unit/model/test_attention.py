"""Attention within documents: every backend is what its definition says, and no gradient crosses a border."""

import inspect
import random
import sys
from collections.abc import Callable
from itertools import accumulate, pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM

from ingot.errors import ModelError
from ingot.model import attention as module
from ingot.model import documents as documents_module
from ingot.model.attention import BACKENDS, FEATURES, Options, attention, implementation
from ingot.model.documents import NEAR, Documents, grouped
from ingot.parallel.recompute import recompute_blocks

# B batch, H heads, K key heads, T tokens of a line, L of a document, D head size

LENGTHS = (5, 1, 12, 5, 40, 3)
CPU = torch.device("cpu")
SCALE = 0.3

DECODERS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "gpt_oss", "mixtral",
)  # fmt: skip
ENCODERS = ("bert", "modernbert", "distilbert")


def by_hand(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], options: Options) -> Tensor:
    """The meaning of it all: a loop over documents, heads and tokens."""
    output = torch.zeros(1, sum(lengths), query.shape[1], value.shape[3], dtype=query.dtype, device=query.device)
    copies = query.shape[1] // key.shape[1]
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        for head, token in product(range(query.shape[1]), range(end - length, end)):
            first, last = end - length, (token + 1 if options.causal else end)
            if options.window is not None:
                first = max(first, token - options.window + 1)
                last = min(last, token + options.window)
            scores = key[0, head // copies, first:last] @ query[0, head, token] * options.scale
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            if options.sinks is not None:
                scores = torch.cat([scores, options.sinks[head : head + 1].to(scores)])
            output[0, token, head] = torch.softmax(scores, 0)[: last - first] @ value[0, head // copies, first:last]
    return output


def tensors(
    lengths: tuple[int, ...] = LENGTHS,
    *,
    heads: int = 4,
    key_heads: int = 2,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(lengths), count, size) for count in (heads, key_heads, key_heads)]
    made = [torch.randn(shape, generator=generator).transpose(1, 2).to(device, dtype) for shape in shapes]
    return [tensor.detach().requires_grad_() for tensor in made]


def crossing(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], lengths: tuple[int, ...]
) -> float:
    """Largest gradient of one document's output with respect to another's queries, keys or values.

    Raises AssertionError where a document's output does not depend on its own: then zeros would say nothing.
    """
    output_BTHD, worst = attend(*inputs), 0.0
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        own = slice(end - length, end)
        weights = torch.randn_like(output_BTHD[:, own])
        gradients = torch.autograd.grad((output_BTHD[:, own] * weights).sum(), inputs, retain_graph=True)
        for gradient in gradients:
            others = gradient.clone()
            others[:, :, own] = 0
            worst = max(worst, float(others.abs().max()))
        assert gradients[2][:, :, own].abs().amax((0, 1, 3)).min() > 0
    return worst


def asked(*features: str, causal: bool = True, heads: int = 4, device: str = "cpu") -> Options:
    values: dict[str, Any] = {"window": 4, "softcap": 1.5, "sinks": torch.linspace(-1, 1, heads, device=device)}
    return Options(causal, SCALE, **{name: values[name] for name in features})


KINDS = [(), ("window",), ("softcap",), ("sinks",), ("window", "softcap", "sinks")]
CASES = [
    pytest.param(backend, kind, causal, id=f"{backend}-{'-'.join(kind) or 'plain'}-{'causal' if causal else 'both'}")
    for backend, kind, causal in product(("eager", "sdpa"), KINDS, (True, False))
    if set(kind) <= FEATURES[backend]
]
GPU_CASES = [
    pytest.param(backend, kind, causal, id=f"{backend}-{'-'.join(kind) or 'plain'}-{'causal' if causal else 'both'}")
    for backend, kind, causal in product(BACKENDS, KINDS, (True, False))
    if set(kind) <= FEATURES[backend]
]


@pytest.mark.parametrize(("backend", "kind", "causal"), CASES)
def test_a_backend_is_its_definition(backend: str, kind: tuple[str, ...], causal: bool) -> None:
    inputs, options = tensors(), asked(*kind, causal=causal)
    if options.sinks is not None:
        options = options._replace(sinks=options.sinks.requires_grad_())
    inputs += [options.sinks] if options.sinks is not None else []
    got = BACKENDS[backend](*inputs[:3], Documents.of(LENGTHS, CPU), options)
    wanted = by_hand(*inputs[:3], LENGTHS, options)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(got)
    pairs = (torch.autograd.grad((output * weights).sum(), inputs) for output in (got, wanted))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "kind", "causal"), CASES)
def test_no_gradient_crosses_documents(backend: str, kind: tuple[str, ...], causal: bool) -> None:
    documents, options = Documents.of(LENGTHS, CPU), asked(*kind, causal=causal)
    assert crossing(lambda *inputs: BACKENDS[backend](*inputs, documents, options), tensors(), LENGTHS) == 0


def test_a_leak_would_be_seen() -> None:
    """Causal attention over the whole line, what packing without bounds is."""
    line = Documents.of((sum(LENGTHS),), CPU)
    assert crossing(lambda *inputs: BACKENDS["sdpa"](*inputs, line, asked()), tensors(), LENGTHS) > 1e-3
    # One token too many: bounds that are off by one.
    shifted = Documents.of((LENGTHS[0] + 1, *LENGTHS[1:-1], LENGTHS[-1] - 1), CPU)
    assert crossing(lambda *inputs: BACKENDS["sdpa"](*inputs, shifted, asked()), tensors(), LENGTHS) > 1e-3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [(), ("window",), ("softcap",)])
def test_flex_sees_its_document_only(kind: tuple[str, ...], causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention has no backward pass on a CPU and compiles for minutes: here forward, by its own plain code."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(module, "flex_kernel", lambda: flex.flex_attention)
    inputs, options = [tensor.detach() for tensor in tensors()], asked(*kind, causal=causal)
    got = BACKENDS["flex"](*inputs, Documents.of(LENGTHS, CPU), options)
    torch.testing.assert_close(got, by_hand(*inputs, LENGTHS, options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_on_a_cpu_is_computed_in_float32(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spying(query: Tensor, *others: Any, **options: Any) -> Tensor:
        output = plain(query, *others, **options)
        seen.append(output.dtype)
        return output

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", spying)
    lengths = (70, 3, module.WIDENED + 40)
    inputs = tensors(lengths, dtype=torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = BACKENDS["sdpa"](*inputs, Documents.of(lengths, CPU), Options(True, SCALE))
    assert got.dtype == torch.bfloat16 and set(seen) == {torch.float32, torch.bfloat16}
    wanted = BACKENDS["sdpa"](*exact, Documents.of(lengths, CPU), Options(True, SCALE))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-2, atol=1e-2)
    weights = torch.randn_like(wanted)
    gradients = torch.autograd.grad((got.double() * weights).sum(), inputs)
    for one, other in zip(gradients, torch.autograd.grad((wanted * weights).sum(), exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "kind", "causal"), GPU_CASES)
def test_on_a_gpu_every_backend_is_its_definition(backend: str, kind: tuple[str, ...], causal: bool) -> None:
    if backend == "varlen" and module.varlen_kernel() is None:
        pytest.skip("this torch has no varlen_attn with a window (2.11)")
    if backend == "flash":
        pytest.importorskip("flash_attn")
    torch._dynamo.reset()  # all cases of flex share a limit of 8 graphs, and a ninth would run uncompiled
    half = backend in ("varlen", "flash")
    dtype, close = (torch.bfloat16, 2e-2) if half else (torch.float32, 1e-2 if backend == "flex" else 1e-4)
    inputs = tensors(size=64, dtype=dtype, device="cuda")
    documents, options = Documents.of(LENGTHS, torch.device("cuda")), asked(*kind, causal=causal, device="cuda")
    got = BACKENDS[backend](*inputs, documents, options)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = by_hand(*exact, LENGTHS, options)
    torch.testing.assert_close(got.double(), wanted, rtol=close, atol=close)
    weights = torch.randn_like(wanted)
    gradients = torch.autograd.grad((got.double() * weights).sum(), inputs)
    for one, other in zip(gradients, torch.autograd.grad((wanted * weights).sum(), exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=close * 2, atol=close * 2)
    assert crossing(lambda *tensors: BACKENDS[backend](*tensors, documents, options), inputs, LENGTHS) == 0


def kernel_by_hand(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *, scale: float, causal: bool, window: Any, softcap: float = 0.0
) -> Tensor:
    """What flash kernels do with [T, H, D] and (left, right) windows, slowly."""
    output = torch.zeros_like(q)
    copies = q.shape[1] // k.shape[1]
    for start, end in pairwise(bounds.tolist()):
        for head, token in product(range(q.shape[1]), range(start, end)):
            first = start if window[0] < 0 else max(start, token - window[0])
            last = end if window[1] < 0 and not causal else min(end, token + (0 if causal else window[1]) + 1)
            scores = k[first:last, head // copies] @ q[token, head] * scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            output[token, head] = torch.softmax(scores, 0) @ v[first:last, head // copies]
    return output


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [(), ("window",)])
@pytest.mark.parametrize("old", [False, True], ids=["2.13", "2.11"])
def test_varlen_is_called_as_it_wants(
    kind: tuple[str, ...], causal: bool, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's kernel runs on CUDA only: here one with its signature, and the one of 2.11, which shares no keys."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    installed = inspect.signature(varlen.varlen_attn)

    def newest(query: Tensor, key: Tensor, value: Tensor, *rest: Any, enable_gqa: bool = False, **named: Any) -> Tensor:
        installed.bind(query, key, value, *rest, enable_gqa=enable_gqa, **named)
        assert enable_gqa == (query.shape[1] != key.shape[1])
        window = named["window_size"]
        return kernel_by_hand(query, key, value, rest[0], scale=named["scale"], causal=False, window=window)

    def oldest(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: Any = None, window_size: Any = (-1, -1)) -> Tensor:
        assert q.shape == k.shape
        assert rest[2:] == (max(LENGTHS), max(LENGTHS))
        return kernel_by_hand(q, k, v, rest[0], scale=scale, causal=False, window=window_size)

    monkeypatch.setattr(module, "varlen_kernel", lambda: oldest if old else newest)
    inputs, options = [tensor.detach() for tensor in tensors()], asked(*kind, causal=causal)
    got = BACKENDS["varlen"](*inputs, Documents.of(LENGTHS, CPU), options)
    torch.testing.assert_close(got, by_hand(*inputs, LENGTHS, options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [(), ("window",), ("softcap", "window")])
def test_flash_is_called_as_it_wants(kind: tuple[str, ...], causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        assert softmax_scale is not None
        assert deterministic
        assert (dropout_p, max_seqlen_q, max_seqlen_k) == (0.0, max(LENGTHS), max(LENGTHS))
        assert cu_seqlens_q.dtype == torch.int32
        return kernel_by_hand(
            q, k, v, cu_seqlens_k, scale=softmax_scale, causal=causal, window=window_size, softcap=softcap
        )

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    module.flash_kernel.cache_clear()
    inputs, options = [tensor.detach() for tensor in tensors()], asked(*kind, causal=causal)
    torch.use_deterministic_algorithms(True)
    try:
        got = BACKENDS["flash"](*inputs, Documents.of(LENGTHS, CPU), options)
    finally:
        torch.use_deterministic_algorithms(False)
    module.flash_kernel.cache_clear()
    torch.testing.assert_close(got, by_hand(*inputs, LENGTHS, options), rtol=1e-5, atol=1e-5)


def test_kernels_get_the_type_that_autocast_would_give() -> None:
    norm, projected = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for t in module._rows(norm, norm, projected)} == {torch.bfloat16}
    assert {t.dtype for t in module._rows(norm, norm, projected)} == {torch.bfloat16}
    assert {t.dtype for t in module._rows(norm, norm, norm)} == {torch.float32}


def test_groups_hold_every_token_once() -> None:
    draw = random.Random(0)
    for near in (0, NEAR):
        for _ in range(50):
            lengths = tuple(draw.randint(1, 60) for _ in range(draw.randint(1, 30)))
            groups, taken, back = grouped(lengths, near, CPU)
            assert sum(group.size for group in groups) == len(lengths)
            assert sum(group.size * group.length for group in groups) <= sum(lengths) + near * len(lengths)
            if taken is None or back is None:
                assert [group.length for group in groups for _ in range(group.size)] == list(lengths)
                continue
            assert torch.equal(taken[back], torch.arange(sum(lengths)))


def test_lines_that_lie_in_order_are_not_copied() -> None:
    assert grouped((9, 9, 4, 4), NEAR - NEAR, CPU) == ([(2, 9), (2, 4)], None, None)
    assert grouped((9,), NEAR, CPU) == ([(1, 9)], None, None)


def test_indices_are_built_once_a_batch(small_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(lengths: tuple[int, ...], *rest: Any) -> Any:
        calls.append(lengths)
        return grouped(lengths, *rest)

    monkeypatch.setattr(documents_module, "grouped", counted)
    model = decoder(small_config("llama", num_hidden_layers=3))
    for _ in range(2):
        forward(model, Documents.of(LENGTHS, CPU))
    assert calls == [LENGTHS] * 2


def decoder(config: Any, backend: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation(backend))
    with torch.no_grad():  # biases, norms and sinks start as zeros and ones, where many a mistake has no effect
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def words(lengths: tuple[int, ...]) -> Tensor:
    return torch.randint(3, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))


def forward(model: nn.Module, documents: Documents) -> Tensor:
    """[T, V] logits, or [T, D] last hidden states, of a line."""
    positions = torch.cat([torch.arange(length) for length in documents.lengths]).unsqueeze(0)
    inputs = {"attention_mask": documents.mask, "position_ids": positions, "documents": documents}
    output = model(input_ids=words(documents.lengths), **inputs)
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state)[0]


def gradients_of(model: nn.Module, outputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
    (outputs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_a_line_is_its_rows_alone(kind: str, recompute: bool, small_config: Callable[..., Any]) -> None:
    """Outputs and every gradient, beside transformers' own eager attention on each row."""
    config = small_config(kind)
    if kind in DECODERS:
        model = decoder(config, "eager" if kind in ("gemma2", "gpt_oss") else "sdpa")
    else:
        torch.manual_seed(0)
        model = AutoModel.from_config(config, attn_implementation=implementation("sdpa"))
    if recompute:
        recompute_blocks(model)
    model.train()
    line = forward(model, Documents.of(LENGTHS, CPU))
    found = gradients_of(model, line)
    model.set_attn_implementation("eager")
    outputs = [
        model(input_ids=row, attention_mask=torch.ones_like(row)) for row in words(LENGTHS).split(LENGTHS, dim=1)
    ]
    alone = torch.cat([(o.logits if kind in DECODERS else o.last_hidden_state)[0] for o in outputs])
    torch.testing.assert_close(line, alone, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients_of(model, alone).items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
        assert error < 2e-5, name


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt_oss", "bert"])
def test_without_documents_it_is_transformers_own(kind: str, small_config: Callable[..., Any]) -> None:
    """Padded rows, and rows without any mask that are longer than the window."""
    torch.manual_seed(0)
    make = AutoModel if kind == "bert" else AutoModelForCausalLM
    model = make.from_config(small_config(kind), attn_implementation=implementation("sdpa")).eval()
    ids = torch.randint(3, 97, (3, 14))
    mask = (torch.arange(14) < torch.tensor([[14], [3], [9]])).long()
    theirs = "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"
    for inputs in ({"attention_mask": mask}, {}):
        outputs = []
        for name in (implementation("sdpa"), theirs):
            model.set_attn_implementation(name)
            output = model(input_ids=ids, **inputs)
            outputs.append(output.last_hidden_state if kind == "bert" else output.logits)
        keep = mask.bool() if inputs else torch.ones_like(mask).bool()
        torch.testing.assert_close(outputs[0][keep], outputs[1][keep], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt_oss"])
def test_generation_is_transformers_own(kind: str, small_config: Callable[..., Any]) -> None:
    model = decoder(small_config(kind)).eval()
    ids = torch.randint(3, 97, (2, 9))
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()  # padded on the left
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    answers = []
    for name in (implementation("sdpa"), "eager"):
        model.set_attn_implementation(name)
        answers.append(model.generate(ids, **options).tolist())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["mistral", "gpt_oss"])
def test_no_matrix_of_the_line_is_made(kind: str, small_config: Callable[..., Any]) -> None:
    """Nothing of T x T comes to be, in forward and backward: a line's cost is that of its documents."""

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            outputs = result if isinstance(result, tuple | list) else [result]
            found.extend(output.numel() for output in outputs if isinstance(output, Tensor))
            return result

    found: list[int] = []
    lengths = (20,) * 64
    model = decoder(small_config(kind), "eager" if kind == "gpt_oss" else "sdpa")
    with Sizes():
        forward(model, Documents.of(lengths, CPU)).sum().backward()
    assert max(found) < sum(lengths) ** 2 / 4


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_dropout_is_drawn_within_documents(backend: str) -> None:
    inputs, documents, options = tensors(), Documents.of(LENGTHS, CPU), asked()._replace(dropout=0.5)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(BACKENDS[backend](*inputs, documents, options))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    first = LENGTHS[0]
    for gradient in torch.autograd.grad(outputs[0][:, :first].sum(), inputs):
        assert float(gradient[:, :, first:].abs().max()) == 0


class Layer(nn.Module):
    """What a backend sees of a model."""

    is_causal = True


@pytest.mark.parametrize(
    ("backend", "options", "missing"),
    [
        ("sdpa", {"softcap": 2.0}, "softcap"),
        ("sdpa", {"s_aux": torch.zeros(4)}, "sinks"),
        ("varlen", {"dropout": 0.1}, "dropout"),
        ("varlen", {"softcap": 2.0}, "softcap"),
        ("flash", {"s_aux": torch.zeros(4)}, "sinks"),
        ("flex", {"dropout": 0.1}, "dropout"),
    ],
)
def test_what_a_backend_lacks_is_refused(backend: str, options: dict[str, Any], missing: str) -> None:
    with pytest.raises(ModelError, match=f"Layer uses {missing}; use .*eager"):
        attention(Layer(), *tensors(), None, documents=Documents.of(LENGTHS, CPU), backend=backend, **options)


def test_other_forms_of_attention_are_refused() -> None:
    documents = Documents.of(LENGTHS, CPU)
    query, key, value = tensors()
    with pytest.raises(ModelError, match="not plain attention"):  # to the states of an encoder
        attention(Layer(), query, key[:, :, :7], value[:, :, :7], None, documents=documents)
    with pytest.raises(ModelError, match="not plain attention"):
        attention(Layer(), query, key, value, None, documents=documents, position_bias=torch.zeros(1, 4, 1, 1))


def test_lost_documents_are_an_error_and_a_mask_that_others_read_is_nan() -> None:
    documents = Documents.of(LENGTHS, CPU)
    with pytest.raises(ModelError, match="not told where rows end"):
        attention(Layer(), *tensors(), documents.mask)
    for backend in ("eager", "sdpa"):
        assert not bool(
            attention(Layer(), *tensors(), documents.mask, documents=documents, backend=backend)[0].isnan().any()
        )
    assert bool(torch.softmax(torch.zeros(1, 1, 3, 3) + documents.mask, -1).isnan().all())


def test_heads_of_other_ranks_and_sinks_do_not_go_together() -> None:
    def half(attend: Any, *inputs: Tensor) -> Tensor:
        return attend(*(tensor[:, : tensor.shape[1] // 2] for tensor in inputs))

    documents = Documents.of(LENGTHS, CPU, half)
    assert attention(Layer(), *tensors(), None, documents=documents)[0].shape[2] == 2
    with pytest.raises(ModelError, match="sinks"):
        attention(Layer(), *tensors(), None, documents=documents, s_aux=torch.zeros(4), backend="eager")
