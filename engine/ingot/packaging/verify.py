"""Proof that a package answers elsewhere as the model did here: a clean process loads it and repeats the examples."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ingot.errors import PackageError
from ingot.packaging.bundle import check_manifest

CHILD = Path(__file__).with_name("clean_process.py")
LAST_LINES = 15


@dataclass(frozen=True)
class Verification:
    """What was compared. `answers` are the texts or labels that the clean process gave."""

    examples: int
    answers: list[str]
    hidden_modules: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def verify_package(
    package: Path, examples: list[dict[str, Any]], expected: list[str], *, timeout_s: float = 600.0
) -> Verification:
    """Load `package` in a clean process, answer `examples` ({input_string}, {messages} or {text} each) with its default
    settings, and compare with `expected` (texts or labels). Raises `PackageError` with the first difference.
    """
    if not examples or len(examples) != len(expected):
        raise PackageError(
            f"verification needs as many expected answers as examples, got {len(expected)} and {len(examples)}"
        )
    if len({tuple(sorted(example)) for example in examples}) != 1:
        raise PackageError("verification needs examples of one form: all input_string, all messages, or all text")
    check_manifest(package)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ingot-verify-") as place:
        response = _run(package.resolve(), examples, Path(place), timeout_s)
    answers = [row.get("output_string", row.get("label")) for row in response["rows"]]
    for index, (answer, wanted) in enumerate(zip(answers, expected, strict=True)):
        if answer != wanted:
            at = next(
                (i for i, (a, b) in enumerate(zip(answer, wanted, strict=False)) if a != b),
                min(len(answer), len(wanted)),
            )
            raise PackageError(
                f"the packaged model answers example {index} differently from character {at} on: expected "
                f"{wanted[max(0, at - 20) : at + 40]!r}, got {answer[max(0, at - 20) : at + 40]!r}"
            )
    return Verification(len(examples), answers, len(response["hidden"]), round(time.perf_counter() - started, 3))


def _columns(example: dict[str, Any]) -> dict[str, Any]:
    messages = example.get("messages")
    return {"messages": json.dumps(messages)} if isinstance(messages, list) else example


def _run(package: Path, examples: list[dict[str, Any]], place: Path, timeout_s: float) -> dict[str, Any]:
    request, response = place / "request.json", place / "response.json"
    rows = [_columns(example) for example in examples]
    request.write_text(json.dumps({"package": str(package), "examples": rows}), encoding="utf-8")
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MLFLOW_", "HF_", "INGOT_"))
    }
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(place / "hf"), "TQDM_DISABLE": "1"}
    # -B: the package must stay as its manifest says, without __pycache__ folders.
    command = [sys.executable, "-I", "-B", str(CHILD), str(request), str(response)]
    try:
        done = subprocess.run(
            command,
            cwd=place,
            env=inherited | offline,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise PackageError(f"the packaged model gave no answer within {timeout_s:g} s in a clean process") from error
    if done.returncode != 0 or not response.is_file():
        last = "\n".join(done.stdout.splitlines()[-LAST_LINES:])
        raise PackageError(f"the package does not load in a clean process (exit status {done.returncode}):\n{last}")
    return json.loads(response.read_text(encoding="utf-8"))
