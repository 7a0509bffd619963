"""Resumable checkpoints: safetensors and JSON only, published by one rename, so that a half-written one is never seen.

Randomness needs no state: dropout is seeded from (seed, step, rank) and row order is a function of (seed, epoch).
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ingot.errors import CheckpointError
from ingot.model.adapters import trainable_tensors


@dataclass(frozen=True)
class Progress:
    """Where training stands after `step` optimizer steps."""

    step: int
    steps: int
    tokens: int
    recipe_hash: str
    validation_loss: float | None
    best_step: int | None
    best_loss: float | None


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int) -> Path:
    """Write `folder`/step-NNNNNN, move the links `last` and `best`, drop all but the newest `keep` and the best.

    Raises CheckpointError when the disk fails; everything that was there before is untouched then.
    """
    name = f"step-{progress.step:06d}"
    final, partial = folder / name, folder / f".{name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        weights = {key: p.detach().cpu().contiguous() for key, p in trainable_tensors(model)}
        save_file(weights, partial / "trainable.safetensors")
        save_file(_optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
        (partial / "progress.json").write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")
        for file in partial.iterdir():
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _link(folder / "last", name)
        if progress.best_step == progress.step:
            _link(folder / "best", name)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
        shutil.rmtree(partial, ignore_errors=True)
        last = folder / "last"
        kept = f"the last good one is {last.resolve()}" if last.exists() else "there is none before it"
        raise CheckpointError(
            f"checkpoint {final} could not be written ({getattr(error, 'strerror', None) or error}); {kept}. "
            "Free some disk, then --resume"
        ) from error
    _prune(folder, keep)
    return final


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, recipe_hash: str) -> Progress:
    """Read a checkpoint back into `model` (and `optimizer`); another recipe's checkpoint is refused."""
    try:
        progress = Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
        weights = load_file(path / "trainable.safetensors")
        moments = load_file(path / "optimizer.safetensors") if optimizer is not None else {}
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"no usable checkpoint at {path} ({error})") from error
    if progress.recipe_hash != recipe_hash:
        raise CheckpointError(
            f"{path} was written by another recipe (hash {progress.recipe_hash}, now {recipe_hash}); "
            "start a new run, or restore its recipe"
        )
    parameters = dict(trainable_tensors(model))
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())[0]
        raise CheckpointError(f"{path} does not fit the model: {odd} is in only one of them")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    if optimizer is not None:
        for name, parameter in parameters.items():
            optimizer.state[parameter] = {
                key: moments[f"{name}/{key}"].to(_home(key, parameter)) for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return progress


def _home(key: str, parameter: torch.Tensor) -> torch.device:
    return parameter.device if key != "step" or parameter.is_cuda else torch.device("cpu")


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, p in trainable_tensors(model)
        for key, value in optimizer.state.get(p, {}).items()
    }


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _link(link: Path, target: str) -> None:
    """Point `link` at `target` in one step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, link)


def _prune(folder: Path, keep: int) -> None:
    steps = sorted(folder.glob("step-*"))
    protected = {(folder / name).resolve() for name in ("best", "last") if (folder / name).exists()}
    for path in steps[:-keep]:
        if path.resolve() not in protected:
            shutil.rmtree(path, ignore_errors=True)
