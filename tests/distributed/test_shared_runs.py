"""Whole runs by the command line, of ranks that share lines or matrices: the same adapter and model as of one rank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ingot.recipe_io import dump_recipe, parse_recipe
from ingot.track import read_metrics

STEPS = 4


@pytest.fixture
def recipe_file(tmp_path: Path, model_folder: Path) -> Path:
    rows = [
        {"prompt": f"item {n} costs", "completion": f" {n * 7 % 50} euros and {'cents ' * (n % 9)}"} for n in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe(
        {
            "name": "shared",
            "model": {"source": str(model_folder)},
            "data": {"train": "rows.jsonl", "max_tokens": 64, "batches": "padding-free"},
            "objective": {"task": "text-generation"},
            "adapter": {"rank": 4},
            "optim": {"lr": 5e-3},
            "train": {"max_steps": STEPS, "tokens_per_step": 400, "tokens_per_microbatch": 100, "threads": 1},
            "evaluate": {"enabled": False},
            "track": {"enabled": False},
        }
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    return tmp_path / "recipe.yaml"


def trained(ranks: int, recipe: Path, out: Path, *changes: str) -> Path:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "ingot", "finetune", str(recipe), f"output={out}", *changes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    [run] = [path.parent for path in out.glob("*/run.json")]
    return run


@pytest.mark.slow
def test_runs_of_ranks_that_share_end_as_a_run_of_one(recipe_file: Path, tmp_path: Path) -> None:
    one = trained(1, recipe_file, tmp_path / "one")
    expected = [point["metrics"]["train_loss"] for point in read_metrics(one / "metrics.jsonl")]
    for shared in ("context", "tensor"):
        two = trained(2, recipe_file, tmp_path / shared, f"parallel.{shared}=2")
        losses = [point["metrics"]["train_loss"] for point in read_metrics(two / "metrics.jsonl")]
        assert len(losses) == STEPS
        assert losses == pytest.approx(expected, abs=1e-5), shared
        for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
            found = load_file(two / file)
            for name, tensor in load_file(one / file).items():
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=f"{shared}: {name}")
