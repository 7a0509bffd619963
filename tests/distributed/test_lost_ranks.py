"""Ranks that die and hang, started by torchrun, Slurm and mpirun: the job ends with their names, and goes on by itself.

Slurm and MPI are their environment variables: two processes that are started by hand have nothing else of them.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ingot.recipe_io import dump_recipe, parse_recipe
from ingot.track import read_metrics

pytestmark = pytest.mark.slow  # launches of several ranks; test_matrix.py has a cell of each kind

FAULTY = Path(__file__).with_name("faulty.py")
STEPS = 24
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "TORCHELASTIC", "SLURM_", "OMPI_", "PMI", "AZUREML_")
PLACE = r'step \d+, "\w+"'
WAITS = r'rank 0 waits for it in the [a-z ]+\([a-z-]+\) of step \d+ \("\w+"\)\. Continue with --resume'


@pytest.fixture
def recipe_file(tmp_path: Path, model_folder: Path) -> Path:
    rows = [{"prompt": f"item {n} costs", "completion": f" {n * 7 % 50} euros"} for n in range(90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe(
        {
            "name": "lost",
            "model": {"source": str(model_folder)},
            "data": {"train": "rows.jsonl", "max_tokens": 64},
            "objective": {"task": "text-generation"},
            "adapter": {"dropout": 0.1},
            "optim": {"lr": 5e-3},
            "parallel": {"timeout_minutes": 0.2},
            "train": {
                "max_steps": STEPS,
                "tokens_per_step": 400,
                "tokens_per_microbatch": 100,
                "threads": 1,
                "evaluate_every_steps": 8,
            },
            "evaluate": {"enabled": False},
            "track": {"enabled": False},
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return path


def environment(**more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    paths = os.pathsep.join(path for path in sys.path if path)
    return own | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def slurm(job: int, rank: int) -> dict[str, str]:
    """What srun gives to task `rank` of two on this machine."""
    return {
        "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost",
    }  # fmt: skip


def mpirun(job: int, rank: int) -> dict[str, str]:
    """What mpirun gives to process `rank` of two on this machine."""
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    known = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in zip(names, (rank, 2, rank, 2), strict=True)}
    return known | {"PMIX_NAMESPACE": f"prterun-{socket.gethostname()}-{job}@1"}


class Job:
    """Two processes with a launcher's variables."""

    def __init__(self, variables: Callable[[int, int], dict[str, str]], job: int, *arguments: object) -> None:
        command = [sys.executable, str(FAULTY), *map(str, arguments)]
        self.ranks = [
            subprocess.Popen(
                command,
                env=environment(**variables(job, rank)),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.communicate()

    def end(self, rank: int) -> tuple[int, str]:
        _, err = self.ranks[rank].communicate(timeout=200)
        return self.ranks[rank].returncode, err


@pytest.fixture
def job_number() -> int:
    """Another one for each run of the tests: ports are made from it."""
    return os.getpid() * 10 + int(time.time()) % 10


def the_run(output: Path) -> Path:
    [run] = [path.parent for path in output.glob("*/run.json")]
    return run


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1)), "a step is missing or doubled"
    return [point["metrics"]["train_loss"] for point in read_metrics(run / "metrics.jsonl")]


@pytest.mark.timeout(1200)  # six launches of two processes: 420 s measured on two cores that ten others shared
def test_lost_ranks_are_named_and_their_jobs_go_on(recipe_file, tmp_path, job_number):
    """One undisturbed run, and two that were disturbed and went on: the same losses, bit for bit."""
    with Job(mpirun, job_number, recipe_file, tmp_path / "whole") as job:
        code, err = job.end(0)
        assert code == 0, err[-2000:]
        assert job.end(1)[0] == 0
    whole = losses(the_run(tmp_path / "whole"))
    dies_and_hangs_under_slurm_and_is_queued_again(recipe_file, tmp_path / "slurm", job_number, whole)
    dies_under_torchrun_and_is_started_again(recipe_file, tmp_path / "elastic", whole)


def dies_and_hangs_under_slurm_and_is_queued_again(recipe: Path, output: Path, number: int, whole: list[float]) -> None:
    """Before the first checkpoint it dies, behind it it hangs."""
    output.with_suffix(".armed").touch()
    with Job(slurm, number, recipe, output, "SIGKILL", 1) as job:
        code, err = job.end(0)
        assert job.end(1)[0] == -signal.SIGKILL
    assert code == 1
    died = rf"error: rank 1 \(node \S+, pid {job.ranks[1].pid}\) died in {PLACE}; rank 0 (waits for it|is) in "
    assert re.search(died, err), err[-2000:]
    assert "raised RankLost" in err
    assert "Traceback" not in err
    assert "--resume" not in err, "there is no checkpoint to resume"
    run = the_run(output)
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "failed"
    assert "died in step" in record["error"]

    output.with_suffix(".armed").touch()
    with Job(slurm, number, recipe, output, "SIGSTOP", 13) as job:
        code, err = job.end(0)
        assert job.ranks[1].poll() is None, "it is stopped, not ended"
    assert code == 1
    silent = rf"rank 1 \(node \S+, pid {job.ranks[1].pid}\) has shown no sign of life for \d+ s; it was in {PLACE}"
    assert re.search(f"error: {silent}; {WAITS}", err), err[-2000:]
    assert err.count("error: ") == 1
    assert f"restarted job slurm::{number}: {run} goes on from its first step: it has no checkpoint yet" in err

    with Job(slurm, number, recipe, output) as job:
        code, err = job.end(0)
        assert code == 0, err[-2000:]
        assert job.end(1)[0] == 0
    assert f"restarted job slurm::{number}: {run} goes on from its newest checkpoint" in err
    assert the_run(output) == run
    assert losses(run) == whole
    assert json.loads((run / "run.json").read_text())["restarts"] == 2


def dies_under_torchrun_and_is_started_again(recipe: Path, output: Path, whole: list[float]) -> None:
    output.with_suffix(".armed").touch()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    arguments = [str(FAULTY), str(recipe), str(output), "SIGKILL", "13"]
    done = subprocess.run(
        [sys.executable, *launch, *arguments], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(rf"error: rank 1 \(node \S+, pid \d+\) died in {PLACE}; {WAITS}", done.stderr), done.stderr[-3000:]
    assert done.stderr.count("error: ") == 1
    run = the_run(output)
    assert f"{run} goes on from its newest checkpoint" in done.stderr
    assert losses(run) == whole
    assert (run / "model" / "model.safetensors").is_file()
