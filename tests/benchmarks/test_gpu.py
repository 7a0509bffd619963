"""The GPU benchmark: its whole path on a CPU, and that it times nothing when an operation is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ingot.recipe import Kernels, Objective, Optim, Quantization

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_dry_run_goes_through_every_section(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--dry-run", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["measurement"].startswith("none")
    assert all(check["right"] for check in found["checks"].values()) and len(found["checks"]) >= 6
    for section in ("elementwise", "linear_cross_entropy", "lora_linear", "dequantize"):
        for case in found[section].values():
            assert "seconds" in case["contenders"]["ingot"], case
    steps = found["steps"]
    assert {"lora, ingot", "lora, hf", "qlora, ingot", "fp8, ingot", "full, ingot", "full, hf"} <= set(steps)
    assert not [name for name, facts in steps.items() if "failed" in facts]
    for kind in ("lora", "full"):  # the same first loss before anything is compared
        own, peer = (steps[f"{kind}, {who}"]["full-length"]["first_loss"] for who in ("ingot", "hf"))
        assert own == pytest.approx(peer, rel=1e-2)
    assert "none: a dry run" in out.with_suffix(".md").read_text()


def test_nothing_is_timed_when_an_operation_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import gpu_kernels

    own = gpu_kernels.rms_norm
    monkeypatch.setattr(gpu_kernels, "rms_norm", lambda *a, **k: own(*a, **k) * 1.001)
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert not found["checks"]["rms_norm float32"]["right"] and "elementwise" not in found


def test_a_step_that_begins_with_another_loss_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_step

    found = {who: {"full-length": {"first_loss": loss}} for who, loss in (("ingot", 11.0), ("hf", 11.05))}
    assert gpu_step.apart(found) is None
    found["ingot"]["full-length"]["first_loss"] = 11.2
    assert gpu_step.apart(found) == "its first loss is 11.2000, plain Hugging Face's 11.0500"
    assert gpu_step.apart({"ingot": found["ingot"]}) is None


def test_a_section_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import gpu_kernels

    monkeypatch.setitem(gpu_kernels.SECTIONS, "elementwise", lambda *a: 1 / 0)
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--out", str(out), "--only", "elementwise", "dequantize"]) == 1
    found = json.loads(out.read_text())
    assert found["failures"] == {"elementwise": "ZeroDivisionError: division by zero"} and found["dequantize"]
    assert "FAILED elementwise" in out.with_suffix(".md").read_text()


def test_sections_of_a_recipe_without_pydantic_are_those_with_it(tmp_path: Path) -> None:
    """On an image that has neither it nor what a machine that trains through recipes has."""
    code = """
import sys
for name in ("pydantic", "mlflow", "datasets", "bitsandbytes", "deepspeed"):
    sys.modules[name] = None
sys.path[:0] = [{paths}]
import bare
bare.install()
import gpu_step, gpu_quantized
from ingot.recipe import Kernels, Objective, Optim, Quantization
print([vars(section) for section in (Kernels(), Objective(), Optim(lr=0.5), Quantization(kind="fp8"))])
"""
    paths = ", ".join(repr(str(ROOT / name)) for name in ("engine", "kernels", "benchmarks"))
    command = [sys.executable, "-W", "ignore", "-c", code.replace("{paths}", paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    sections = (Kernels(), Objective(), Optim(lr=0.5), Quantization(kind="fp8"))
    assert done.stdout.strip() == str([dict(section) for section in sections])


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    assert gpu.main([]) == 2
    assert "no CUDA device; --dry-run" in capsys.readouterr().err
