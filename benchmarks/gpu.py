"""Kernels and training steps on one GPU: checked, timed beside their peers, and written down as it goes.

    python benchmarks/gpu.py [--out results.json] [--only SECTION ...]
    python benchmarks/gpu.py --dry-run        # the same path on a CPU, tiny: proves that it runs, measures nothing

Needs torch, triton, transformers, peft, accelerate and numpy; Liger-Kernel takes part where it is installed. Meant to
take less than ten minutes on an H100 or H200. Ends with 1, and times nothing, when an operation is wrong; with 1, too,
when a section failed, after the others. After every section the results so far are on the disk, as JSON and as a table
beside it.
"""

import argparse
import json
import os
import platform
import sys
import time
import traceback
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy", "liger_kernel")
PUBLISHED = {  # by others, on other data, lengths and cards: for orientation, not for a ratio
    "LoRA r16, Llama-3.1-8B, bfloat16": "12,473 tokens/s, H100, 2 full-length rows of 4,096 (NeMo Automodel)",
    "full, Llama-3.2-3B": "8,998 tokens/s, A100, 2 x 4,096 packed, compiled (torchtune)",
    "QLoRA, Llama-3.1-8B": "2,413 tokens/s, RTX 4090, 2 x 2,048 packed (torchtune)",
}
SECTIONS = ("elementwise", "linear_cross_entropy", "lora_linear", "dequantize", "steps", "curves")


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("gpu.py: this machine has no CUDA device; --dry-run goes through the same path on a CPU", file=sys.stderr)
        return 2
    import bare

    bare.install()
    import gpu_kernels
    from gpu_timing import Bench

    bench = Bench(torch.device("cpu" if options.dry_run else "cuda"), options.dry_run)
    results = Results(options.out, bench.dry)
    wrong = results.section("checks", lambda: gpu_kernels.checks(bench))
    red = [name for name, found in wrong.items() if not found["right"]]
    if red:
        print(f"gpu.py: wrong results, so nothing is timed: {', '.join(red)}", file=sys.stderr)
        return 1
    machine = gpu_kernels.Machine(bench)
    results.note("machine", {"copy_bytes_per_second": machine.bandwidth, "product_flops": machine.flops})
    failures: dict[str, str] = {}
    for name in [name for name in SECTIONS if name in options.only]:
        try:
            _run(name, bench, machine, results)
        except Exception as error:  # device time is dear: the other sections are still worth it
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}"[:400]
            results.note("failures", failures)
    results.note("goals", goals(results.values))
    print(f"gpu.py: {results.path} and {results.path.with_suffix('.md').name}")
    return 1 if failures else 0


def _run(name: str, bench: Any, machine: Any, results: "Results") -> None:
    import gpu_kernels

    if name not in ("curves", "steps"):
        results.section(name, lambda: gpu_kernels.SECTIONS[name](bench, machine))
        return
    import gpu_step

    if name == "curves":
        results.section(name, lambda: gpu_step.curves(bench))
    else:
        gpu_step.steps(bench, lambda key, facts: results.note("steps", {key: facts}))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="JSON file; default benchmarks/results/gpu-CARD.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; its times mean nothing")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="these sections; the checks always"
    )
    return parser.parse_args(arguments)


