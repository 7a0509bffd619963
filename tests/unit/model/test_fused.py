"""Fused operations in models of many families: as many places as stated, and nothing computed differently."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ingot.errors import RecipeError
from ingot.model import fused
from ingot.recipe import Kernels

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# model type -> replaced (rms_norm, rope, gated, lora_linear with adapters everywhere)
FAMILIES = {
    "llama": (7, 2, 2, 14),
    "mistral": (7, 2, 2, 14),
    "mixtral": (7, 2, 0, 8),
    "qwen2": (7, 2, 2, 14),
    "qwen3": (11, 2, 2, 14),
    "qwen3_moe": (11, 2, 0, 8),
    "gemma2": (9, 2, 2, 14),
    "gemma3_text": (13, 2, 2, 14),
    "phi3": (7, 0, 2, 8),
    "olmo2": (9, 2, 2, 14),
    "granite": (7, 2, 2, 14),
    "cohere2": (0, 2, 2, 14),
    "gpt_oss": (5, 2, 0, 8),
}


def _model(kind: str, lora: bool) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL)).train()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model


def _step(model: nn.Module) -> Tensor:
    """Logits of a padded batch where they count; leaves gradients."""
    ids_BT = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(3))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 9:] = 0
    logits: Tensor = model(input_ids=ids_BT, attention_mask=mask_BT).logits * mask_BT[..., None]
    logits.square().mean().backward()
    return logits.detach()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_equals_the_untouched_model(kind: str, lora: bool) -> None:
    model = _model(kind, lora)
    plain = copy.deepcopy(model)
    report = fused.apply(model, Kernels())
    found = tuple(len(report.replaced[op]) for op in ("rms_norm", "rope", "gated", "lora_linear"))
    assert found == (*FAMILIES[kind][:3], FAMILIES[kind][3] if lora else 0)

    expected, logits = _step(plain), _step(model)

    assert (expected - logits).abs().max() <= 1e-4 * expected.abs().max()
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert (a.grad - b.grad).abs().max() <= 1e-4 * a.grad.abs().max() + 1e-9, name
    fused.restore(model)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_refuses_an_operation_without_a_place() -> None:
    with pytest.raises(RecipeError, match="lora_linear"):
        fused.apply(_model("llama", False), Kernels(ops=["lora_linear"]))
