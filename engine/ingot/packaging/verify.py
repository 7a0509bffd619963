"""Proof that a package answers elsewhere as the model did here: a clean process loads it and repeats the examples."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ingot.errors import PackageError
from ingot.packaging.bundle import check_manifest

CHILD = Path(__file__).with_name("clean_process.py")
LAST_LINES = 15
RELATIVE, ABSOLUTE = 1e-4, 1e-5  # of numbers that two processes compute


@dataclass(frozen=True)
class Verification:
    """What was compared. `answers` are the records that the clean process gave, `answer` its record of the one further
    row that it was asked by itself. `difference`: how far its logits are apart from the expected ones, as a share of
    the largest; None where answers were compared.
    """

    examples: int
    answers: list[dict[str, Any]]
    hidden_modules: int
    seconds: float
    difference: float | None = None
    tolerance: float | None = None
    answer: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Near:
    """What a form that computes otherwise is held against: `logits` [example, value] of the model that it was made
    from (`ingot.model.probing.probe`), of which the largest may be missed by the share `tolerance`.
    """

    logits: list[list[float]]
    tolerance: float


def verify_package(
    package: Path,
    examples: list[dict[str, Any]],
    expected: list[dict[str, Any]],
    *,
    example: dict[str, Any] | None = None,
    near: Near | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
) -> Verification:
    """Load `package` in a clean process, answer `examples` (rows of its task, all with the same columns) with its
    default settings, and compare with the `expected` records; with `near` compare logits instead. `example`: a row that
    is answered too, and compared with nothing. `env`: variables that the process gets, such as where an adapter's base
    lies. Raises `PackageError` with the first difference.
    """
    if not examples or len(examples) != len(expected):
        raise PackageError(
            f"verification needs as many expected answers as examples, got {len(expected)} and {len(examples)}"
        )
    if len({tuple(sorted(example)) for example in examples}) != 1:
        raise PackageError("verification needs examples of one form: the same columns in each")
    check_manifest(package)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ingot-verify-") as place:
        asked = {"examples": [_columns(row) for row in examples], "logits": near is not None}
        asked |= {"example": None if example is None else _columns(example)}
        response = _run(package.resolve(), asked, Path(place), timeout_s, env or {})
    answers = response["rows"]
    if len(answers) != len(examples):
        raise PackageError(f"the packaged model gave {len(answers)} answers to {len(examples)} examples")
    seconds = round(time.perf_counter() - started, 3)
    done = Verification(len(examples), answers, len(response["hidden"]), seconds, answer=response["answer"])
    if near is not None:
        return replace(done, difference=_apart(near, response["logits"]), tolerance=near.tolerance)
    for index, (answer, wanted) in enumerate(zip(answers, expected, strict=True)):
        if difference := _difference(answer, wanted):
            raise PackageError(f"the packaged model answers example {index} differently {difference}")
    return done


def _apart(near: Near, logits: list[list[float]]) -> float:
    """The worst row's max|got - wanted| / max|wanted|. Raises PackageError over the tolerance."""
    worst = max(_gap(wanted, got) for wanted, got in zip(near.logits, logits, strict=True))
    if worst > near.tolerance:
        raise PackageError(
            f"the packaged model's logits are {worst:.2g} of their size away from those of the model that it was made "
            f"from (at most {near.tolerance:g})"
        )
    return worst


def _gap(wanted: list[float], got: list[float]) -> float:
    """max|got - wanted| / max|wanted|, the latter of what is finite. Equal infinities are no gap, any NaN an infinite
    one: `max` passes over a NaN that is not its first argument.
    """
    gaps = [0.0 if a == b else abs(a - b) for a, b in zip(wanted, got, strict=True)]
    size = max((abs(a) for a in wanted if math.isfinite(a)), default=0.0)
    return math.inf if any(map(math.isnan, gaps)) else max(gaps) / max(1e-6, size)


def _columns(example: dict[str, Any]) -> dict[str, Any]:
    return {key: json.dumps(value) if isinstance(value, list) else value for key, value in example.items()}


def _difference(answer: Any, wanted: Any, where: str = "") -> str | None:
    """Where two records differ, in words; None: they are equal, numbers but for float noise."""
    at = f"at {where}: " if where else ""
    if isinstance(wanted, str) and isinstance(answer, str) and answer != wanted:
        place = next((i for i, (a, b) in enumerate(zip(answer, wanted, strict=False)) if a != b), None)
        place = min(len(answer), len(wanted)) if place is None else place
        shown = (text[max(0, place - 20) : place + 40] for text in (wanted, answer))
        expected, got = map(repr, shown)
        return f"{at}from character {place} on: expected {expected}, got {got}"
    if isinstance(wanted, dict) and isinstance(answer, dict) and answer.keys() == wanted.keys():
        pairs = [(answer[key], wanted[key], f"{where}.{key}".strip(".")) for key in wanted]
    elif isinstance(wanted, list) and isinstance(answer, list) and len(answer) == len(wanted):
        pairs = [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(answer, wanted, strict=True))]
    elif isinstance(wanted, float) and isinstance(answer, float | int):
        equal = math.isclose(answer, wanted, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        return None if equal else f"{at}expected {wanted:g}, got {answer:g}"
    else:
        return None if answer == wanted else f"{at}expected {_short(wanted)}, got {_short(answer)}"
    return next((found for a, b, place in pairs if (found := _difference(a, b, place))), None)


def _short(value: Any) -> str:
    return repr(value)[:60]


def _run(package: Path, asked: dict[str, Any], place: Path, timeout_s: float, env: Mapping[str, str]) -> dict[str, Any]:
    request, response = place / "request.json", place / "response.json"
    request.write_text(json.dumps({"package": str(package), **asked}), encoding="utf-8")
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
            env=inherited | offline | dict(env),
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
