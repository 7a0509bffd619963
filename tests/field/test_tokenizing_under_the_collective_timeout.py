"""Tokenizing takes longer than a collective may: the job dies on idle GPUs before its first step.

axolotl#2684, LlamaFactory#2424, #956: rank 0 tokenizes millions of rows while the others wait for it at a barrier,
whose time (30 minutes) is shorter. Here rows are encoded before there is a process group, and who waits, waits for a
file's lock, which has no time and ends with the process that holds it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ingot.recipe_io import dump_recipe, parse_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "distributed" / "data_ranks.py"
TIMEOUT_MINUTES, ENCODING_SECONDS = 0.05, 8.0


@pytest.mark.slow  # it waits
def test_encoding_may_take_longer_than_a_collective(tmp_path: Path, model_folder: Path) -> None:
    rows = [{"text": f"item {n} costs {n * 7 % 50} euros"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe(
        {
            "name": "slow",
            "model": {"source": str(model_folder)},
            "data": {"train": "rows.jsonl", "max_tokens": 64, "test_share": 0},
            "objective": {"task": "language-modeling"},
            "train": {"max_steps": 2, "tokens_per_step": 100, "tokens_per_microbatch": 64, "threads": 1},
            "parallel": {"timeout_minutes": TIMEOUT_MINUTES},
            "evaluate": {"enabled": False},
            "track": {"enabled": False},
        }
    )
    (tmp_path / "slow.yaml").write_text(dump_recipe(recipe))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(ROOT / "engine"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(tmp_path), "slow", "--slow", str(ENCODING_SECONDS)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "INGOT_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    [line] = [json.loads(line) for line in (tmp_path / "encoded.jsonl").read_text().splitlines()]
    assert line["seconds"] > 60 * TIMEOUT_MINUTES
    assert not line["group"]  # no collective can wait for it: there is none yet
    [run] = list((tmp_path / "out" / "slow").glob("*/run.json"))
    assert json.loads(run.read_text())["status"] == "trained"
