"""The CPU benchmark: what it refuses, and that it runs at all. No speed is asserted."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/train_cpu.py"


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return runpy.run_path(str(SCRIPT), run_name="bench")
    finally:
        sys.path.remove(str(SCRIPT.parent))


def first(loss: float = 10.0, norm: float = 2.0) -> dict[str, float]:
    return {"loss": loss, "norm": norm, "defined_loss": 10.0, "defined_norm": 2.0}


def one(speed: float, final_loss: float = 5.0) -> dict[str, Any]:
    same = {"start_loss": 10.0, "steps": 8, "tokens_per_step": 2000.0, "targets": 100, "first": first()}
    return {
        "trainable": speed,
        "all": 2 * speed,
        "peak_memory": 100,
        "memory_rise": 50,
        "final_loss": final_loss,
    } | same


@pytest.mark.parametrize("wrong", [first(loss=10.01), first(norm=2.001), first(loss=float("nan"))])
def test_a_first_step_that_is_not_the_definition_s_is_refused(bench: dict[str, Any], wrong: dict[str, float]) -> None:
    bench["check_first"]("ingot", "float32", first())
    with pytest.raises(bench["Refused"]):
        bench["check_first"]("ingot", "float32", wrong)


def test_a_final_loss_away_from_trl_s_is_refused(bench: dict[str, Any]) -> None:
    bench["cell"]({"ingot": [one(1.0, 5.05)], "trl": [one(1.0)]})
    with pytest.raises(bench["Refused"]):
        bench["cell"]({"ingot": [one(1.0, 5.2)], "trl": [one(1.0)]})


def test_ratios_are_of_medians_and_goals_are_told(bench: dict[str, Any]) -> None:
    runs = {"ingot": [one(10.0), one(30.0), one(20.0)], "trl": [one(10.0)] * 3, "trl_packed": [one(16.0)] * 3}
    found = bench["cell"](runs)
    assert found["ratio"] == {"trl": 2.0, "trl_packed": 1.25}
    assert found["contenders"]["ingot"]["spread"]["trainable"] == [10.0, 30.0]
    assert "1.4x trl_packed: missed (1.25x)" in bench["goals"]("e2e", found)[0]  # the faster of TRL's modes
    assert "0.7x trl_packed's memory: missed (1.00x)" in bench["goals"]("mixed", found)[1]


@pytest.mark.slow
def test_a_quick_run_writes_a_report_and_a_planted_loss_none(tmp_path: Path) -> None:
    options = ["--quick", "--rounds", "1", "--data", "e2e", "--methods", "lora", "--precisions", "float32"]
    command = [sys.executable, str(SCRIPT), *options, "--contenders", "ingot", "trl"]
    done = subprocess.run([*command, "--out", str(tmp_path / "a.json")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "a.json").read_text())["cells"]["e2e lora float32"]
    assert found["contenders"]["ingot"]["targets"] == found["contenders"]["trl"]["targets"]
    assert (tmp_path / "a.md").exists() and (tmp_path / "a.png").exists()
    refused = subprocess.run(
        [*command[:-2], "ingot", "--plant", "0.01", "--out", str(tmp_path / "b.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1 and "first step's loss" in refused.stderr
    assert not (tmp_path / "b.json").exists()


def test_a_process_that_hangs_is_an_error_of_one_line(bench: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match=r"hangs\.py \{\} did not end within 1 s"):
        bench["run_alone"](script, {}, tmp_path / "out.json", 1, limit_seconds=1)
