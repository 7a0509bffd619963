"""What benchmarks share: this machine and its versions, its peak, a process of one's own, medians, reports."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "numpy", "mlflow", "fastapi", "uvicorn")


def machine() -> dict[str, Any]:
    """Hardware, versions, date."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": found,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    """The checkout's commit; `+` where files differ from it."""
    found = [
        subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    ]
    return found[0].strip() + ("+" if found[1] else "") if found[0] else "unknown"


def gemm_peak(dtype: torch.dtype, size: int = 2048, repeats: int = 8) -> float:
    """Operations per second of the best of `repeats` square products."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, and the lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


class Refused(Exception):
    """A contender does not compute what it should: its speed means nothing."""


def reported(
    run: Callable[[argparse.Namespace, Path], dict[str, Any]],
    args: argparse.Namespace,
    table: Callable[[dict[str, Any]], str],
) -> dict[str, Any] | None:
    """`run` in `args.work` or a temporary folder; its report as `args.out`, and as a table beside it (.md) and on the
    screen. None, and the reason on standard error, where it raises Refused or RuntimeError.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        try:
            report = run(args, work)
        except (Refused, RuntimeError) as refusal:
            print(f"refused: {refusal}", file=sys.stderr)
            return None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(table(report), encoding="utf-8")
    print(table(report))
    return report


def run_alone(script: Path, spec: dict[str, Any], out: Path, threads: int, limit_seconds: int = 600) -> dict[str, Any]:
    """Run `script` with `spec` in a process of its own and return the JSON that it writes to `out`.

    Raises RuntimeError with the end of its output when it fails.
    """
    out.unlink(missing_ok=True)
    waiting = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(script), json.dumps(spec), str(out)]
    try:
        ended = subprocess.run(
            command,
            env=os.environ | waiting | offline,
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{script.name} {spec} did not end within {limit_seconds} s") from error
    if ended.returncode or not out.exists():
        raise RuntimeError(f"{script.name} {spec} failed:\n{(ended.stderr or ended.stdout)[-3000:]}")
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found
