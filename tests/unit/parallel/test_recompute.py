"""What recomputation and compilation must not change."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from ingot.errors import RecipeError
from ingot.model import adapters, fused
from ingot.model.documents import Documents
from ingot.model.kinds import logits_of
from ingot.model.pooling import MeanPoolClassifier
from ingot.parallel import recompute
from ingot.parallel.recompute import NARROW, compile_blocks, keep_products, recompute_blocks
from ingot.recipe import Adapter, Kernels, Train
from ingot_kernels.lora_linear import Adapter as Pair
from ingot_kernels.lora_linear import Projection, lora_linear


def test_compile_without_a_compiler_is_refused_before_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    recompute.check(Train(compile=True), torch.device("cpu"))
    monkeypatch.setattr(recompute.shutil, "which", lambda name: None)
    recompute.check(Train(compile=True), torch.device("cuda"))
    with pytest.raises(RecipeError, match=r"train\.compile = True: needs a C\+\+ compiler"):
        recompute.check(Train(compile=True), torch.device("cpu"))


IDS = torch.tensor([[3, 5, 7, 9, 11]])
PROBE = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, num_key_value_heads=2, **size))


def encoder() -> MeanPoolClassifier:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return MeanPoolClassifier(BertModel(config, add_pooling_layer=False), 5)


@pytest.mark.parametrize("make", [llama, encoder], ids=["decoder", "encoder"])
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_recomputed_activations_give_the_same_gradients(make, kind):
    """Also for adapters on a frozen base, whose gradients the reentrant kind of recomputation loses."""
    gradients = []
    for again in (False, True):
        model = adapters.attach_adapter(make(), Adapter(kind=kind, rank=4), "text-classification", seed=0)
        if again:
            recompute_blocks(model)
        calls = []
        inner = next(m for name, m in model.named_modules() if name.endswith(("layers.0.mlp", "layer.0.intermediate")))
        inner.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        logits_of(model.train()(**PROBE)).square().mean().backward()
        assert len(calls) == 1 + again, "the block's forward runs again in the backward pass"
        gradients.append({name: p.grad.clone() for name, p in adapters.trainable_tensors(model)})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6, msg=name)


LINES = [(7, 4, 13), (5, 31), (9,), (4, 4, 4, 6, 21)]


def of_lines(model: nn.Module) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """(loss, gradients) of four lines of different lengths and numbers of documents."""
    found = []
    for lengths in LINES:
        generator = torch.Generator().manual_seed(sum(lengths))
        documents = Documents.of(lengths, torch.device("cpu"))
        inputs = {
            "input_ids": torch.randint(3, 61, (1, sum(lengths)), generator=generator),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "attention_mask": documents.mask,
            "documents": documents,
            "use_cache": False,
        }
        model.zero_grad()
        loss = model(**inputs).logits.logsumexp(-1).square().mean()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in adapters.trainable_tensors(model) if p.grad is not None}
        found.append((loss.detach(), gradients))
    return found


def wide(kind: str, layers: int = 2) -> nn.Module:
    """So wide that its products are kept."""
    torch.manual_seed(0)
    size = {"hidden_size": NARROW + 32, "intermediate_size": NARROW + 48, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=61, num_attention_heads=4, num_key_value_heads=2, **size)
    model = LlamaForCausalLM._from_config(config, attn_implementation="ingot")
    model = adapters.attach_adapter(model, Adapter(kind=kind, rank=4), "language-modeling", seed=0)
    with torch.no_grad():
        for name, parameter in adapters.trainable_tensors(model):
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


class Counted(TorchDispatchMode):
    """How often which operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[str(func._schema.name).rpartition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def same(found, expected) -> None:
    for (loss, gradients), (other, others) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            largest = others[name].abs().max()
            assert (gradient - others[name]).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_selective_repeats_neither_products_nor_attention(kind):
    plain, kept = wide(kind), wide(kind)
    recompute_blocks(kept, selective=True)
    same(of_lines(kept), of_lines(plain))
    counts = []
    for model in (plain, kept):
        with Counted() as counted:
            of_lines(model)
        counts.append(counted.found)
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert counts[0][attention] == counts[1][attention] > 0
    assert counts[1]["silu"] == 2 * counts[0]["silu"], "activations are computed again"
    # Of each block only an adapter's second product, but for that of the last projection; and the gradient of what
    # goes into the first block (two products for each of q, k and v), as transformers lets embeddings ask for one.
    again = counts[1]["mm"] - counts[0]["mm"]
    assert again == (len(LINES) * (2 * 6 + 6) if kind == "lora" else 0)


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_selective_under_autocast_and_twice_backward(kind):
    found = []
    for again in (False, True):
        model = wide(kind)
        if again:
            recompute_blocks(model, selective=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**PROBE).logits.float().square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append({name: p.grad.clone() for name, p in adapters.trainable_tensors(model)})
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def repeated(function, *tensors):
    """(result, gradients) of `function` with products kept."""
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    out = checkpoint(function, *inputs, use_reentrant=False, context_fn=keep_products)
    return out.detach(), torch.autograd.grad(out.square().sum(), inputs)


OVERWRITTEN = {
    "added to": lambda x, w: (x @ w).add_(1.0).sigmoid() @ w,
    "by a view": lambda x, w: _halved(x @ w).sigmoid() @ w,
    "read before": lambda x, w: _after(x @ w) @ w,
    "product in place": lambda x, w: (x * 2).addmm_(x, w).sigmoid() @ w,
    "fused adapter": lambda x, w: _adapted(x, w).sigmoid(),
    "dropped": lambda x, w: F.dropout((F.dropout(x, 0.3) @ w).sigmoid(), 0.3) @ w,
    "attention that drops": lambda x, w: F.dropout(_attended(x @ w), 0.3) @ w,
}


def _halved(y):
    y.view(-1)[::2].mul_(0.5)
    return y


def _after(y):
    z = y.sigmoid()
    y.mul_(3.0)
    return z.sin() + y.cos()


def _adapted(x, w):
    a, b = w[:4].contiguous(), w[:, :4].contiguous()
    projection = Projection(w.detach(), None, (Pair(a, b, 2.0, 0.2),))
    for _ in range(2):
        [x] = lora_linear(x, [projection])
    return x


def _attended(y):
    rows = y.view(1, 1, *y.shape)
    return F.scaled_dot_product_attention(rows, rows, rows, dropout_p=0.3)[0, 0].sin()


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_what_is_written_over_or_drawn_is_computed_again(name):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(160, 160, generator=generator) / 12 for _ in range(2))
    torch.manual_seed(1)
    inputs = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    out = OVERWRITTEN[name](*inputs)
    expected = torch.autograd.grad(out.square().sum(), inputs)
    torch.manual_seed(1)
    found, gradients = repeated(OVERWRITTEN[name], x, w)
    assert torch.equal(found, out)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.equal(one, other)