class Results:
    """What was found, on the disk after every section."""

    def __init__(self, path: Path | None, dry: bool) -> None:
        import torch

        card = "cpu" if dry else torch.cuda.get_device_name()
        name = "gpu-dry-run.json" if dry else f"gpu-{card.lower().replace(' ', '-')}.json"
        # Nothing that was not measured stands among the results.
        self.path = path or (Path.cwd() if dry else ROOT / "benchmarks/results") / name
        self.started = time.perf_counter()
        self.values: dict[str, Any] = {
            "measurement": "none: a dry run on a CPU"
            if dry
            else "both passes, median of alternating calls, cold cache",
            "device": card,
            "host": platform.platform(),
            "date": date.today().isoformat(),
            "versions": {name: _version(name) for name in PACKAGES},
            "published": PUBLISHED,
        }

    def section(self, name: str, work: Any) -> Any:
        found = work()
        self.note(name, found)
        return found

    def note(self, name: str, found: Any) -> None:
        held = self.values.get(name)
        self.values[name] = held | found if isinstance(held, dict) and isinstance(found, dict) else found
        self.values["seconds"] = round(time.perf_counter() - self.started, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text("\n".join(table(self.values)) + "\n", encoding="utf-8")
        print(
            f"[{self.values['seconds']:7.1f} s] {name}: {', '.join(found) if isinstance(found, dict) else 'done'}",
            flush=True,
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def goals(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The project's targets beside what was reached, where it was measured."""
    found: list[dict[str, Any]] = []

    def goal(text: str, reached: float | None, wanted: float, *, least: bool = True) -> None:
        if reached is not None:
            met = reached >= wanted if least else reached <= wanted
            found.append({"goal": text, "wanted": wanted, "reached": reached, "met": bool(met)})

    for name, case in values.get("elementwise", {}).items():
        goal(f"{name}: share of the copy bandwidth", case["contenders"]["ingot"].get("roofline_share"), 0.85)
    for name, case in values.get("linear_cross_entropy", {}).items():
        goal(
            f"linear_cross_entropy, {name}: share of its products' time",
            case["contenders"]["ingot"].get("roofline_share"),
            0.9,
        )
    for name, case in values.get("lora_linear", {}).items():
        own, bare = (case["contenders"][who].get("seconds") for who in ("ingot", "bare"))
        goal(
            f"lora_linear, {name}: time over the bare product", own / bare if own and bare else None, 1.08, least=False
        )
    steps = values.get("steps", {})

    def speed(kind: str) -> float | None:
        return steps.get(f"{kind}, ingot", {}).get("real rows", {}).get("tokens_per_second")

    lora, fp8 = speed("lora"), speed("fp8")
    goal("LoRA, real rows, tokens/s (H200)", lora, 14000)
    goal("QLoRA, real rows, tokens/s (H200)", speed("qlora"), 11000)
    memory = steps.get("qlora, ingot", {}).get("real rows", {}).get("peak_bytes")
    goal("QLoRA, peak GB", memory / 1e9 if memory else None, 20, least=False)
    goal("FP8 base over bfloat16 base", fp8 / lora if lora and fp8 else None, 1.35)
    goal("FP8 loss curve, largest difference", values.get("curves", {}).get("largest_difference"), 0.005, least=False)
    return found


def table(values: dict[str, Any]) -> list[str]:
    """The results as a page."""
    lines = [f"# {values['device']}, {values['date']}", "", f"Measurement: {values['measurement']}.", ""]
    lines += [", ".join(f"{name} {number or 'not installed'}" for name, number in values["versions"].items()), ""]
    for section in ("elementwise", "linear_cross_entropy", "lora_linear", "dequantize"):
        if section not in values:
            continue
        lines += [f"## {section}", "", "| case | contender | ms | 20 to 80 % | roofline | peak MiB | ratio to Ingot |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, case in values[section].items():
            for who, time_ in case["contenders"].items():
                if "failed" in time_:
                    lines.append(f"| {name} | {who} | failed: {time_['failed']} | | | | |")
                    continue
                spread = f"{time_['p20'] * 1e3:.3f} to {time_['p80'] * 1e3:.3f}"
                peak = "" if time_.get("peak_bytes") is None else f"{time_['peak_bytes'] / 2**20:.0f}"
                ratio = f"{case['ratio'][who]:.2f}" if who in case["ratio"] else ""
                share = f"{time_['roofline_share']:.0%}" if "roofline_share" in time_ else ""
                lines.append(
                    f"| {name} | {who} | {time_['seconds'] * 1e3:.3f} | {spread} | {share} | {peak} | {ratio} |"
                )
        lines.append("")
    if "steps" in values:
        lines += [
            "## training steps",
            "",
            "| model and contender | rows | tokens/s | MFU 6n | MFU lora_aware | peak GB |",
        ]
        lines += ["|---|---|---|---|---|---|"]
        for name, facts in values["steps"].items():
            if "failed" in facts:
                lines.append(f"| {name} | failed: {facts['failed']} | | | | |")
                continue
            for data in ("full-length", "real rows"):
                found = facts[data]
                if "failed" in found:
                    lines.append(f"| {name} | {data} | failed: {found['failed']} | | | |")
                    continue
                mfu = found["mfu"] or {}
                shares = [f"{mfu[key]:.1%}" if key in mfu else "" for key in ("6n", "lora_aware")]
                peak = "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 1e9:.1f}"
                lines.append(
                    f"| {name} | {data} | {found['tokens_per_second']:,.0f} | {shares[0]} | {shares[1]} | {peak} |"
                )
        lines.append("")
    if "steps" in values:
        lines += ["Published by others, on other data, lengths and cards:", ""]
        lines += [f"- {what}: {speed}" for what, speed in values["published"].items()]
        lines.append("")
    lines += [f"- FAILED {name}: {why}" for name, why in values.get("failures", {}).items()]
    for found in values.get("goals", []) if not str(values["measurement"]).startswith("none") else []:
        word = "reached" if found["met"] else "missed"
        lines.append(f"- {found['goal']}: {found['reached']:.4g}, wanted {found['wanted']:g}: {word}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
