"""Trains pairs of answers and students beside teachers on this rank; run as a script by several ranks.

    python preference_ranks.py CELLS.json OUT     (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)

A cell is {"name", "sections" of its recipe, "model"}. Rank 0 leaves OUT/NAME.json: losses, norms, what validation
measured, dpo's reference, and elements of the largest tensor that ranks exchanged, for each token.
"""

import json
import os
import random
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import cells
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from ingot.data.encoded import Encoded
from ingot.data.plan import PlannedFeed
from ingot.data.rows import ListRows
from ingot.model.adapters import attach_adapter
from ingot.model.head import attach
from ingot.parallel.strategies import parallelize
from ingot.progress import Progress
from ingot.ranks import Ranks
from ingot.train.checkpoint import Checkpoints
from ingot.train.loop import Rows, fit
from ingot.train.reference import with_reference


def pair_rows(n: int, seed: int) -> list[Encoded]:
    """Pairs of uneven answers to prompts of uneven length."""
    draw, rows = random.Random(seed), []
    for number in range(n):
        prompt = [draw.randrange(3, cells.VOCABULARY) for _ in range(draw.randint(1, 7))]
        answers = [[draw.randrange(*span) for _ in range(draw.randint(1, 8))] for span in ((3, 50), (50, 97))]
        ids = [token for answer in answers for token in (*prompt, *answer)]
        trainable = [flag for answer in answers for flag in [False] * len(prompt) + [True] * len(answer)]
        parts = len(prompt) + len(answers[0]), len(prompt) + len(answers[1])
        rows.append(Encoded(ids, trainable, None, f"row:{number}", parts, len(answers[0])))
    return rows


def model_for(task: str, **changes: Any) -> nn.Module:
    if task != "reward":
        return cells.small_model("llama", **changes)
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**cells.SMALL, num_labels=1))


def train(cell: dict[str, Any], out: Path, ranks: Ranks) -> None:
    """Train a cell and leave what it did in `out`."""
    recipe = cells.recipe_of(cell["sections"])
    shape, task = cell.get("model", {}), recipe.objective.task
    model = attach_adapter(model_for(task, **shape), recipe.adapter, task, 0)
    if ranks.world > 1:  # what it is compared with is computed from logits
        attach(model, "auto")
    sharded = parallelize(model, ranks, recipe, torch.device("cpu"), torch.float32)
    if recipe.objective.teacher:
        sharded.teacher = cells.small_model("llama", intermediate_size=40, **shape).eval().requires_grad_(False)
        if ranks.world > 1:
            attach(sharded.teacher, "auto")
    make = cells.random_rows if recipe.objective.teacher else pair_rows
    rows = Rows(PlannedFeed(ListRows(make(30, 1)), recipe.data, recipe.train), ListRows(make(5, 2)), pad_id=0)
    folder = out / f"{cell['name']} run"
    if ranks.main:
        folder.mkdir(parents=True, exist_ok=True)
    rows = with_reference(sharded, rows, recipe, folder, Progress(quiet=True), begun=False)
    carried = cells.carried(sharded)
    infos: list[Any] = []
    fit(sharded, rows, recipe, Checkpoints(folder / "checkpoints", ranks, "hash", 1), on_step=(infos.append,))
    if not ranks.main:
        return
    curve = {
        "losses": [info.loss for info in infos],
        "norms": [info.grad_norm for info in infos],
        "watched": [info.validation_loss for info in infos if info.validation_loss is not None],
        "carried": max(carried),
        "reference": [rows.train.rows[index].reference for index in range(30)],
    }
    (out / f"{cell['name']}.json").write_text(json.dumps(curve))


def main() -> None:
    wanted, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank, world = dist.get_rank(), dist.get_world_size()
    for cell in wanted:
        try:
            train(cell, out, Ranks(rank, world, rank, world))
        except Exception:
            traceback.print_exc()
            print("in cell", cell["name"], flush=True)
            os._exit(1)  # the other ranks wait in a collective: they are killed
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