def test_kept_results_that_are_not_forgotten_are_seen(monkeypatch):
    monkeypatch.setattr(recompute, "_changed", lambda *_: set())
    x, w = torch.randn(160, 160) / 12, torch.randn(160, 160) / 12
    inputs = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    expected = torch.autograd.grad(OVERWRITTEN["added to"](*inputs).square().sum(), inputs)
    _, gradients = repeated(OVERWRITTEN["added to"], x, w)
    assert not torch.allclose(gradients[1], expected[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is imported
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where it looks at a block's input
@pytest.mark.parametrize(
    ("kind", "backend"), [("none", "aot_eager"), pytest.param("lora", "inductor", marks=pytest.mark.slow)]
)
def test_compiled_blocks_give_the_same_and_compile_once(kind, backend):
    plain, compiled = wide(kind), wide(kind)
    names = list(compiled.state_dict())
    torch._dynamo.reset()
    counters.clear()
    assert compile_blocks(compiled, backend) == 2
    assert list(compiled.state_dict()) == names
    expected, found = of_lines(plain), of_lines(compiled)
    same(found, expected)
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 8, "parts of a block, shared by all blocks; another length or number of documents adds none"


@pytest.mark.slow  # inductor: 20 s; tests/kernels/test_lora_linear_compiled.py counts graphs without it
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is imported
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where it looks at a block's input
def test_fused_blocks_give_the_same_and_more_of_them_compile_nothing_more():
    graphs = []
    for layers in (2, 3):
        # In float32 the rounding of both alone comes to 1e-5 on some processors.
        plain, compiled = wide("lora", layers).double(), wide("lora", layers).double()
        report = fused.apply(compiled, Kernels())
        assert len(report.replaced["lora_linear"]) == 7 * layers
        torch._dynamo.reset()
        counters.clear()
        compile_blocks(compiled, "aot_eager")
        same(of_lines(compiled), of_lines(plain))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1]
