"""Ctrl-C in a process of its own, and what comes after it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ingot.track import read_metrics

STEPS = 200
START_TIMEOUT_S = 200.0


def _losses(run: Path) -> list[float]:
    return [point["metrics"]["train_loss"] for point in read_metrics(run / "metrics.jsonl")]


def test_ctrl_c_leaves_a_run_that_goes_on_exactly(ingot, project, clean_env):
    project.write(train={"max_steps": STEPS, "tokens_per_step": 100, "tokens_per_microbatch": 100, "threads": 1})
    command = [sys.executable, "-m", "ingot", "finetune", str(project.recipe)]
    with subprocess.Popen(
        command, cwd=project.folder, env=clean_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not any(len(path.read_text().splitlines()) >= 3 for path in Path("runs").glob("*/metrics.jsonl")):
                assert job.poll() is None, job.communicate()[1][-3000:]
                assert time.monotonic() < deadline, "no third step in time"
                time.sleep(0.01)
            os.kill(job.pid, signal.SIGINT)
            _, err = job.communicate(timeout=60)
        finally:
            job.kill()
    assert job.returncode == 130
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    assert "Continue with --resume" in err
    run = project.run
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert not (run / "model").exists()
    done = len(_losses(run))
    assert 3 <= done < STEPS

    _refuses_stages_that_need_the_model(ingot, run)
    resumed = ingot("finetune", project.recipe, "--resume", run)
    assert resumed.code == 0, resumed.err
    assert (run / "model" / "model.safetensors").is_file()
    whole = ingot("finetune", project.recipe, "output=whole", "--json")
    assert whole.code == 0, whole.err
    assert _losses(run) == _losses(Path(whole.json()["run"]))
    assert len(_losses(run)) == STEPS


def _refuses_stages_that_need_the_model(ingot: Any, run: Path) -> None:
    for verb in ("evaluate", "package"):
        refused = ingot(verb, run)
        assert refused.code == 1
        assert "holds no finished model" in refused.err
        assert f"--resume {run}" in refused.err
    refused = ingot("serve", run, "--port", 0, "--no-supervise")
    assert refused.code == 2
    assert "Traceback" not in refused.err
