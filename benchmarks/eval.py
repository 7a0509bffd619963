"""Evaluation on a CPU: Ingot beside lm-evaluation-harness's own Hugging Face backend.

    python benchmarks/eval.py [--out FILE.json] [--rounds 3] [--minutes M] [--cases ...] [--work FOLDER] [--quick]

Every contender answers the same documents with the same model in float32, in a process of its own, in turn. The first
round tries several batches with each, and the fastest stays. Log-likelihoods must agree, texts and metrics be the same,
or nothing is reported and the exit status is 1. Writes FILE.json, and beside it a table (.md).
"""

import argparse
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from eval_work import FULL, QUICK, prepare
from harness import Refused, machine, reported, run_alone, summary

HERE = Path(__file__).resolve().parent
THREADS = 2
NAMES = ("ingot", "harness")
# What is timed -> batches that are tried: tokens of one of Ingot's, rows of one of the harness's. continuous: Ingot by
# transformers' continuous batching, measured beside the two.
BATCHES = {
    "choices_32k": {"ingot": [1024, 2048], "harness": [1, 2, 8]},
    "choices_128k": {"ingot": [1024, 2048], "harness": [1, 2]},
    "one_token_32k": {"ingot": [1024, 2048], "harness": [1, 4]},
    "rolling_32k": {"ingot": [1024, 2048], "harness": [1, 2]},
    "generation_32k": {"ingot": [4096, 8192], "harness": [8, 24], "continuous": [8192]},
}
# What is asked as a task of the harness: metrics of both, at one batch.
TASKS = {"choices_stories": 8, "perplexity_stories": 4, "exact_match_stories": 8, "exact_match_chain": 8}
TASK_TOKENS = 2048
GOALS = {"choices_32k": 2.5, "choices_128k": 5.0, "generation_32k": 2.0}
LIMIT = 1e-4  # nats between two log-likelihoods of a document
# The harness adds up in float32: of a long text no more can agree than so many units of the last place of the sum.
UNITS = 4
SAME = 1e-6  # of metrics that are made of such sums, relative; shares of documents must be equal


