"""Training on a CPU: Ingot beside TRL (unpacked, packed), Hugging Face's Trainer and a plain loop.

    python benchmarks/train_cpu.py [--out FILE.json] [--rounds 3] [--minutes M] [--data e2e mixed] [--methods lora full]
                                   [--precisions float32 bfloat16] [--contenders ...] [--work FOLDER] [--quick]

By default float32: some CPUs take minutes for a step in bfloat16. A round of it is 20 processes, about 20 minutes.

Every contender trains the same seeded Llama on the same rows, in a process of its own, in turn. Its first step's loss
and gradient norm must be the plain definition's, and Ingot's final loss TRL's, or nothing is reported and the exit
status is 1.
Writes FILE.json, and beside it a table (.md) and a plot (.png).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cpu_work import encode, prepare
from harness import Refused, gemm_peak, machine, reported, run_alone, summary
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
NAMES = ("ingot", "trl", "trl_packed", "trainer", "plain")
ROWS = {"e2e": 32, "mixed": 8}  # of a step: about 2,000 tokens
STEPS = {"e2e": 10, "mixed": 10}
THREADS = 2
# (loss, gradient norm), relative. bfloat16 keeps 8 bits of every activation.
TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (5e-3, 5e-2)}
FINAL_TOLERANCE = 0.02
GOALS = {"e2e": 1.4, "mixed": 2.0}  # times TRL's faster mode
MEMORY_GOAL = 0.7


def check_first(name: str, precision: str, first: dict[str, float]) -> None:
    """Raise Refused unless the first step is the plain definition's."""
    for key, limit in zip(("loss", "norm"), TOLERANCE[precision], strict=True):
        found, wanted = first[key], first[f"defined_{key}"]
        if not abs(found - wanted) <= limit * abs(wanted):
            raise Refused(f"{name}, {precision}: the first step's {key} is {found:.6g}, by definition {wanted:.6g}")


