"""Trouble on one rank of two: both end with the same message, or the run goes on where it can."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ingot import finetune
from ingot.recipe_io import dump_recipe, parse_recipe
from ingot.track import read_metrics
from ingot.train.diagnosis import load_batch
from ingot.train.memory import NOTE

HERE = Path(__file__).parent
SCRIPT = str(HERE / "trouble_ranks.py")
ODD = 96


def started(arguments: list[str], restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    roots = os.pathsep.join(str(HERE.parents[1] / name) for name in ("engine", "kernels"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": roots}
    return subprocess.run(
        [*command, "--max-restarts", str(restarts), SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env=env,
    )


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """(folder, what each rank said of each case), from one launch."""
    out = tmp_path_factory.mktemp("trouble")
    done = started(["cases", str(out)])
    assert done.returncode == 0, done.stderr[-4000:]
    return out, [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_bad_weight_and_the_one_rank_that_met_it(said, strategy):
    out, ranks = said
    name = f"weight-{strategy}"
    first, second = (rank[name] for rank in ranks)
    assert first == second, "both ranks end, with the same message in the same step"
    assert first["kind"] == "NotFinite"
    message = first["message"]
    assert re.match(rf"step {first['steps'] + 1}: the loss is nan; no weight was changed", message)
    assert "output of model.embed_tokens" in message
    [path] = (out / name / "not-finite").glob("*.safetensors")
    assert str(path) in message
    assert (load_batch(path).ids_BT == ODD).any()
    rank = re.search(r"rank-(\d)", path.name)[1]
    assert f"on rank {rank}" in message
    assert f"on rank {rank}: output of" in message or f"on rank {rank}: weight" in message
    assert f"on rank {1 - int(rank)}: output of" not in message
    parts = {"ddp": (3_104, "[96, 3]"), "fsdp": (1_536, "[47, 3]"), "zero3": (1_552, f"[{1_552 - 29}]")}
    n_values, place = parts[strategy]
    assert f"weight model.embed_tokens.weight: 1 of {n_values:,} values here are not finite" in message
    assert f"the first is nan at {place}" in message
    assert "row:7" in json.loads(path.with_suffix(".json").read_text())["where"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_gradient_that_overflows_on_one_rank(said, strategy):
    out, ranks = said
    name = f"gradient-{strategy}"
    first, second = (rank[name] for rank in ranks)
    assert first == second
    assert first["kind"] == "NotFinite"
    assert re.match(r"step 1: the loss is \d\.\d+, but the gradient's norm is (nan|inf)", first["message"])
    assert "First bad tensor on rank 1: gradient of the output of model.layers.1.mlp.act_fn.0" in first["message"]
    assert "on rank 0" not in first["message"], "sums over ranks are bad everywhere: only the cause is named"
    assert [path.name for path in (out / name / "not-finite").glob("*.safetensors")] == [
        "step-000001-rank-1-microbatch-0.safetensors"
    ]


def test_waiting_for_a_slower_rank_is_exposed_communication(said):
    _, ranks = said
    fast, slow = (rank["slow-ddp"]["rates"] for rank in ranks)
    assert fast["communication_exposed_share"] > 0.3
    assert fast["communication_exposed_share"] > 3 * slow["communication_exposed_share"]
    assert slow["forward_share"] > 0.3
    # Waiting is not counted as computing: backward passes of both ranks take about as long.
    assert fast["backward_share"] < 0.4


def test_full_device_on_one_rank_goes_on_after_a_restart_with_half_the_batch(model_folder, tmp_path):
    rows = [
        {"prompt": f"item {n} costs", "completion": f" {n * 7 % 50} euros and {'cents ' * (n % 9)}"} for n in range(90)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe(
        {
            "name": "full",
            "model": {"source": str(model_folder)},
            "data": {"train": "rows.jsonl", "max_tokens": 64},
            "objective": {"task": "text-generation"},
            "optim": {"lr": 5e-3},
            "train": {
                "max_steps": 6,
                "tokens_per_step": 400,
                "tokens_per_microbatch": 160,
                "on_oom": "halve",
                "checkpoint_every_steps": 2,
            },
            "evaluate": {"enabled": False},
            "track": {"enabled": False},
        }
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))

    one = finetune(recipe.model_copy(update={"output": str(tmp_path / "one")}), home=tmp_path)
    halved = started(
        ["full", "100", "finetune", str(tmp_path / "recipe.yaml"), f"output={tmp_path / 'two'}"], restarts=1
    )
    assert halved.returncode == 0, halved.stderr[-4000:]
    [run] = [path.parent for path in (tmp_path / "two").glob("*/run.json")]
    assert json.loads((run / NOTE).read_text()) == {"tokens_per_microbatch": 80, "was": 160, "step": 1, "rank": 1}
    assert "on rank 1 (forward): activations grew" in halved.stderr
    assert "train.tokens_per_microbatch is 80 instead of 160" in halved.stderr
    assert losses(run) == pytest.approx(losses(one.folder), abs=1e-5)


def losses(run: Path) -> list[float]:
    return [point["metrics"]["train_loss"] for point in read_metrics(run / "metrics.jsonl")]
