"""The model that trains, and the one that is exported, on one rank."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ingot.assembly import _whole_because, build, rebuilt
from ingot.errors import CheckpointError
from ingot.model.adapters import trainable_tensors
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.recipe import Recipe
from ingot.recipe_io import parse_recipe
from ingot.train.checkpoint import Checkpoints, Progress, step_name

CPU = torch.device("cpu")


def recipe_of(folder: Path, **sections: dict[str, Any]) -> Recipe:
    model = {"source": str(folder), "dtype": "float32", **sections.pop("model", {})}
    base = {"name": "assembly", "data": {"train": "unused"}, "objective": {"task": "language-modeling"}, "model": model}
    base["parallel"] = {"strategy": "none"}
    return parse_recipe({**base, **sections})


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_rebuilt_holds_the_weights_of_the_checkpoint(model_folder: Path, tmp_path: Path, kind: str) -> None:
    """And what the adapter started from, drawn again from the seed."""
    recipe = recipe_of(model_folder, adapter={"kind": kind, "rank": 4})
    model, initial, fill = build(recipe, tmp_path, (), Ranks())
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
    model, _, _ = build(recipe, tmp_path, (), Ranks())
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
