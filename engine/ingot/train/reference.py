"""dpo's reference: log-probabilities of all answers under the starting model, taken once before the first step.

The policy before its first step is the reference (an adapter starts at zero, full fine-tuning at the base), so no
second model is held, whatever the strategy. The numbers are kept in the run's folder: a run that goes on must not ask
a model that has learned since.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ingot.data.encoded import Encoded
from ingot.data.loader import microbatches
from ingot.data.pairs import pairs
from ingot.data.plan import PlannedFeed
from ingot.data.rows import EncodedRows, ListRows
from ingot.errors import CheckpointError, RecipeError
from ingot.parallel.sharded import Sharded
from ingot.progress import Progress
from ingot.ranks import all_reduce_sum, on_main
from ingot.recipe import Recipe
from ingot.train.loop import Rows
from ingot.train.preferences import answer_logps

FILE = "reference.safetensors"  # train and validation: float32 [rows, 2], log-probabilities of chosen and rejected
WINDOW_ROWS = 16_384  # rows that are sorted by length together


class ReferencedRows:
    """Rows of pairs with the log-probabilities [rows, 2] of both answers under the starting model."""

    def __init__(self, rows: EncodedRows, logps_N2: NDArray[np.float32]) -> None:
        self._rows, self._logps_N2 = rows, logps_N2

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every row [rows]."""
        return self._rows.lengths

    @property
    def targets(self) -> NDArray[np.int64]:
        """Loss terms of every row [rows]."""
        return self._rows.targets

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Encoded:
        return replace(self._rows[index], reference=tuple(self._logps_N2[index].tolist()))


def with_reference(
    sharded: Sharded,
    rows: Rows,
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    *,
    begun: bool,
    alive: Callable[[], None] = lambda: None,
) -> Rows:
    """`rows` as dpo needs them, others as they are. All ranks must call it, before any step or checkpoint is loaded.

    `folder`: the run's. `begun`: it has checkpoints, so that the numbers must be there already. `alive` is called with
    every batch. Raises CheckpointError when they are missing or belong to other rows, and when the disk fails.
    """
    if recipe.objective.loss != "dpo":
        return rows
    if not isinstance(rows.train, PlannedFeed):
        raise RecipeError("data.streaming", True, "dpo asks the starting model about every row first; set it to false")
    parts = {"train": rows.train.rows, "validation": rows.validation}
    path, digest = folder / FILE, _digest(parts)
    main = sharded.layout.ranks.main
    if on_main(lambda: _is_there(path, digest, begun)):
        found = _read(path) if main else {name: torch.zeros(len(part), 2) for name, part in parts.items()}
        found = {name: _shared(values.to(sharded.device)) for name, values in found.items()}
    else:
        with progress.stage("reference", total=sum(map(len, parts.values())), unit="pairs") as bar:

            def tick(n: int) -> None:
                alive()
                bar.advance(n)

            found = {name: _logps(sharded, part, recipe, rows.pad_id, tick) for name, part in parts.items()}
        on_main(lambda: _write(path, found, digest))
    held = {name: ReferencedRows(parts[name], values.cpu().numpy()) for name, values in found.items()}
    return replace(rows, train=rows.train.over(held["train"]), validation=held["validation"])


def referenced(sharded: Sharded, rows: Sequence[Encoded], recipe: Recipe, pad_id: int) -> list[Encoded]:
    """`rows` as dpo needs them, others as they are; for a trial of a model that has learned nothing yet."""
    if recipe.objective.loss != "dpo":
        return list(rows)
    held = ListRows(rows)
    logps_N2 = _logps(sharded, held, recipe, pad_id, lambda n: None).cpu().numpy()
    known = ReferencedRows(held, logps_N2)
    return [known[index] for index in range(len(held))]


@torch.no_grad()
def _logps(sharded: Sharded, rows: EncodedRows, recipe: Recipe, pad_id: int, tick: Callable[[int], None]) -> Tensor:
    """Log-probabilities of all answers, float32 [rows, 2], the same on all ranks; each has asked for its share."""
    sharded.wrapped.eval()
    layout, flat, lengths = sharded.layout, recipe.data.batches != "padded", rows.lengths
    found_N2 = torch.zeros(len(rows), 2, device=sharded.device)

    def ask(part: list[int]) -> Tensor:
        return answer_logps(sharded, pairs([rows[index] for index in part], pad_id, flat=flat)).float()

    for start in range(0, len(rows), WINDOW_ROWS):
        packs = [[index] for index in range(start, min(start + WINDOW_ROWS, len(rows)))]
        known = {index: int(lengths[index]) for [index] in packs}
        budget = recipe.train.tokens_per_microbatch
        shares = [microbatches(packs, known, rank, layout.data, budget, flat) for rank in range(layout.data)]
        mine = shares[layout.data_rank]
        for part in mine:
            found_N2[part] = ask(part)
            tick(len(part) * layout.data)
        if sharded.even:  # parameters travel in forward passes: as many on every rank
            for _ in range(max(map(len, shares)) - len(mine)):
                ask([min(known, key=known.__getitem__)])
    return _shared(found_N2) / layout.tensor


def _shared(values: Tensor) -> Tensor:
    """Summed over ranks, of which one has each number and the others have 0."""
    return all_reduce_sum(values) if values.numel() else values


def _digest(parts: dict[str, EncodedRows]) -> str:
    """Tells rows from others: their lengths and numbers of targets, in order."""
    found = hashlib.sha256()
    for part in parts.values():
        found.update(np.ascontiguousarray(part.lengths).tobytes())
        found.update(np.ascontiguousarray(part.targets).tobytes())
    return found.hexdigest()


def _is_there(path: Path, digest: str, begun: bool) -> bool:
    if not path.exists():
        if begun:
            raise CheckpointError(
                f"{path} is missing: without the starting model's log-probabilities dpo cannot go on; start a new run"
            )
        return False
    try:
        with safe_open(path, framework="pt") as file:
            rows = (file.metadata() or {}).get("rows")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); start a new run") from error
    if rows != digest:
        raise CheckpointError(f"{path} belongs to other rows: the data changed since this run began; start a new run")
    return True


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in ("train", "validation")}


def _write(path: Path, found: dict[str, Tensor], digest: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: values.cpu().contiguous() for name, values in found.items()}, partial, {"rows": digest})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be written ({reason}); free some disk, then start again") from error
    finally:
        partial.unlink(missing_ok=True)
