"""What the ranks of test_trouble.py run: steps that go wrong on one rank only.

python trouble_ranks.py cases OUT            (RANK, WORLD_SIZE, ... in the environment)
python trouble_ranks.py full LIMIT ARGS ...  ingot's command line; batches over LIMIT tokens do not fit on rank 1
"""

import json
import os
import random
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ingot.data.plan import PlannedFeed
from ingot.data.rows import ListRows
from ingot.data.template import Encoded
from ingot.errors import IngotError
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.recipe_io import parse_recipe
from ingot.train.checkpoint import Checkpoints
from ingot.train.loop import Rows, fit
from ingot.train.objectives import OBJECTIVES

ODD = 96  # a token that only one row holds


def rows_of(n: int) -> list[Encoded]:
    draw = random.Random(1)
    rows = []
    for number in range(n):
        ids = [draw.randrange(3, ODD) for _ in range(draw.randint(4, 24))]
        rows.append(Encoded(ids, [place > 1 for place in range(len(ids))], None, f"row:{number}"))
    rows[7] = replace(rows[7], ids=[ODD, *rows[7].ids[1:]])
    return rows


class Overflow(nn.Module):
    """Finite forward, infinite backward: the root of zero. On one rank only; the module is on all."""

    def __init__(self, active: bool) -> None:
        super().__init__()
        self.active = active

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD + (0 * hidden_BTD).abs().sqrt() if self.active else hidden_BTD


def model_of(fault: str, rank: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, attn_implementation="ingot",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if fault == "weight":
        with torch.no_grad():
            model.model.embed_tokens.weight[ODD, 3] = float("nan")
    if fault == "gradient":
        model.model.layers[1].mlp.act_fn = nn.Sequential(nn.SiLU(), Overflow(rank == 1))
    if fault == "slow" and rank == 1:
        model.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    return model


def case(fault: str, strategy: str, out: Path) -> dict[str, Any]:
    """Train until it goes wrong; what this rank has to say about it."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size())
    recipe = parse_recipe(
        {
            "name": "trouble",
            "model": {"source": "unused"},
            "data": {"train": "unused", "max_tokens": 32, "batches": "padding-free"},
            "objective": {"task": "language-modeling"},
            "adapter": {"kind": "none"},
            "parallel": {"strategy": strategy},
            "train": {"max_steps": 6, "tokens_per_step": 120, "tokens_per_microbatch": 32},
        }
    )
    sharded = parallelize(model_of(fault, ranks.rank), ranks, recipe, torch.device("cpu"), torch.float32)
    infos: list[Any] = []
    rows = Rows(PlannedFeed(ListRows(rows_of(60)), recipe.data, recipe.train), ListRows([]), pad_id=0)
    folder = out / f"{fault}-{strategy}"
    checkpoints = Checkpoints(folder / "checkpoints", ranks, "hash", 2)
    try:
        fit(sharded, rows, recipe, checkpoints, on_step=(infos.append,), folder=folder)
    except IngotError as error:
        return {"kind": type(error).__name__, "message": str(error), "steps": len(infos)}
    return {"kind": None, "rates": infos[-1].rates}


def cases(out: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    said = {}
    for fault, strategy in (
        ("weight", "ddp"),
        ("weight", "fsdp"),
        ("gradient", "ddp"),
        ("gradient", "fsdp"),
        ("slow", "ddp"),
        # Behind the others: importing deepspeed takes as long as they do.
        ("weight", "zero3"),
        ("gradient", "zero3"),
    ):
        said[f"{fault}-{strategy}"] = case(fault, strategy, out)
    (out / f"rank-{dist.get_rank()}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def full(limit: int, arguments: list[str]) -> None:
    original = OBJECTIVES["text-generation"]

    def objective(sharded: Any, batch: Any, divisor: int, section: Any) -> Tensor:
        if torch.is_grad_enabled() and os.environ["RANK"] == "1" and batch.ids_BT.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
        return original(sharded, batch, divisor, section)

    OBJECTIVES["text-generation"] = objective
    from ingot.cli import main

    sys.argv = ["ingot", *arguments]
    main()


if __name__ == "__main__":
    if sys.argv[1] == "cases":
        cases(Path(sys.argv[2]))
    else:
        full(int(sys.argv[2]), sys.argv[3:])
