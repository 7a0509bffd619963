"""A model without weights: names and shapes of what trains, for putting a checkpoint's weights where a reader looks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ingot.model.adapters import attach_adapter, trainable_tensors
from ingot.model.load import load_model
from ingot.model.pooling import CLASSIFIER_FILE, MeanPoolClassifier
from ingot.model.source import model_folder
from ingot.recipe import Recipe


def skeleton(recipe: Recipe, home: Path, labels: tuple[str, ...]) -> nn.Module:
    """The model that `recipe` trains, adapter included, on the meta device: no weight is read."""
    with torch.device("meta"):
        model = load_model(
            recipe.model, home, recipe.objective.task, labels, dtype=getattr(torch, recipe.model.dtype), read=_hollow
        )
        return attach_adapter(model, recipe.adapter, recipe.objective.task, recipe.train.seed)


def _hollow(kind: Any, _: Path, **options: Any) -> nn.Module:
    """In place of `kind.from_pretrained`."""
    kept = ("config", "dtype", "attn_implementation", "trust_remote_code")
    model: nn.Module = kind.from_config(**{name: value for name, value in options.items() if name in kept})
    return model


def fill_trainable(model: nn.Module, fill: Callable[[dict[str, Tensor]], None]) -> None:
    """Give the trainable tensors of a skeleton memory on the CPU, and let `fill` put values in by their names."""
    for name, parameter in list(trainable_tensors(model)):
        owner, _, key = name.rpartition(".")
        fresh = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        setattr(model.get_submodule(owner), key, nn.Parameter(fresh))
    fill({name: parameter.detach() for name, parameter in trainable_tensors(model)})


def places(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Name of a weight in training -> (file without its ending, name there), as `save_pretrained` has them."""
    if not isinstance(model, MeanPoolClassifier):
        return {name: ("model", name) for name, _ in trainable_tensors(model)}
    found = {}
    for name, _ in trainable_tensors(model):
        part, _, rest = name.partition(".")
        found[name] = ("model", rest) if part == "backbone" else (CLASSIFIER_FILE.removesuffix(".safetensors"), rest)
    return found


def save_description(model: nn.Module, recipe: Recipe, home: Path, folder: Path) -> None:
    """Write the configuration, what generation starts from, and code that the model brought along."""
    plain: Any = model.backbone if isinstance(model, MeanPoolClassifier) else model
    plain.config.architectures = [type(plain).__name__]
    plain.config.dtype = recipe.model.dtype
    plain.config.save_pretrained(folder)
    if plain.can_generate():
        plain.generation_config.save_pretrained(folder)
    if recipe.model.trust_remote_code:
        for path in model_folder(recipe.model, home).glob("*.py"):
            (folder / path.name).write_bytes(path.read_bytes())
