"""Runs that are killed, preempted, out of disk or rotten go on to the very loss curve of an undisturbed run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
INTERRUPTED, REFUSED = 130, 3


def run(folder: Path, *scenarios: str) -> Callable[[str], dict[str, Any]]:
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "engine"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "killed_runs.py"), str(folder), *scenarios]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=580, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    def found(name: str) -> dict[str, Any]:
        result = json.loads((folder / f"{name}.json").read_text())
        assert "error" not in result, (result["error"], done.stderr[-3000:])
        return result

    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """All scenarios in one process that forks its runs: the imports cost more than they."""
    folder = tmp_path_factory.mktemp("killed")
    return run(folder, "kills=6", "two_ranks=3", "every_operation", "preempted=2", "full_disk", "corrupted")


def test_a_few_kills(found):
    seen = found("kills")
    assert seen["equal"]
    assert seen["kills"] == 6
    assert seen["again"] > 0, "no step was done twice: the kills met nothing"
    assert (seen["left"], seen["said"]) == ([], "")


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    seen = run(tmp_path, "kills=50")("kills")
    assert seen["equal"]
    assert seen["kills"] == 50
    assert seen["again"] > 25
    assert (seen["left"], seen["said"]) == ([], "")


def test_kills_of_one_of_two_ranks(found):
    seen = found("two_ranks")
    assert seen["equal"]
    assert seen["kills"] == 3
    assert seen["left"] == []


def test_killed_before_every_single_change_of_the_disk(found):
    seen = found("every_operation")
    assert seen["operations"] > 15
    # Up to one of them the second save counts, from it on the third: that one publishes it.
    assert seen["found"] == sorted(seen["found"])
    assert set(seen["found"]) == {2, 3}


def test_preempted_with_a_grace_period(found):
    seen = found("preempted")
    assert seen["equal"] == [True, True]
    assert set(seen["lost"]) == {0}, "steps that were done and are in no checkpoint"
    assert set(seen["codes"]) == {INTERRUPTED}


def test_full_disk(found):
    seen = found("full_disk")
    if not seen["mounted"]:
        pytest.skip("only root may mount a small file system (tests/unit/train/test_checkpoint.py plants the error)")
    assert seen["codes"] == [REFUSED]
    for part in ("No space left on device", f"step-{seen['newest']:06d}", "Free some disk, then --resume"):
        assert part in seen["said"]
    assert seen["left"] == []
    assert seen["newest"] > 0
    assert max(seen["done"]) == 12
    assert seen["again"] == [0]
    assert seen["equal"]


def test_rotten_newest_checkpoint(found):
    seen = found("corrupted")
    assert seen["codes"] == [0]
    assert f"step-{seen['newest']:06d} is damaged" in seen["said"]
    assert "its SHA-256 differs" in seen["said"]
    assert seen["resumed_at"] <= seen["newest"]
    assert seen["equal"]
