"""Two gloo ranks under torchrun: the same losses and the same model as one rank with the same global batch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ingot.recipe_io import dump_recipe, parse_recipe
from ingot.track import read_metrics

STEPS = 8


@pytest.fixture
def recipe_file(tmp_path: Path, model_folder: Path) -> Path:
    rows = [
        {"prompt": f"item {n} costs", "completion": f" {n * 7 % 50} euros and {'cents ' * (n % 9)}"} for n in range(90)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe(
        {
            "name": "ddp",
            "model": {"source": str(model_folder)},
            "data": {"train": "rows.jsonl", "max_tokens": 64},
            "objective": {"task": "text-generation"},
            "optim": {"lr": 5e-3},
            "train": {"max_steps": STEPS, "tokens_per_step": 400, "tokens_per_microbatch": 100, "threads": 1},
            "evaluate": {"enabled": False},
            "track": {"enabled": False},
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return path


def command(ranks: int, recipe: Path, out: Path, *more: str) -> list[str]:
    launch = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else [sys.executable]
    )
    return [*launch, "-m", "ingot", "finetune", str(recipe), f"output={out}", *more]


def trained(ranks: int, recipe: Path, out: Path, *more: str) -> Path:
    done = subprocess.run(command(ranks, recipe, out, *more), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [run] = [path.parent for path in out.glob("*/run.json")]
    return run


def losses(run: Path) -> list[float]:
    return [point["metrics"]["train_loss"] for point in read_metrics(run / "metrics.jsonl")]


def test_two_ranks_equal_one(recipe_file, tmp_path):
    one = trained(1, recipe_file, tmp_path / "one")
    two = trained(2, recipe_file, tmp_path / "two")
    assert len(losses(one)) == STEPS
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert losses(one)[-1] < losses(one)[0]
    watched = [run_metrics(run, "validation_loss") for run in (one, two)]
    assert watched[0] == pytest.approx(watched[1], abs=1e-5)
    for name, tensor in load_file(one / "model" / "model.safetensors").items():
        torch.testing.assert_close(
            load_file(two / "model" / "model.safetensors")[name], tensor, rtol=0, atol=1e-4, msg=name
        )


def test_what_fails_on_rank_0_ends_every_rank_with_its_message(recipe_file, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = subprocess.run(command(2, recipe_file, tmp_path / "file"), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "error: " in done.stderr
    assert "error (rank 1): " in done.stderr
    assert done.stderr.count("cannot be written") == 2
    assert "UnpicklingError" not in done.stderr
    assert "TypeError" not in done.stderr


def run_metrics(run: Path, name: str) -> list[float]:
    return [p["metrics"][name] for p in read_metrics(run / "metrics.jsonl") if name in p["metrics"]]


@pytest.mark.slow  # 18 s
def test_more_ranks_than_rows_in_a_step(recipe_file, tmp_path):
    """One row a step: the second rank has nothing to add and still must not stall or change the gradient."""
    one = trained(1, recipe_file, tmp_path / "one", "train.tokens_per_step=10", "train.max_steps=4")
    two = trained(2, recipe_file, tmp_path / "two", "train.tokens_per_step=10", "train.max_steps=4")
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


@pytest.mark.slow  # 67 s; test_data.py goes on with fewer ranks in each run of the tests
def test_interrupted_on_two_ranks_goes_on_on_one(recipe_file, tmp_path):
    whole = losses(trained(1, recipe_file, tmp_path / "whole", "train.max_steps=40"))
    out = tmp_path / "cut"
    job = subprocess.Popen(
        command(2, recipe_file, out, "train.max_steps=40"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not any(len(path.read_text().splitlines()) >= 3 for path in out.glob("*/metrics.jsonl")):
        assert job.poll() is None, job.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "no third step in time"
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGINT)
    job.communicate(timeout=120)
    [run] = [path.parent for path in out.glob("*/run.json")]
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    done = subprocess.run(
        [*command(1, recipe_file, out, "train.max_steps=40"), "--resume", str(run)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(run) == pytest.approx(whole, abs=1e-5)
