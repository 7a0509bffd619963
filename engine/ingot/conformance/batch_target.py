"""`ingot batch` on a file of the rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

from .case import Answers, Case, Mismatch
from .processes import clean, last_lines

ROOTS = os.pathsep.join(str(Path(__file__).parents[depth]) for depth in (2,))


def batch(case: Case) -> Answers:
    """The verb in a process of its own: JSON lines in, JSON lines out."""
    place = case.scratch / "batch"
    place.mkdir(parents=True, exist_ok=True)
    rows, out, log = place / "rows.jsonl", place / "out", place / "batch.log"
    rows.write_text("".join(json.dumps(row) + "\n" for row in case.rows), encoding="utf-8")
    # What may serve is not the question here, but whether it answers: the folder inside has no promotion policy.
    command = [sys.executable, "-m", "ingot", "batch", str(case.model), str(rows), str(out), "--json"]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command,
            cwd=place,
            env=clean(case, {"PYTHONPATH": ROOTS}),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            timeout=case.timeout_s,
        )
    if done.returncode != 0:
        raise Mismatch(f"ingot batch ended with status {done.returncode}: {last_lines(log)}")
    parts = sorted(out.rglob("part-*.jsonl"))
    answers = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    names = list(case.expected[0])
    yield "jsonl", [{name: answer[name] for name in names if name in answer} for answer in answers]
