"""What a verb does inside: "auto" is decided, said and written down."""

from pathlib import Path

import pytest
import torch

from ingot.errors import RecipeError
from ingot.model.load import load_model
from ingot.ranks import Ranks
from ingot.recipe import Recipe
from ingot.recipe_io import parse_recipe
from ingot.stages import resolve

CPU = torch.device("cpu")


def recipe(folder: Path, **model: str) -> Recipe:
    """A recipe whose data is never opened."""
    return parse_recipe({"name": "stages", "model": {"source": str(folder), **model}, "data": {"train": "unused"}})


def test_auto_becomes_how_rows_lie_and_who_attends(model_folder: Path) -> None:
    said: list[str] = []
    resolved = resolve(recipe(model_folder), Path(), Ranks(), CPU, said.append)
    assert (resolved.data.batches, resolved.model.attention) == ("padding-free", "sdpa")
    assert said == []
    assert resolve(resolved, Path(), Ranks(), CPU) == resolved


def test_the_model_carries_the_backend_that_was_asked_for(model_folder: Path) -> None:
    for name, inside in (("eager", "ingot_eager"), ("auto", "ingot")):
        resolved = resolve(recipe(model_folder, attention=name), Path(), Ranks(), CPU)
        model = load_model(resolved.model, Path(), "chat-completion")
        assert model.config._attn_implementation == inside


def test_a_backend_that_this_machine_lacks_is_an_error(model_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.attention = 'flex': flex has a backward pass on CUDA only"):
        resolve(recipe(model_folder, attention="flex"), Path(), Ranks(), CPU)


def test_what_could_not_be_decided_as_usual_is_said(tmp_path: Path) -> None:
    from transformers import StableLmConfig

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    StableLmConfig(**sizes, num_attention_heads=4, num_key_value_heads=2).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    said: list[str] = []
    resolved = resolve(recipe(tmp_path), Path(), Ranks(), CPU, said.append)
    assert resolved.data.batches == "padded"
    assert said == ["data.batches=padded: StableLmAttention is not told where rows end"]
