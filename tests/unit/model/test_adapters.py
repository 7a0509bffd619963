"""Adapters that do nothing are the field's most expensive silent failure: each kind is caught by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
)

from ingot.errors import IngotError, RecipeError
from ingot.model import adapters
from ingot.model.kinds import logits_of
from ingot.model.pooling import MeanPoolClassifier
from ingot.recipe import Adapter

IDS = torch.tensor([[3, 5, 7, 9, 11]])
PROBE = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def encoder() -> MeanPoolClassifier:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return MeanPoolClassifier(BertModel(config, add_pooling_layer=False), 5)


def train_a_little(model, steps: int = 3) -> None:
    trainable = [p for _, p in adapters.trainable_tensors(model)]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(steps):
        logits_of(model(**PROBE)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def attached(model, task="chat-completion", **settings):
    adapted = adapters.attach_adapter(model, Adapter(rank=4, alpha=8, **settings), task, seed=0)
    return adapted, {name: p.detach().clone() for name, p in adapters.trainable_tensors(adapted)}


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"dora": True}, {"dropout": 0.1}], ids=str)
def test_all_linear_layers_learn_and_merging_keeps_the_model(settings):
    model, initial = attached(llama(), **settings)
    adapted = {name.split(".")[-4] for name in initial if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len([name for name in initial if "lora_A" in name]) == 14
    before = logits_of(model.eval()(**PROBE)).detach()
    train_a_little(model.train())
    assert adapters.dead_tensors(model, initial) == []
    tuned = logits_of(model.eval()(**PROBE)).detach()
    assert (tuned - before).abs().max() > 1e-3
    merged, difference = adapters.merge(model, [PROBE])
    assert difference < 1e-4
    torch.testing.assert_close(logits_of(merged(**PROBE)), tuned, rtol=1e-4, atol=1e-5)


def test_encoder_trains_its_head_too_and_merges():
    model, initial = attached(encoder(), "text-classification")
    assert any("classifier" in name for name in initial)
    assert not any("pooler" in name for name in initial)
    train_a_little(model.train())
    assert adapters.dead_tensors(model, initial) == []
    merged, difference = adapters.merge(model, [PROBE])
    assert isinstance(merged, MeanPoolClassifier)
    assert difference < 1e-4


def test_adapter_that_never_moved_is_named():
    model, initial = attached(llama())
    train_a_little(model)
    name, parameter = next((n, p) for n, p in adapters.trainable_tensors(model) if "lora_B" in n)
    with torch.no_grad():
        parameter.copy_(initial[name])
    assert adapters.dead_tensors(model, initial) == [name]


def test_target_that_matches_nothing_is_an_error_with_the_nearest_name():
    with pytest.raises(RecipeError, match="did you mean 'q_proj'"):
        attached(llama(), targets=["qproj"])


def test_named_targets_are_the_only_ones():
    _, initial = attached(llama(), targets=["q_proj", "v_proj"])
    assert {name.split(".")[-4] for name in initial} == {"q_proj", "v_proj"}


def test_saved_adapter_holds_what_was_trained_and_no_path(tmp_path):
    model, initial = attached(llama())
    train_a_little(model)
    adapters.save_adapter(model, tmp_path, "org/base")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(initial) == 28
    assert all(tensor.numel() for tensor in saved.values())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # weights are read by whoever reads the rest


def test_empty_saved_adapter_is_caught(tmp_path, monkeypatch):
    model, _ = attached(llama())
    real = type(model).save_pretrained

    def hollow(self, folder, **options):
        real(self, folder, **options)
        save_file(
            {name: tensor[:0] for name, tensor in load_file(folder / "adapter_model.safetensors").items()},
            folder / "adapter_model.safetensors",
        )

    monkeypatch.setattr(type(model), "save_pretrained", hollow)
    with pytest.raises(IngotError, match="28 of them empty"):
        adapters.save_adapter(model, tmp_path, "base")


def test_merge_that_changes_the_model_is_caught(monkeypatch):
    model, _ = attached(llama())
    train_a_little(model)
    tuner = type(model.base_model)
    real = tuner.merge_and_unload

    def lossy(self, *arguments, **options):
        merged = real(self, *arguments, **options)
        with torch.no_grad():
            merged.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        return merged

    monkeypatch.setattr(tuner, "merge_and_unload", lossy)
    with pytest.raises(IngotError, match="merged model's logits differ"):
        adapters.merge(model, [PROBE])


def test_full_fine_tuning_leaves_fixed_positions_alone():
    """Pegasus adds sinusoids: a table that is computed, not learned."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 32}
    pegasus = PegasusForConditionalGeneration(PegasusConfig(**sizes))
    model = adapters.attach_adapter(pegasus, Adapter(kind="none"), "summarization", 0)
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert fixed == ["model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"]