def difference(name: str, ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Largest difference of log-likelihoods, 0.0 for equal texts. Raises Refused where they do not agree."""
    if len(ours) != len(theirs):
        raise Refused(f"{name}: {len(ours)} answers beside {len(theirs)}")
    if any(isinstance(one, str) for one in ours):
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if one != other:
                raise Refused(f"{name}: document {place} is answered {one[:80]!r} and {other[:80]!r}")
        return 0.0
    left, right = (np.asarray([x for one in found for x in np.atleast_1d(one)]) for found in (ours, theirs))
    off = np.abs(left - right)
    allowed = np.maximum(LIMIT, UNITS * np.spacing(np.abs(right).astype(np.float32)))
    if not (off <= allowed).all():
        worst = int(np.nanargmax(np.where(np.isnan(off), np.inf, off - allowed)))
        raise Refused(f"{name}: log-likelihood {worst} is {left[worst]:.6f} and {right[worst]:.6f}")
    return float(off.max())


def same_metrics(name: str, ours: dict[str, float], theirs: dict[str, float]) -> None:
    """Raise Refused unless both report the same."""
    for metric, value in theirs.items():
        exact = metric.startswith(("acc", "exact_match"))
        found = ours.get(metric, math.nan)
        if not (found == value if exact else abs(found - value) <= SAME * abs(value)):
            raise Refused(f"{name}: {metric} is {found!r} and {value!r}")


def cell(name: str, rounds: dict[str, list[dict[str, Any]]], batches: dict[str, int]) -> dict[str, Any]:
    """Numbers of one timed case. Raises Refused."""
    ours, theirs = rounds["ingot"], rounds["harness"]
    speeds = {who: [one["documents"] / min(one["seconds"].values()) for one in found] for who, found in rounds.items()}
    # The processor's time of the same runs: what other work on the machine does to the clock it hardly does to this.
    work = {who: [min(one["processor"].values()) for one in found] for who, found in rounds.items()}
    ratios = [one / other for one, other in zip(speeds["ingot"], speeds["harness"], strict=True)]
    # The first round's holds that of slower batches.
    peaks = {who: min(one["peak_memory"] for one in found) for who, found in rounds.items()}
    for who in rounds:
        difference(name, rounds[who][0]["answers"], theirs[0]["answers"])
    return {
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "documents_per_second": {who: summary(found) for who, found in speeds.items()},
        "processor_seconds": {who: statistics.median(found) for who, found in work.items()},
        "processor_ratio": statistics.median(b / a for a, b in zip(work["ingot"], work["harness"], strict=True)),
        "peak_memory": peaks,
        "memory_ratio": peaks["ingot"] / peaks["harness"],
        "memory_rise": {
            who: min(one["peak_memory"] - one["loaded_memory"] for one in found) for who, found in rounds.items()
        },
        "largest_difference": difference(name, ours[0]["answers"], theirs[0]["answers"]),
        "batch": batches,
        "documents": ours[0]["documents"],
        "rounds": len(ratios),
        "goal": GOALS.get(name),
    }


def task_cell(name: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Answers and metrics of one task. Raises Refused."""
    metrics = {who: found[who]["metrics"] for who in NAMES}
    same_metrics(name, metrics["ingot"], metrics["harness"])
    off = difference(name, found["ingot"]["answers"], found["harness"]["answers"])
    return {"largest_difference": off, "metrics": metrics, "documents": found["ingot"]["documents"]}


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every contender of every case, in turn; the report. Raises Refused."""
    size = QUICK if args.quick else FULL
    cases = prepare(work, size)
    absent = [name for name in TASKS if name not in cases]
    if absent:
        print(f"left out, ../shared is not beside the checkout: {', '.join(absent)}", file=sys.stderr)

    def alone(who: str, name: str, batches: list[int], *, metrics: bool = False) -> dict[str, Any]:
        spec = {"contender": who, "folder": str(work), "case": name, "batches": batches, "metrics": metrics}
        return run_alone(HERE / "eval_contenders.py", spec | {"threads": THREADS}, work / "result.json", THREADS)

    tasks = {}
    for name, rows in TASKS.items():
        if name in args.cases and name in cases:
            found = {who: alone(who, name, [TASK_TOKENS if who == "ingot" else rows], metrics=True) for who in NAMES}
            tasks[name] = task_cell(name, found)
            print(f"{name}: {tasks[name]['metrics']['ingot']}", flush=True)
    timed = [name for name in BATCHES if name in args.cases]
    batches = {name: {who: list(tried) for who, tried in BATCHES[name].items()} for name in timed}
    rounds: dict[str, dict[str, list[dict[str, Any]]]] = {name: {who: [] for who in BATCHES[name]} for name in timed}
    begun = time.monotonic()
    for number in range(args.rounds):
        # A round that would end too late is not begun; the first always is.
        if number and (time.monotonic() - begun) / 60 * (number + 1) / number > args.minutes:
            break
        for name in timed:
            # Who comes first changes with every round.
            for who in list(BATCHES[name])[:: 1 if number % 2 == 0 else -1]:
                found = alone(who, name, batches[name][who])
                rounds[name][who].append(found)
                batches[name][who] = [int(min(found["seconds"], key=found["seconds"].__getitem__))]
                told = {batch: round(value, 2) for batch, value in found["seconds"].items()}
                print(f"round {number + 1} {name} {who}: {told} s", flush=True)
    best = {name: {who: batches[name][who][0] for who in BATCHES[name]} for name in timed}
    timings = {name: cell(name, rounds[name], best[name]) for name in timed}
    off = [found["largest_difference"] for found in (*timings.values(), *tasks.values())]
    return {
        "machine": machine(),
        "harness": harness_version(),
        "settings": size._asdict() | {"threads": THREADS, "dtype": "float32"},
        "cases": timings,
        "tasks": tasks,
        "ratio": {name: found["ratio"] for name, found in timings.items()},
        "largest_difference": max(off, default=0.0),
    }


def harness_version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    hardware, settings = report["machine"], report["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in hardware["versions"].items())
    lines = [
        "# Evaluation on a CPU",
        "",
        f"{hardware['cpu']}, {settings['threads']} threads, {settings['dtype']}; {hardware['date']}; {versions}, "
        f"lm-evaluation-harness {report['harness']}; commit {hardware['commit']}. Medians; ratios are within a round.",
        "",
        "| | documents/s: Ingot | harness | Ingot is | low to high | by processor time | peak GB: Ingot | harness "
        "| largest difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in report["cases"].items():
        speed, peak = found["documents_per_second"], found["peak_memory"]
        low, high = found["spread"]
        lines.append(
            f"| {name} ({found['documents']}) | {speed['ingot']['median']:.2f} | {speed['harness']['median']:.2f} "
            f"| {found['ratio']:.2f}x | {low:.2f} to {high:.2f} | {found['processor_ratio']:.2f}x "
            f"| {peak['ingot'] / 1e9:.2f} "
            f"| {peak['harness'] / 1e9:.2f} | {found['largest_difference']:.1e} |"
        )
    lines += [
        "",
        *goals(report),
        *beside(report),
        "",
        "| task | metric | Ingot | harness | largest difference |",
        "|---|---|---|---|---|",
    ]
    for name, found in report["tasks"].items():
        for metric, value in found["metrics"]["harness"].items():
            ours = found["metrics"]["ingot"][metric]
            lines.append(
                f"| {name} ({found['documents']}) | {metric} | {ours:.6g} | {value:.6g} "
                f"| {found['largest_difference']:.1e} |"
            )
    return "\n".join(lines) + "\n"


def goals(report: dict[str, Any]) -> list[str]:
    """Each goal, reached or missed."""
    lines = []
    for name, found in report["cases"].items():
        if found["goal"] is not None:
            told = "reached" if found["ratio"] >= found["goal"] else "missed"
            lines.append(f"- {name}: {found['goal']}x the harness: {told} ({found['ratio']:.2f}x)")
            told = "reached" if found["memory_ratio"] <= 1 else "missed"
            lines.append(f"- {name}: no more memory: {told} ({found['memory_ratio']:.2f}x)")
    return lines


def beside(report: dict[str, Any]) -> list[str]:
    """What was measured beside the two."""
    lines = []
    for name, found in report["cases"].items():
        for who in sorted(set(found["peak_memory"]) - set(NAMES)):
            speed, work = found["documents_per_second"][who]["median"], found["processor_seconds"]
            lines.append(
                f"- {name}, {who}: {speed:.2f} documents/s, {work[who] / work['ingot']:.2f} times the processor time "
                f"of Ingot's own batches, peak {found['peak_memory'][who] / 1e9:.2f} GB"
            )
    return lines


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results/eval.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no round that would end later")
    names = [*BATCHES, *TASKS]
    parser.add_argument("--cases", nargs="+", default=names, choices=names)
    parser.add_argument("--work", type=Path, help="keep what is made here instead of in a temporary folder")
    parser.add_argument("--quick", action="store_true", help="tiny models and few documents: does it run at all")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    args = parsed(words)
    if importlib.util.find_spec("lm_eval") is None:
        print('lm-evaluation-harness is not installed: pip install "lm_eval[hf]==0.4.13"', file=sys.stderr)
        return 1
    return 1 if reported(run, args, table) is None else 0


if __name__ == "__main__":
    sys.exit(main())
