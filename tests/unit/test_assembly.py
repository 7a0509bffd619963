"""The model that trains, and the one that is exported, on one rank."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ingot.assembly import _whole_because, build, check_build, fuse, over_full_base, rebuilt
from ingot.errors import CheckpointError, RecipeError
from ingot.model.adapters import answers, save_adapter, tied_head, trainable_tensors
from ingot.model.load import load_model
from ingot.parallel.strategies import parallelize
from ingot.progress import Progress as Quiet
from ingot.ranks import Ranks
from ingot.recipe import Kernels, Recipe
from ingot.recipe_io import parse_recipe
from ingot.train.checkpoint import Checkpoints, Progress, step_name

CPU = torch.device("cpu")


def recipe_of(folder: Path, **sections: dict[str, Any]) -> Recipe:
    model = {"source": str(folder), "dtype": "float32", **sections.pop("model", {})}
    base = {"name": "assembly", "data": {"train": "unused"}, "objective": {"task": "language-modeling"}, "model": model}
    base["parallel"] = {"strategy": "none"}
    return parse_recipe({**base, **sections})


@pytest.mark.parametrize(
    ("sections", "refused"),
    [
        ({"adapter": {"kind": "none"}}, True),
        ({"adapter": {"kind": "none"}, "model": {"dtype": "bfloat16"}}, False),
    ],
)
def test_weights_in_bfloat16_are_for_products_in_bfloat16(
    model_folder: Path, sections: dict[str, Any], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingot.model.load.cpu_has_bf16", lambda: True)  # nothing is computed
    recipe = recipe_of(model_folder, optim={"weights": "bfloat16"}, **sections)
    expected = pytest.raises(RecipeError, match=r"set model\.dtype=bfloat16 too") if refused else nullcontext()
    with expected:
        check_build(recipe, model_folder, Ranks(), CPU)


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_rebuilt_holds_the_weights_of_the_checkpoint(model_folder: Path, tmp_path: Path, kind: str) -> None:
    """And what the adapter started from, drawn again from the seed."""
    recipe = recipe_of(model_folder, adapter={"kind": kind, "rank": 4})
    model, initial, fill, _ = build(recipe, tmp_path, (), Ranks())
    assert fill is None
    sharded = parallelize(model, Ranks(), recipe, CPU, torch.float32)
    with torch.no_grad():
        for _, parameter in trainable_tensors(model):
            parameter.add_(torch.randn_like(parameter))
    checkpoints = Checkpoints(tmp_path / "checkpoints", Ranks(), "hash", 2)
    checkpoints.save(sharded, Progress(steps=5, recipe_hash="hash", step=3))
    checkpoints.wait()
    again, start = rebuilt(recipe, tmp_path, (), checkpoints.folder / step_name(3), CPU)
    trained = dict(trainable_tensors(model))
    assert list(dict(trainable_tensors(again))) == list(trained)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name
    assert list(start) == list(initial)
    for name, tensor in start.items():
        assert torch.equal(tensor, initial[name]), name


def test_rebuilt_refuses_a_checkpoint_of_another_adapter(model_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model_folder, adapter={"kind": "lora", "rank": 4})
    model, *_ = build(recipe, tmp_path, (), Ranks())
    checkpoints = Checkpoints(tmp_path / "checkpoints", Ranks(), "hash", 2)
    sharded = parallelize(model, Ranks(), recipe, CPU, torch.float32)
    checkpoints.save(sharded, Progress(steps=5, recipe_hash="hash", step=3))
    checkpoints.wait()
    other = recipe_of(model_folder, adapter={"kind": "lora", "rank": 2})
    with pytest.raises(CheckpointError, match="has shape"):
        rebuilt(other, tmp_path, (), checkpoints.folder / step_name(3), CPU)


def test_what_has_to_be_loaded_whole(tmp_path: Path) -> None:
    parts = {"strategy": "fsdp"}
    assert _whole_because(recipe_of(tmp_path, parallel=parts)) is None
    for sections, reason in (
        ({"model": {"initialization": "random"}}, "model.initialization"),
        ({"adapter": {"dora": True}}, "adapter.dora"),
        ({"quantization": {"kind": "int8"}}, "quantization.kind"),
    ):
        found = _whole_because(recipe_of(tmp_path, **{"parallel": parts, **sections}))
        assert found is not None
        assert reason in found


def test_what_a_recipe_changes_in_a_model_is_said(model_folder: Path, tmp_path: Path) -> None:
    class Notes(Quiet):
        def note(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    folder = tmp_path / "tied"
    shutil.copytree(model_folder, folder)
    config = Qwen3MoeConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    build(
        recipe_of(folder, kernels={"ops": "none"}, adapter={"kind": "lora"}), tmp_path, (), Ranks(), Notes(quiet=True)
    )
    assert said == []
    ends = recipe_of(folder, kernels={"ops": "none"}, adapter={"kind": "lora", "targets": ["lm_head"]})
    built = build(ends, tmp_path, (), Ranks(), Notes(quiet=True))
    assert said == ["adapter.targets: the output head was tied to the embedding and now has its own weight"]
    assert not tied_head(built.model)
    over = recipe_of(folder, kernels={"ops": "none"}, adapter={"kind": "lora"}, quantization={"kind": "int8"})
    build(over, tmp_path, (), Ranks(), Notes(quiet=True))
    assert said[1:] == ["quantization.kind=int8: 39% of the weights are fused experts and stay in full size"]


@pytest.mark.parametrize("words", [97, 98])
def test_ranks_that_share_matrices_are_told_of_a_head_that_they_cannot(
    model_folder: Path, tmp_path: Path, words: int
) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    LlamaConfig(vocab_size=words, num_key_value_heads=2, **shape).save_pretrained(tmp_path)
    sections = {"model": {"initialization": "random"}, "kernels": {"ops": ["linear_cross_entropy"]}}
    two, recipe = Ranks(0, 2, 0, 2), recipe_of(tmp_path, **sections, parallel={"strategy": "ddp", "tensor": 2})
    if words == 98:
        check_build(recipe, tmp_path, two, CPU)
        return
    with pytest.raises(RecipeError, match=r"parallel\.tensor = 2 does not divide its vocabulary of 97; leave it out"):
        check_build(recipe, tmp_path, two, CPU)
    auto = recipe.model_copy(update={"kernels": Kernels()})
    model = load_model(recipe.model, tmp_path, "language-modeling")
    assert "all left (parallel.tensor = 2 does not" in " ".join(fuse(model, auto, two).lines())
    assert "linear_cross_entropy: 1 replaced" in " ".join(fuse(model, auto, Ranks()).lines())


def test_distance_to_the_full_base_is_measured(model_folder: Path, tmp_path: Path) -> None:
    """Zero over the base itself; over a quantized one as far as its rounding moved the logits."""
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    found = {}
    for kind in ("none", "int8"):
        recipe = recipe_of(model_folder, adapter={"kind": "lora", "rank": 4}, quantization={"kind": kind})
        model: Any = build(recipe, tmp_path, (), Ranks(), cut=False).model
        with torch.no_grad():
            for _, parameter in trainable_tensors(model):
                parameter.copy_(torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter))
        save_adapter(model, tmp_path / kind, "base")
        found[kind] = over_full_base(recipe, tmp_path, (), tmp_path / kind, [ids], answers(model, [ids]))
    assert found["none"] < 1e-6
    assert 1e-5 < found["int8"] < 0.5