def cell(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Numbers of one data set, method and precision. Raises Refused when Ingot ends elsewhere than TRL."""
    found: dict[str, Any] = {"contenders": {}, "ratio": {}, "memory_ratio": {}}
    for name, rounds in runs.items():
        speed = {key: summary([one[key] for one in rounds]) for key in ("trainable", "all")}
        found["contenders"][name] = {
            "tokens_per_second": {key: value["median"] for key, value in speed.items()},
            "spread": {key: [value["low"], value["high"]] for key, value in speed.items()},
            "peak_memory": summary([one["peak_memory"] for one in rounds])["median"],
            "memory_rise": summary([one["memory_rise"] for one in rounds])["median"],
            "rounds": len(rounds),
            **{
                key: rounds[0][key]
                for key in ("start_loss", "final_loss", "steps", "tokens_per_step", "targets", "first")
            },
        }
    ours = found["contenders"].get("ingot")
    for name, peer in found["contenders"].items():
        if ours and name != "ingot":
            found["ratio"][name] = ours["tokens_per_second"]["trainable"] / peer["tokens_per_second"]["trainable"]
            found["memory_ratio"][name] = ours["peak_memory"] / peer["peak_memory"]
    if ours and "trl" in runs:
        theirs = found["contenders"]["trl"]["final_loss"]
        if not abs(ours["final_loss"] - theirs) <= FINAL_TOLERANCE * theirs:
            raise Refused(f"final loss on held-out rows: ingot {ours['final_loss']:.4f}, trl {theirs:.4f}")
    return found


def peak_share(speed: float, method: str, blocks: int, head: int, target_share: float, peak: float) -> float:
    """Share of the GEMM peak. Operations per token that cannot be left out: with LoRA 4 per frozen weight (forward, and
    back to the input), full 6; the head is needed at targets only. Attention and adapters are not counted.
    """
    each = 4 if method == "lora" else 6
    return speed * each * (blocks + head * target_share) / peak


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    hardware = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in hardware["versions"].items())
    peaks = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in report["gemm_peak"].items())
    lines = [
        "# Training on a CPU",
        "",
        f"{hardware['cpu']}, {THREADS} threads; {hardware['date']}; {versions}. {peaks}.",
    ]
    for name, found in report["cells"].items():
        rounds = min(numbers["rounds"] for numbers in found["contenders"].values())
        lines += ["", f"## {name}", "", f"Medians of {rounds} rounds.", ""]
        lines += ["| | trainable tokens/s | low to high | all tokens/s | peak GB | final loss | of peak | Ingot is |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for contender, numbers in found["contenders"].items():
            low, high = numbers["spread"]["trainable"]
            speed, ratio = numbers["tokens_per_second"], found["ratio"].get(contender)
            beside = "" if ratio is None else f"{ratio:.2f}x, memory {found['memory_ratio'][contender]:.2f}x"
            lines.append(
                f"| {contender} | {speed['trainable']:.0f} | {low:.0f} to {high:.0f} | {speed['all']:.0f} "
                f"| {numbers['peak_memory'] / 1e9:.2f} | {numbers['final_loss']:.4f} | {numbers['peak_share']:.0%} "
                f"| {beside} |"
            )
        lines += ["", *goals(name.split()[0], found)]
    return "\n".join(lines) + "\n"


def goals(data: str, found: dict[str, Any]) -> list[str]:
    """Goals beside the faster of TRL's modes, each reached or missed."""
    modes = [name for name in ("trl", "trl_packed") if name in found["ratio"]]
    if not modes:
        return []
    peer = min(modes, key=lambda name: found["ratio"][name])
    ratio, share, goal = found["ratio"][peer], found["memory_ratio"][peer], GOALS[data]
    return [
        f"- {goal}x {peer}: {'reached' if ratio >= goal else 'missed'} ({ratio:.2f}x)",
        f"- {MEMORY_GOAL}x {peer}'s memory: {'reached' if share <= MEMORY_GOAL else 'missed'} ({share:.2f}x)",
    ]


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of trainable tokens per second, a panel for each cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = report["cells"]
    figure, axes = plt.subplots(1, len(cells), figsize=(2.8 * len(cells), 3.2), squeeze=False)
    for axis, (name, found) in zip(axes[0], cells.items(), strict=True):
        speeds = {key: value["tokens_per_second"]["trainable"] for key, value in found["contenders"].items()}
        axis.bar(list(speeds), list(speeds.values()))
        axis.set_title(name, fontsize=8)
        axis.tick_params(axis="x", rotation=60, labelsize=7)
    axes[0][0].set_ylabel("trainable tokens/s")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def tokens_of_step(work: Path, name: str, rows: int) -> int:
    """Budget under which a step gets about `rows` rows. It ends before the row that would not fit, so on average half a
    row short: that half is added.
    """
    found = encode(work / f"{name}-train.jsonl", AutoTokenizer.from_pretrained(work / "model"))
    return round(sum(len(row.ids) for row in found) / len(found) * (rows + 0.5))


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every contender of every cell, in turn; the report. Raises Refused."""
    hidden, layers, rows = (64, 2, {"e2e": 16, "mixed": 4}) if args.quick else (512, 8, ROWS)
    counts = {name: rows[name] * (6 if args.quick else STEPS[name]) for name in rows}
    prepare(work, counts, hidden, layers)
    tokens = {name: tokens_of_step(work, name, rows[name]) for name in args.data}
    torch.set_num_threads(THREADS)
    peaks = {name: gemm_peak(getattr(torch, name)) for name in args.precisions}
    cells = list(product(args.data, args.methods, args.precisions))
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {" ".join(key): {} for key in cells}
    begun = time.monotonic()
    for number, key, contender in product(range(args.rounds), cells, args.contenders):
        # A round that would end too late is not begun; the first always is.
        if number and key == cells[0] and contender == args.contenders[0]:
            passed = (time.monotonic() - begun) / 60
            if passed * (number + 1) / number > args.minutes:
                break
        data, method, precision = key
        own = Path(tempfile.mkdtemp(dir=work))
        spec = {"contender": contender, "data": data, "method": method, "precision": precision, "rows": rows[data]}
        spec |= {"folder": str(work), "work": str(own), "tokens": tokens[data], "threads": THREADS}
        spec |= {"plant": args.plant if contender == "ingot" else 0.0}
        try:
            found = run_alone(HERE / "cpu_contenders.py", spec, own / "result.json", THREADS)
        except RuntimeError as error:
            if not number:
                raise
            print(f"round {number + 1} ends here, those before it count: {error}", file=sys.stderr)
            break
        check_first(contender, precision, found["first"])
        runs[" ".join(key)].setdefault(contender, []).append(found)
        print(
            f"round {number + 1} {' '.join(key)} {contender}: {found['trainable']:.0f} trainable tokens/s", flush=True
        )
    report = {"machine": machine(), "gemm_peak": peaks, "cells": {name: cell(found) for name, found in runs.items()}}
    per_layer = hidden * hidden * 3 + 3 * hidden * (hidden * 11 // 4)  # q, o, and k, v of half the heads; gated MLP
    for name, found in report["cells"].items():
        _, method, precision = name.split()
        for numbers in found["contenders"].values():
            speed = numbers["tokens_per_second"]
            share = speed["trainable"] / speed["all"]
            sizes = (per_layer * layers, 32_000 * hidden)
            numbers["peak_share"] = peak_share(speed["all"], method, *sizes, share, peaks[precision])
    report["settings"] = {
        "tokens_per_step": tokens,
        "rows_per_step": rows,
        "rows": counts,
        "hidden": hidden,
        "layers": layers,
        "rounds": args.rounds,
    }
    return report


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results/train_cpu.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no round that would end later")
    parser.add_argument("--data", nargs="+", default=["e2e", "mixed"], choices=["e2e", "mixed"])
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--precisions", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--contenders", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--work", type=Path, help="keep what is made here instead of in a temporary folder")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rows: does it run at all")
    parser.add_argument("--plant", type=float, default=0.0, help="add this to Ingot's first loss: must be refused")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    args = parsed(words)
    report = reported(run, args, table)
    if report is None:
        return 1
    draw(report, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
