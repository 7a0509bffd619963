"""A sharded checkpoint becomes the very folder that saving the model in one piece gives, and others load it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ingot.errors import CheckpointError, RecipeError
from ingot.model import adapters
from ingot.model.load import load_model
from ingot.model.pooling import MeanPoolClassifier
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.recipe import Recipe
from ingot.recipe_io import parse_recipe
from ingot.train import consolidate as module
from ingot.train.checkpoint import Checkpoints, Progress
from ingot.train.consolidate import consolidate

LABELS = ("bad", "fair", "good")


def recipe_for(source: Path, task: str = "language-modeling", **sections: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "tiny",
            "model": {"source": str(source), "dtype": "float32", **sections.pop("model", {})},
            "data": {"train": "unused", "max_tokens": 32},
            "objective": {"task": task},
            "parallel": {"strategy": "none"},
            **sections,
        }
    )


def trained(recipe: Recipe, folder: Path) -> tuple[Any, Path]:
    """A model whose every trainable weight has moved, and its checkpoint."""
    labels = LABELS if recipe.objective.task == "text-classification" else ()
    model = load_model(recipe.model, folder, recipe.objective.task, labels, seed=recipe.train.seed)
    model = adapters.attach_adapter(model, recipe.adapter, recipe.objective.task, recipe.train.seed)
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in adapters.trainable_tensors(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    sharded = parallelize(model, Ranks(), recipe, torch.device("cpu"), torch.float32)
    checkpoints = Checkpoints(folder / "checkpoints", Ranks(), "hash", keep=1)
    checkpoints.save(sharded, Progress(steps=1, recipe_hash="hash", step=1))
    checkpoints.wait()
    return model.eval(), checkpoints.last.resolve()


def same_tensors(a: Path, b: Path) -> None:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("more", [{}, {"dora": True, "rslora": True}], ids=["lora", "dora"])
def test_an_adapter_is_what_peft_saves(model_folder, tmp_path, more):
    recipe = recipe_for(model_folder, adapter={"kind": "lora", "rank": 4, **more})
    model, checkpoint = trained(recipe, tmp_path)
    out = consolidate(checkpoint, tmp_path / "out", recipe, tmp_path)
    adapters.save_adapter(model, tmp_path / "whole", str(model_folder))
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))
    same_tensors(out / "adapter_model.safetensors", tmp_path / "whole" / "adapter_model.safetensors")
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (out, tmp_path / "whole")]
    assert configs[0] == configs[1]

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    loaded = PeftModel.from_pretrained(base, out).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_an_adapter_on_experts_and_a_tied_head(tiny_tokenizer, tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=32, moe_intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64, mlp_only_layers=[0], tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "experts", "gate_proj", "lm_head", "embed_tokens"]
    recipe = recipe_for(tmp_path / "base", adapter={"kind": "lora", "rank": 4, "targets": targets})
    model, checkpoint = trained(recipe, tmp_path)
    out = consolidate(checkpoint, tmp_path / "out", recipe, tmp_path)
    adapters.save_adapter(model, tmp_path / "whole", str(tmp_path / "base"))
    same_tensors(out / "adapter_model.safetensors", tmp_path / "whole" / "adapter_model.safetensors")
    assert len(load_file(out / "adapter_model.safetensors")) == 2 * (2 + 2 + 1 + 1 + 1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", tie_word_embeddings=False)
    base.lm_head.weight.data.copy_(base.model.embed_tokens.weight)
    loaded = PeftModel.from_pretrained(base, out).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_a_classifiers_adapter_brings_its_head(head_folder, tmp_path):
    recipe = recipe_for(head_folder, "text-classification", adapter={"kind": "lora"}, model={"pooling": "head"})
    model, checkpoint = trained(recipe, tmp_path)
    out = consolidate(checkpoint, tmp_path / "out", recipe, tmp_path, LABELS)
    base = AutoModelForSequenceClassification.from_pretrained(head_folder, num_labels=3)
    loaded = PeftModel.from_pretrained(base, out).eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_a_whole_model_is_what_transformers_saves(model_folder, tmp_path):
    recipe = recipe_for(model_folder, adapter={"kind": "none"})
    model, checkpoint = trained(recipe, tmp_path)
    out = consolidate(checkpoint, tmp_path / "out", recipe, tmp_path)
    model.save_pretrained(tmp_path / "whole")
    same_tensors(out / "model.safetensors", tmp_path / "whole" / "model.safetensors")
    configs = [json.loads((path / "config.json").read_text()) for path in (out, tmp_path / "whole")]
    assert configs[0] == configs[1]
    assert (out / "generation_config.json").is_file()
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # weights are read by whoever reads the rest
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(out)("hello").input_ids
        == AutoTokenizer.from_pretrained(model_folder)("hello").input_ids
    )


def test_in_the_recipes_dtype_and_in_several_files(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10_000)
    held: list[int] = []
    real = module.save_file

    def save_file(tensors, *args, **options):
        held.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        real(tensors, *args, **options)

    monkeypatch.setattr(module, "save_file", save_file)
    recipe = recipe_for(model_folder, adapter={"kind": "none"})
    model, checkpoint = trained(recipe, tmp_path)
    bf16 = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    out = consolidate(checkpoint, tmp_path / "out", bf16, tmp_path)
    largest = max(2 * parameter.numel() for parameter in model.parameters())
    assert len(held) > 3
    assert max(held) <= max(10_000, largest)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(held) == sum(2 * p.numel() for p in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    for (name, before), after in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(before.bfloat16(), after), name


def test_fused_experts_load(tiny_tokenizer, tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=32, moe_intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    recipe = recipe_for(tmp_path / "base", adapter={"kind": "none"})
    model, checkpoint = trained(recipe, tmp_path)
    out = consolidate(checkpoint, tmp_path / "out", recipe, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for (name, before), after in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(before, after), name


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_a_mean_pooling_classifier(mean_folder, tmp_path, kind):
    recipe = recipe_for(mean_folder, "text-classification", adapter={"kind": kind}, model={"pooling": "mean"})
    model, checkpoint = trained(recipe, tmp_path)
    out = consolidate(checkpoint, tmp_path / "out", recipe, tmp_path, LABELS)
    if kind == "lora":
        adapters.save_adapter(model, tmp_path / "whole", str(mean_folder))
        same_tensors(out / "adapter_model.safetensors", tmp_path / "whole" / "adapter_model.safetensors")
        return
    loaded = MeanPoolClassifier.from_pretrained(out)
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids)
    torch.testing.assert_close(loaded(ids, mask), model(ids, mask), rtol=0, atol=1e-5)


def test_without_a_recipe_weights_alone(model_folder, tmp_path):
    recipe = recipe_for(model_folder, adapter={"kind": "none"})
    model, checkpoint = trained(recipe, tmp_path)
    out = consolidate(checkpoint, tmp_path / "out", None, tmp_path)
    assert os.listdir(out) == ["model.safetensors"]
    found = load_file(out / "model.safetensors")
    assert found.keys() == dict(model.named_parameters()).keys()


def test_an_adapter_without_its_recipe_is_refused(model_folder, tmp_path):
    recipe = recipe_for(model_folder, adapter={"kind": "lora"})
    _, checkpoint = trained(recipe, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds an adapter.*name the run"):
        consolidate(checkpoint, tmp_path / "out", None, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints"]


@pytest.mark.parametrize("fault", ["full folder", "a file", "damaged", "another model"])
def test_what_cannot_be_consolidated(model_folder, tmp_path, fault):
    recipe = recipe_for(model_folder, adapter={"kind": "none"})
    _, checkpoint = trained(recipe, tmp_path)
    out, error, said = tmp_path / "out", CheckpointError, "is damaged: shard-.* has 99 bytes"
    if fault == "full folder":
        out.mkdir()
        (out / "mine").write_text("")
        error, said = RecipeError, r"OUT = '.*out': something is there already"
    elif fault == "a file":
        out.write_text("")
        error, said = RecipeError, r"OUT = '.*out': something is there already"
    elif fault == "damaged":
        os.truncate(next(checkpoint.glob("*.safetensors")), 99)
    else:
        config = json.loads((model_folder / "config.json").read_text())
        (model_folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        said = r"does not fit its recipe: \['model.layers.2"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=said):
        consolidate(checkpoint, out, recipe, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
