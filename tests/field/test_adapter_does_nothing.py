"""An adapter that trains and has no effect, or is lost on the way to the model that is served.

NeMo/Automodel#1226, axolotl#3294, unsloth#5410 (merged is not what was trained); unsloth#11014, Automodel#1151,
vllm#41754 (fused experts are no linear layers); trl#5676 (an adapter on the head is skipped by a fast head); unsloth-
zoo#810, peft#2321, qlora#254, ms-swift#5144 (merged onto another base than it was trained on); unsloth#9331,
transformers#45127, LlamaFactory#6446 (tied embeddings); open-unlearning#178, transformers#26221, peft#1142
(recomputation leaves it at zero).
"""

import pytest
import torch
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from ingot.errors import IngotError
from ingot.model.adapters import attach_adapter, dead_tensors, merge, trainable_tensors
from ingot.model.quantize import quantized, rounded
from ingot.recipe import Adapter, Quantization

IDS = torch.tensor([[3, 5, 7, 9, 11]])
PROBE = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def adapted(model, **options):
    """`model` with an adapter that does something."""
    model = attach_adapter(model, Adapter(rank=4, **options), "chat-completion", seed=0)
    with torch.no_grad():
        for name, parameter in trainable_tensors(model):
            if "lora_B" in name or "embedding_A" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_merged_model_answers_as_the_trained_one(cells):
    model = adapted(cells.small_model("llama"))
    before = model(**PROBE).logits
    base = cells.small_model("llama")(**PROBE).logits
    merged, difference = merge(model, [PROBE])
    torch.testing.assert_close(merged(**PROBE).logits, before, rtol=0, atol=1e-4)
    assert difference < 1e-4
    assert (before - base).abs().max() > 0.1, "the adapter does something"


def test_a_merge_that_loses_the_adapter_is_an_error(cells, monkeypatch):
    model = adapted(cells.small_model("llama"))
    monkeypatch.setattr(model, "merge_and_unload", model.unload)
    with pytest.raises(IngotError, match="differ from the adapter's"):
        merge(model, [PROBE])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merged_onto_the_base_that_it_was_trained_on(cells, kind):
    section = Quantization(kind=kind)
    trained = adapted(quantized(cells.small_model("llama"), section))
    plain = adapted(rounded(cells.small_model("llama"), section))
    with torch.no_grad():
        for (name, a), (other, b) in zip(trainable_tensors(trained), trainable_tensors(plain), strict=True):
            assert name == other
            b.copy_(a)
    merged, _ = merge(plain, [PROBE])
    torch.testing.assert_close(merged(**PROBE).logits, trained(**PROBE).logits, rtol=0, atol=1e-4)


def test_fused_experts_are_not_left_out_without_a_word(cells):
    size = {key: value for key, value in cells.SMALL.items() if key != "tie_word_embeddings"}
    model = MixtralForCausalLM(MixtralConfig(**size, num_local_experts=4, num_experts_per_tok=2))
    reached = {name for name, _ in trainable_tensors(adapted(model))}
    assert sum("experts" in name for name in reached) == 8  # A and B of two tensors in two layers
    model = MixtralForCausalLM(MixtralConfig(**size, num_local_experts=4, num_experts_per_tok=2))
    attention_only = attach_adapter(model, Adapter(targets=["q_proj", "v_proj"]), "chat-completion", seed=0)
    assert all("self_attn" in name for name, _ in trainable_tensors(attention_only))


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_head_is_not_lost_at_merge(cells, end, tmp_path):
    model = adapted(cells.small_model("llama"), targets=[end])
    tuned = model(**PROBE).logits
    assert (tuned - cells.small_model("llama")(**PROBE).logits).abs().max() > 0.1
    merged, _ = merge(model, [PROBE])
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(**PROBE).logits, tuned, rtol=0, atol=1e-4)


def test_tied_embeddings_survive_full_fine_tuning(cells, tmp_path):
    model = cells.small_model("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**PROBE, labels=IDS).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**PROBE).logits, model(**PROBE).logits)
    assert (again(**PROBE).logits - cells.small_model("llama")(**PROBE).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["lora", "none"])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_trainable_tensor_moves(cells, tmp_path, kind, recompute):
    """Two steps: the first moves only B, which starts at zero."""
    cell = {
        "name": "moves",
        "sections": {
            "adapter": {"kind": kind, "rank": 4},
            "train": {"max_steps": 2, "activation_checkpointing": "full" if recompute else "none"},
        },
    }
    cells.train(cell, tmp_path)
    _, tensors = cells.results(tmp_path, "moves")
    fresh = attach_adapter(cells.small_model("llama"), Adapter(kind=kind, rank=4), "chat-completion", seed=0)
    with torch.no_grad():
        for name, parameter in trainable_tensors(fresh):
            if "lora_B" in name:
                parameter.zero_()
    initial = {name: p.detach().clone() for name, p in trainable_tensors(fresh)}
    with torch.no_grad():
        for name, parameter in trainable_tensors(fresh):
            parameter.copy_(tensors[f"weight/{name}"])
    assert dead_tensors(fresh, initial) == []
    assert all(tensors[f"grad/{name}"].abs().max() > 0 for name in initial)
