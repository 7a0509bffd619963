"""Experts fused into one tensor, heads tied to the embedding: adapters on them learn, and live on after a merge."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from ingot.errors import IngotError, RecipeError
from ingot.model import adapters
from ingot.model.kinds import logits_of
from ingot.model.quantize import quantized
from ingot.recipe import Adapter, Quantization

IDS_BT = torch.tensor([[3, 5, 7, 9, 11, 13, 8, 2]])
PROBE = {"input_ids": IDS_BT, "attention_mask": torch.ones_like(IDS_BT)}
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**FOUR, "mlp_only_layers": [0]},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**FOUR, "shared_expert_intermediate_size": 24},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48},
    "llama": {},
}
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")


def model_of(kind: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind], **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # llama4 starts its experts at zero
                parameter.normal_(std=0.02)
    return model


def attached(kind: str, *, base: dict[str, Any] | None = None, **settings: Any) -> tuple[Any, Adapter]:
    adapter = Adapter(**{"rank": 4, "alpha": 8, **settings})
    return adapters.attach_adapter(model_of(kind, **(base or {})), adapter, "language-modeling", 0), adapter


def train(model: nn.Module, steps: int = 3) -> dict[str, Tensor]:
    """Train a little; return what the adapter was before."""
    trained = dict(adapters.trainable_tensors(model))
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(steps):
        logits_of(model(**PROBE)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return before


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return logits_of(model(**PROBE))


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_learn_and_live_on_saved_and_merged(kind: str, tmp_path: Path) -> None:
    """Every tensor moves; read again by us and by peft alone, and merged, saved and read by transformers alone, the
    model says the same.
    """
    plain = logits(model_of(kind))
    model, adapter = attached(kind)
    before = train(model)
    assert sum("experts" in name for name in before) >= 4
    assert adapters.dead_tensors(model, before) == []
    covered = adapters.coverage(model, adapter)
    assert (covered.share, covered.left_out, covered.unmatched) == (1.0, [], [])
    tuned = logits(model)
    assert (tuned - plain).abs().max() > 1e-2
    adapters.save_adapter(model, tmp_path / "adapter", "base")
    again = attached(kind)[0]
    assert adapters.read_adapter(again, tmp_path / "adapter") == len(before)
    torch.testing.assert_close(logits(again), tuned, rtol=0, atol=1e-6)
    by_peft = PeftModel.from_pretrained(model_of(kind), tmp_path / "adapter")
    torch.testing.assert_close(logits(by_peft), tuned, rtol=0, atol=1e-6)
    merged, difference = adapters.merge(model, [PROBE])
    assert difference < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(alone), tuned, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "llama4_text", "jetmoe", "gpt2"])
def test_all_linear_leaves_nothing_out(kind: str) -> None:
    """Dense layers and shared experts beside fused ones, which peft would drop without a word; a router that is a
    linear layer by its class only; experts under other names; GPT-2's layers, which lie the other way round.
    """
    model, adapter = attached(kind)
    before = train(model)
    assert adapters.dead_tensors(model, before) == []
    found = adapters.coverage(model, adapter)
    assert (found.share, found.left_out) == (1.0, [])
    assert not any("lm_head" in name or "router.lora" in name for name in before)
    assert kind == "gpt2" or sum("experts." in name or "_linear." in name for name in before) >= 4
    assert adapters.merge(model, [PROBE])[1] < 1e-5


@pytest.mark.parametrize(
    ("targets", "reached"),
    [
        (["experts"], {"gate_up_proj", "down_proj"}),
        (["experts.down_proj"], {"down_proj"}),
        (["gate_up_proj", "q_proj"], {"gate_up_proj", "q_proj"}),
    ],
)
def test_experts_have_names(targets: list[str], reached: set[str]) -> None:
    model, adapter = attached("mixtral", targets=targets)
    found = adapters.coverage(model, adapter)
    left = {name.rpartition(".")[2] for name in found.left_out}
    assert left == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"} - reached
    assert found.unmatched == []
    assert 0 < found.share < 1


def test_coverage_names_what_was_asked_for_and_is_not_there() -> None:
    model, _ = attached("mixtral", targets=["q_proj"])
    found = adapters.coverage(model, Adapter(targets=["q_proj", "w1"]))
    assert found.unmatched == ["w1"]
    assert (found.covered, found.total) == (2, 12)


@pytest.mark.parametrize(
    ("settings", "field"), [({"dropout": 0.1}, "adapter.dropout"), ({"dora": True}, "adapter.dora")]
)
def test_what_experts_cannot_have_is_refused_with_the_way_out(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=f"{field}.*leave down_proj, gate_up_proj out: .k_proj, o_proj"):
        attached("mixtral", **settings)
    attached("mixtral", targets=["q_proj"], **settings)


def test_experts_stay_in_full_size_over_a_quantized_base() -> None:
    """Layers beside them are quantized, and merge as ever; a dense layer that peft takes for an expert is refused."""
    section = Quantization(kind="int8")
    adapter = Adapter(rank=4, alpha=8)
    model: Any = adapters.attach_adapter(quantized(model_of("mixtral"), section), adapter, "language-modeling", 0)
    before = train(model)
    assert adapters.dead_tensors(model, before) == []
    assert adapters.coverage(model, adapter).share == 1.0
    with pytest.raises(RecipeError, match=r"in full size only; leave .* or quantization.kind=none"):
        adapters.attach_adapter(quantized(model_of("qwen3_moe"), section), adapter, "language-modeling", 0)


def test_half_precision_base_has_adapters_in_float32() -> None:
    model, _ = attached("mixtral", base={"dtype": torch.bfloat16})
    assert {p.dtype for _, p in adapters.trainable_tensors(model)} == {torch.float32}
    before = train(model)
    assert adapters.dead_tensors(model, before) == []
    assert next(p for name, p in model.named_parameters() if "gate_up_proj" in name).dtype == torch.bfloat16
    assert adapters.merge(model, [PROBE])[1] < 5e-2


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")  # peft, reading the adapter over a tied base
@pytest.mark.parametrize(("kind", "target"), [("llama", "lm_head"), ("llama", "embed_tokens"), ("gpt2", "lm_head")])
def test_tied_head_lives_on_after_a_merge(kind: str, target: str, tmp_path: Path) -> None:
    """It is untied: transformers alone, which ties again what the configuration calls tied, says the same."""
    model, adapter = attached(kind, base={"tie_word_embeddings": True}, targets=[target])
    before = train(model)
    assert adapters.dead_tensors(model, before) == []
    assert adapters.coverage(model, adapter).covered == 1
    tuned = logits(model)
    adapters.save_adapter(model, tmp_path / "adapter", "base")
    by_peft = PeftModel.from_pretrained(model_of(kind, tie_word_embeddings=True), tmp_path / "adapter")
    torch.testing.assert_close(logits(by_peft), tuned, rtol=0, atol=1e-6)
    merged, difference = adapters.merge(model, [PROBE])
    assert difference < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(alone), tuned, rtol=0, atol=1e-5)
    assert alone.config.tie_word_embeddings is False


def test_head_stays_tied_where_no_adapter_is_on_it() -> None:
    model, _ = attached("llama", base={"tie_word_embeddings": True})
    base = model.get_base_model()
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert base.config.tie_word_embeddings


def test_head_that_is_tied_to_more_than_the_embedding_is_refused() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForMaskedLM.from_config(config)
    with pytest.raises(RecipeError, match=r"ties this weight to others .*cls.predictions"):
        adapters.attach_adapter(model, Adapter(targets=["decoder"]), "language-modeling", 0)


def test_what_peft_refuses_is_an_error_with_names() -> None:
    """It knows of models that read a layer's weight past the layer."""
    size = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8}
    config = AutoConfig.for_model("mamba", **size)
    with pytest.raises(RecipeError, match=r"refuses some of \[dt_proj, in_proj, out_proj, x_proj\]: .*out_proj"):
        adapters.attach_adapter(AutoModelForCausalLM.from_config(config), Adapter(), "language-modeling", 0)
    named = Adapter(targets=["in_proj", "x_proj"])
    adapters.attach_adapter(AutoModelForCausalLM.from_config(config), named, "language-modeling", 0)


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_every_new_layer_of_a_head_is_trained_as_a_whole(kind: str) -> None:
    size = {"vocab_size": 61, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4}
    model: nn.Module = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("distilbert", **size))
    if kind != "none":
        model = quantized(model, Quantization(kind=kind))
    model = adapters.attach_adapter(model, Adapter(rank=4), "text-classification", 0)
    whole = {name for name, _ in adapters.trainable_tensors(model) if "lora_" not in name}
    heads = ("pre_classifier", "classifier")
    parts = ("weight", "bias")
    assert whole == {f"base_model.model.{head}.modules_to_save.default.{part}" for head in heads for part in parts}


@pytest.mark.parametrize("target", ["lm_head", "shared"])
def test_ends_of_an_encoder_decoder_are_refused(target: str) -> None:
    """T5's embedding has four places."""
    size = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**size))
    with pytest.raises(RecipeError, match=r"ties this weight to others .*encoder\.embed_tokens"):
        adapters.attach_adapter(model, Adapter(targets=[target]), "summarization", 0)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
def test_layer_that_peft_leaves_out_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does with qwen3_moe's dense layers, did we not know."""
    monkeypatch.setattr(adapters, "_rewritten", lambda model, name: False)
    with pytest.raises(RecipeError, match=r"peft adapts 3 weights more or fewer than these: .*layers.0.mlp.gate_proj"):
        attached("qwen3_moe")


def test_adapter_of_another_model_is_not_read(tmp_path: Path) -> None:
    model, _ = attached("mixtral", targets=["q_proj"])
    adapters.save_adapter(model, tmp_path, "base")
    with pytest.raises(IngotError, match="one of another model"):
        adapters.read_adapter(attached("mixtral")[0], tmp_path)
