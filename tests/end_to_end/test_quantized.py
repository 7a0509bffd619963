"""An adapter over a quantized base, from recipe to scores: what is exported is what was trained."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ingot.model.quantize import rounded
from ingot.recipe import Quantization


def in_four_bits(source: str, out: Path) -> Any:
    """The model in `source`, kept in `out` in bitsandbytes' NF4."""
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=options)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return model


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_exported_model_is_the_trained_one(ingot, project, kind):
    project.write(quantization={"kind": kind})
    done = ingot("run", project.recipe)
    assert done.code == 0, done.err
    facts = json.loads((project.run / "run.json").read_text())["stages"]["finetune"]
    assert facts["merge_difference"] < 1e-4
    assert 1e-3 < facts["merge_difference_full_base"] < 0.5  # another base than it learned over
    base = AutoModelForCausalLM.from_pretrained(project.values["model"]["source"])
    assert facts["parameters"] - facts["trainable_parameters"] == sum(p.numel() for p in base.parameters())
    merged = AutoModelForCausalLM.from_pretrained(project.run / "model")
    adapter = load_file(project.run / "adapter" / "adapter_model.safetensors")
    over = rounded(AutoModelForCausalLM.from_pretrained(project.values["model"]["source"]), Quantization(kind=kind))
    for layer in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        a, b = (adapter[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
        learned_over = merged.get_submodule(layer).weight - 2.0 * b @ a
        torch.testing.assert_close(learned_over, over.get_submodule(layer).weight, rtol=0, atol=1e-6)
        assert (learned_over - base.get_submodule(layer).weight).abs().max() > 1e-5
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight)


def test_a_checkpoint_in_four_bits_is_trained_over_as_it_is(ingot, project, tmp_path):
    four = in_four_bits(project.values["model"]["source"], tmp_path / "four")
    model = project.values["model"] | {"source": str(tmp_path / "four")}
    done = ingot("finetune", project.write(model=model))
    assert done.code == 2 and "quantization.kind = 'none'" in done.err and "use nf4" in done.err and not project.runs
    # bitsandbytes answers on a CPU only where inputs are a multiple of 64, so the base itself is not measured
    done = ingot("run", project.write(model=model, quantization={"kind": "nf4"}, evaluate={"base": False}))
    assert done.code == 0, done.err
    facts = json.loads((project.run / "run.json").read_text())["stages"]["finetune"]
    assert facts["merge_difference"] < 1e-4 and "merge_difference_full_base" not in facts  # there is no other base
    merged = AutoModelForCausalLM.from_pretrained(project.run / "model")
    adapter = load_file(project.run / "adapter" / "adapter_model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
    packed = four.get_submodule(layer).weight
    # In rows of a block: bitsandbytes 0.50 takes another block's scale for half of the weights in rows of 32 or 96.
    state, shape = packed.quant_state, packed.quant_state.shape
    state.shape = torch.Size((shape.numel() // 64, 64))
    whole = bnb.dequantize_4bit(packed.data, state).float().view(shape)
    torch.testing.assert_close(merged.get_submodule(layer).weight - 2.0 * b @ a, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "head"])
def test_a_classifier_over_a_checkpoint_in_four_bits(ingot, make_project, model_folder, tmp_path, pooling):
    in_four_bits(model_folder, tmp_path / "four")
    project = make_project(model_folder, "text-classification")
    project.write(model={"source": str(tmp_path / "four"), "pooling": pooling})
    done = ingot("run", project.write(quantization={"kind": "nf4"}, evaluate={"base": False}))
    assert done.code == 0, done.err
    facts = json.loads((project.run / "run.json").read_text())["stages"]["finetune"]
    assert facts["merge_difference"] < 1e-4
    assert "quantization_config" not in json.loads((project.run / "model" / "config.json").read_text())


def test_an_adapter_s_package_over_four_bits_is_refused_before_training(ingot, project, tmp_path):
    in_four_bits(project.values["model"]["source"], tmp_path / "four")
    project.write(model={"source": str(tmp_path / "four")}, quantization={"kind": "nf4"}, evaluate={"base": False})
    done = ingot("run", project.write(package={"enabled": True, "forms": ["merged", "adapter"]}))
    assert done.code == 2 and "package.forms = 'adapter': " in done.err and "in few bits" in done.err, done.err
    assert not (project.run / "metrics.jsonl").exists()


def test_quantized_full_fine_tuning_is_refused(ingot, project):
    done = ingot("finetune", project.write(quantization={"kind": "nf4"}, adapter={"kind": "none"}))
    assert done.code == 2
    assert "quantization.kind = 'nf4'" in done.err
    assert "adapter.kind=lora" in done.err
    assert not project.runs
