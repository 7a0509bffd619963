"""Batches of two ranks: the rows are shared, and a rank that dies is survived or gone on without."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ingot
from ingot.batches import Options
from ingot.batching.manifest import read

HERE = Path(__file__).parent
SCRIPT = str(HERE / "batch_ranks.py")
COUNT = 40


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [f"Hello {n}{', and so on' * (n % 5)}" for n in range(COUNT)]
    texts[7] = "too long " * 200
    path.write_text("".join(json.dumps({"id": n, "prompt": text}) + "\n" for n, text in enumerate(texts)))
    return path


def environment(**more: str) -> dict[str, str]:
    roots = os.pathsep.join(str(HERE.parents[1] / name) for name in ("engine", "kernels"))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": roots, **more}


def run(*arguments: object, restarts: int = 0, fails: bool = False) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    command = [sys.executable, *launch, SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert (done.returncode != 0) == fails, done.stderr[-3000:]


def contents(folder: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes() for path in [*folder.glob("part-*"), folder / "errors.jsonl"]}


@pytest.fixture
def alone(model_folder: Path, rows: Path, tmp_path: Path) -> Path:
    """The same batch, answered by this process."""
    return answered(model_folder, rows, tmp_path / "alone")


def answered(model: Path, rows: Path, out: Path) -> Path:
    ingot.batch(model, rows, out, Options(params={"max_tokens": 3}, bucket_rows=3, max_errors="-1"))
    assert (read(out)["answers"], read(out)["errors"]) == (COUNT - 1, 1)
    return out


@pytest.mark.slow
def test_ranks_share_the_rows_and_another_number_of_ranks_goes_on(
    model_folder: Path, rows: Path, alone: Path, tmp_path: Path
) -> None:
    two, killed = tmp_path / "two", tmp_path / "killed"
    run(model_folder, rows, two, "--pause", 0.2)
    shares = [int((tmp_path / f"two.rank-{rank}").read_text()) for rank in (0, 1)]
    assert sum(shares) == 14
    assert min(shares) > 2
    assert contents(two) == contents(alone)
    run(model_folder, rows, killed, "--pause", 0.2, "--die-after", 2, fails=True)  # torchrun ends the other rank, too
    assert 0 < len(read(killed)["buckets"]) < 14
    assert contents(answered(model_folder, rows, killed)) == contents(alone)


@pytest.mark.slow
def test_a_rank_that_dies_takes_no_other_with_it(model_folder: Path, rows: Path, alone: Path, tmp_path: Path) -> None:
    """Of a launcher that lets the others live."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, str(model_folder), str(rows), str(out), "--pause", "0.2", "--die-after", "2"]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(command, env=environment(RANK=rank, LOCAL_RANK=rank, **shared), stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    told = [rank.communicate(timeout=300)[1].decode()[-3000:] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, -9], told
    assert contents(out) == contents(alone)


@pytest.mark.slow
def test_restarted_by_torchrun_it_goes_on(model_folder: Path, rows: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model_folder, rows, out, "--pause", 0.2, "--die-after", 2, restarts=1)
    assert (tmp_path / "out.died").exists()
    assert contents(out) == contents(alone)


@pytest.mark.slow
def test_killed_at_30_random_points_a_model_has_answered_every_row_once(
    model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(HERE / "batch_kills.py"), str(model_folder), str(rows), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    left = json.loads(done.stdout)
    assert len(left) == 30
    assert left == sorted(left)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    lines = [line for path in sorted((tmp_path / "killed").glob("part-*")) for line in path.read_text().splitlines()]
    assert [json.loads(line)["id"] for line in lines] == [n for n in range(COUNT) if n != 7]
