"""Resumable checkpoints: sharded safetensors and JSON only, published by one rename, so that a half-written one is never
seen.

Randomness needs no state: dropout is seeded from (seed, step, rank) and row order is a function of (seed, epoch).
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from ingot.data.plan import Cursor
from ingot.errors import CheckpointError
from ingot.parallel.sharded import OPTIMIZER, Sharded
from ingot.ranks import Ranks, on_main


@dataclass(frozen=True)
class Progress:
    """Where training stands after `step` optimizer steps."""

    steps: int
    recipe_hash: str
    step: int = 0
    tokens: int = 0
    cursor: Cursor = Cursor()
    skipped: int = 0
    recent_losses: tuple[float, ...] = ()
    validation_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None

    def watched(self, loss: float) -> "Progress":
        """With the validation loss of this step."""
        if self.best_loss is None or loss < self.best_loss:
            return replace(self, validation_loss=loss, best_loss=loss, best_step=self.step)
        return replace(self, validation_loss=loss)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """What `asdict` and JSON made of one."""
        values = values | {"cursor": Cursor(**values["cursor"]), "recent_losses": tuple(values["recent_losses"])}
        return cls(**values)


class Checkpoints:
    """The checkpoints of a run: `folder`/step-NNNNNN, and the links `last` and `best`."""

    def __init__(self, folder: Path, ranks: Ranks, recipe_hash: str, keep: int) -> None:
        self.folder, self.ranks, self.recipe_hash, self.keep = folder, ranks, recipe_hash, keep

    @property
    def last(self) -> Path:
        """The newest one."""
        return self.folder / "last"

    def save(self, sharded: Sharded, progress: Progress) -> None:
        """Copy the state and write it in the background."""
        name = f"step-{progress.step:06d}"
        final, partial = self.folder / name, self.folder / f".{name}.partial"
        on_main(lambda: (shutil.rmtree(partial, ignore_errors=True), partial.mkdir(parents=True))[1])
        dcp.save(
            dict(sharded.state()), storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True)
        )

        def publish() -> None:
            (partial / "progress.json").write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            _link(self.folder / "last", name)
            if progress.best_step == progress.step:
                _link(self.folder / "best", name)
            _prune(self.folder, self.keep)

        on_main(publish)

    def failed(self) -> CheckpointError | None:
        """What went wrong with the write in the background."""
        return None

    def wait(self) -> None:
        """Until the write in the background is published. Raises its CheckpointError."""

    def load(
        self, sharded: Sharded, name: str, notify: Callable[[str], None], *, weights_only: bool = False
    ) -> Progress:
        """Fill `sharded` from a checkpoint."""
        path = self.folder / name
        progress = Progress.from_json(json.loads((path / "progress.json").read_text(encoding="utf-8")))
        if progress.recipe_hash != self.recipe_hash:
            raise CheckpointError(
                f"{path} was written by another recipe (hash {progress.recipe_hash}, now {self.recipe_hash}); "
                "start a new run, or restore its recipe"
            )
        state = {
            key: value for key, value in sharded.state().items() if not (weights_only and key.startswith(OPTIMIZER))
        }
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path)))
        sharded.load(state)
        return progress


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
