"""A quantized base: bitsandbytes' own numbers, exact gradients, nothing kept in full size."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ingot.model.adapters import attach_adapter, trainable_tensors
from ingot.model.load import parameter_counts
from ingot.model.quantize import QuantizedLinear, quantized, rounded
from ingot.recipe import Adapter, Quantization
from ingot_kernels import nf4

KINDS = [
    Quantization(kind="nf4"),
    Quantization(kind="nf4", double=False),
    Quantization(kind="int8"),
    Quantization(kind="fp8"),
]
IDS = ["nf4 double", "nf4", "int8", "fp8"]
kinds = pytest.mark.parametrize("section", KINDS, ids=IDS)


def linear(n: int, k: int) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(k, n)
    layer.weight.data.mul_(0.3)
    return layer


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, num_key_value_heads=2, **size))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(64, 172), (50, 33), (256, 256), (1, 7)])
def test_nf4_is_what_bitsandbytes_computes(shape, double):
    layer = linear(*shape)
    packed, state = bnb.quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4", compress_statistics=double)
    expected = bnb.dequantize_4bit(packed, state)
    assert torch.equal(QuantizedLinear(layer, Quantization(kind="nf4", double=double)).weight, expected)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(64, 96), (6, 32), (64, 64), (5, 40)])
def test_nf4_blocks_go_on_from_row_to_row(shape, double):
    layer = QuantizedLinear(linear(*shape), Quantization(kind="nf4", double=double))
    packed, scales, *rest = layer.parts().tensors
    expected = nf4.dequantize_reference(packed, scales, *(rest or (None, None)), shape, torch.float32)
    assert torch.equal(layer.weight, expected)


@kinds
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is imported
def test_compiled_whole_it_is_the_same(section):
    layer = QuantizedLinear(linear(64, 96), section)
    compiled = torch.compile(lambda x: layer(x).sin(), backend="aot_eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (torch.randn(3, 5, 96, generator=torch.manual_seed(1)).requires_grad_() for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out, expected = compiled(x), layer(y).sin()
        assert out.dtype == expected.dtype == dtype
        torch.testing.assert_close(out, expected)
        out.float().square().sum().backward()
        expected.float().square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_int8_rounds_each_row_to_half_a_step():
    layer = linear(50, 33)
    found = QuantizedLinear(layer, Quantization(kind="int8")).weight
    step = layer.weight.data.abs().amax(1, keepdim=True) / 127
    assert ((found - layer.weight.data).abs() <= 0.501 * step).all()


@kinds
def test_output_and_gradient_are_those_of_the_rounded_weight(section):
    layer = linear(64, 172)
    short = QuantizedLinear(layer, section)
    x, y = (torch.randn(3, 5, 172, generator=torch.manual_seed(1)).requires_grad_() for _ in range(2))
    out, expected = short(x), y @ short.weight.t() + layer.bias
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert not any(p.requires_grad for p in short.parameters())


@kinds
def test_autocast_computes_in_its_type(section):
    short = QuantizedLinear(linear(64, 172), section)
    with torch.autocast("cpu", torch.bfloat16):
        out = short(torch.randn(2, 172, requires_grad=True))
    assert out.dtype == torch.bfloat16
    out.sum().backward()


@kinds
def test_nothing_of_full_size_is_kept_for_the_backward_pass(section):
    """QLoRA's point: the dequantized weight lives for one product only."""
    short, kept = QuantizedLinear(linear(64, 172), section), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        short(torch.randn(2, 172, requires_grad=True)).sum().backward()
    assert max(kept, default=0) < 64 * 172


@kinds
def test_model_keeps_its_head_and_trains_only_its_adapter(section):
    model = attach_adapter(quantized(llama(), section), Adapter(rank=4), "chat-completion", seed=0)
    kinds_of = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds_of["base_model.model.lm_head"] == "Linear"
    assert kinds_of["base_model.model.model.layers.0.mlp.up_proj.base_layer"] == "QuantizedLinear"
    ids = torch.tensor([[3, 5, 7, 9]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for _, p in trainable_tensors(model))
    n_trainable, n_all = parameter_counts(model)
    assert n_all - n_trainable == sum(p.numel() for p in llama().parameters())


@kinds
def test_rounded_model_computes_what_the_quantized_one_does(section):
    ids = torch.tensor([[3, 5, 7, 9]])
    with torch.no_grad():
        short, whole, plain = (
            m(input_ids=ids).logits for m in (quantized(llama(), section), rounded(llama(), section), llama())
        )
    torch.testing.assert_close(short, whole)
    assert not torch.allclose(short, plain, atol=1e-5)
