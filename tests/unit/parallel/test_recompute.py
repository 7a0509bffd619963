"""What recomputation must not change."""

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from ingot.model import adapters
from ingot.model.load import logits_of
from ingot.model.pooling import MeanPoolClassifier
from ingot.parallel.recompute import recompute_blocks
from ingot.recipe import Adapter

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
    for recompute in (False, True):
        model = adapters.attach_adapter(make(), Adapter(kind=kind, rank=4), "text-classification", seed=0)
        if recompute:
            recompute_blocks(model)
        calls = []
        inner = next(m for name, m in model.named_modules() if name.endswith(("layers.0.mlp", "layer.0.intermediate")))
        inner.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        logits_of(model.train()(**PROBE)).square().mean().backward()
        assert len(calls) == 1 + recompute, "the block's forward runs again in the backward pass"
        gradients.append({name: p.grad.clone() for name, p in adapters.trainable_tensors(model)})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6, msg=name)
