"""A sharded checkpoint -> one folder that transformers or peft loads, tensor by tensor: memory holds one output file.

torch's own consolidation (2.13) leaves 0-dimensional tensors at zero and knows no names but its own; this one reads
through its reader.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ingot.errors import CheckpointError, RecipeError
from ingot.model import adapters, skeleton
from ingot.model.load import load_tokenizer
from ingot.model.modes import make_readable
from ingot.parallel.sharded import MODEL
from ingot.recipe import Recipe
from ingot.train import manifest
from ingot.train.shards import Written

MAX_FILE_BYTES = 5_000_000_000
LORA = "lora_"


def consolidate(
    checkpoint: Path,
    out: Path,
    recipe: Recipe | None,
    home: Path,
    labels: tuple[str, ...] = (),
) -> Path:
    """Write the trained weights of `checkpoint` to the new folder `out`, in one step; return it.

    With the recipe of its run: a complete Hugging Face folder in the recipe's `model.dtype`, or for an adapter peft's
    own layout in float32. Without: weights and index alone, as they are.

    Raises RecipeError for an `out` that holds something, CheckpointError for a damaged checkpoint or a full disk.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError("OUT", str(out), "something is there already; name a new folder")
    content = manifest.read(checkpoint)
    wrong = manifest.strangers(checkpoint, content) or "; ".join(manifest.problems(checkpoint, content))
    if wrong:
        raise CheckpointError(f"{checkpoint} is damaged: {wrong}")
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        written = Written(checkpoint)
        if recipe is None:
            _weights(written, partial, {name: ("model", name) for name in _trained(written)}, None)
        elif recipe.adapter.kind == "lora":
            _adapter(written, partial, recipe, home, labels)
        else:
            _model(written, partial, recipe, home, labels)
        make_readable(partial)
        os.replace(partial, out)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise CheckpointError(f"{checkpoint} could not be consolidated into {out} ({reason})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _trained(written: Written) -> list[str]:
    names = [name.removeprefix(MODEL) for name in written.tensors if name.startswith(MODEL)]
    if any(LORA in name for name in names):
        raise CheckpointError(
            f"{written.folder} holds an adapter, and what it sits on is written in its run's recipe: name the run, or "
            "put it back under RUN/checkpoints"
        )
    return names


def _adapter(written: Written, out: Path, recipe: Recipe, home: Path, labels: tuple[str, ...]) -> None:
    model = skeleton.skeleton(recipe, home, labels)
    skeleton.fill_trainable(model, lambda tensors: _fill(written, tensors))
    adapters.save_adapter(model, out, recipe.model.source.removeprefix("hf://"))


def _model(written: Written, out: Path, recipe: Recipe, home: Path, labels: tuple[str, ...]) -> None:
    model = skeleton.skeleton(recipe, home, labels)
    places = skeleton.places(model)
    missing = [name for name in places if MODEL + name not in written.tensors]
    if missing:
        raise CheckpointError(f"{written.folder} does not fit its recipe: {missing[:3]} are missing")
    _weights(written, out, places, getattr(torch, recipe.model.dtype))
    skeleton.save_description(model, recipe, home, out)
    load_tokenizer(recipe.model, home).save_pretrained(out)


def _fill(written: Written, tensors: dict[str, Tensor]) -> None:
    state = {MODEL + name: tensor for name, tensor in tensors.items()}
    written.fill(state, others=[name for name in written.tensors if name not in state])


def _weights(written: Written, out: Path, places: dict[str, tuple[str, str]], dtype: torch.dtype | None) -> None:
    """Write safetensors of at most MAX_FILE_BYTES (a larger tensor: alone), with an index where there are several."""
    for stem in sorted({stem for stem, _ in places.values()}):
        names = {name: saved for name, (file, saved) in places.items() if file == stem}
        groups = list(_groups(written, list(names), dtype))
        weight_map: dict[str, str] = {}
        total = 0
        for number, group in enumerate(groups, start=1):
            file = (
                f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
            )
            tensors = {names[name]: _read(written, name, dtype) for name in group}
            save_file(tensors, out / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (out / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _groups(written: Written, names: list[str], dtype: torch.dtype | None) -> Iterator[list[str]]:
    group: list[str] = []
    used = 0
    for name in names:
        tensor = written.tensors[MODEL + name]
        size = tensor.size.numel() * (dtype or tensor.properties.dtype).itemsize
        if group and used + size > MAX_FILE_BYTES:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield group


def _read(written: Written, name: str, dtype: torch.dtype | None) -> Tensor:
    found = written.tensors[MODEL + name]
    tensor = torch.empty(found.size, dtype=found.properties.dtype)
    _fill(written, {name: tensor})
    return tensor if dtype is None else tensor.to(dtype)
