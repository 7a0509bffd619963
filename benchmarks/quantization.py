"""What a base in few bits costs in loss: recipes trained over each, with the same rows, order and adapters.

    python benchmarks/quantization.py [--recipes quickstart e2e] [--steps 100] [--out FILE.json]

`other seed` is the full base once more with other adapters and another order of rows: differences below its own are
noise. `fp8 products` computes as a Hopper GPU does: activations and gradients are rounded to float8, too, by rows;
on another device that is simulated. About fifteen minutes on two CPU cores; losses do not depend on their load.
Writes FILE.json, and beside it a table (.md).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import machine

import ingot
from ingot.model.quantize import quantize
from ingot.recipe import Quantization
from ingot_kernels import quantized

HERE = Path(__file__).resolve().parent
RECIPES = {"quickstart": "quickstart.yaml", "e2e": "text-generation/e2e.yaml"}
KINDS = ("none", "other seed", "int8", "fp8", "fp8 products", "nf4")
EVERY = 20  # steps between validations
GOAL = 0.005  # the loss curve over an FP8 base beside that over the full one, relative


def bits(kind: str) -> float:
    """Bits a weight, with its scales."""
    if kind not in ("int8", "fp8", "nf4"):
        return 32.0
    weight = torch.randn(1024, 1024)
    parts = quantize(weight, Quantization(kind=kind))  # type: ignore[arg-type]
    return 8.0 * sum(part.numel() * part.element_size() for part in parts.values()) / weight.numel()


def trained(name: str, kind: str, steps: int, folder: Path) -> dict[str, Any]:
    """Validation losses by step, and how far merged models are from what was trained."""
    simulated, base = kind.endswith("products"), kind.split()[0]
    real = quantized.in_float8
    if simulated:
        quantized.in_float8 = lambda kind, packed, like: kind == "fp8"
    try:
        overrides: dict[str, Any] = {"quantization.kind": "none" if base == "other" else base}
        overrides |= {"train.max_steps": steps, "train.evaluate_every_steps": EVERY, "train.final": "last"}
        overrides |= {"output": str(folder), "check.enabled": False, "track.enabled": False}
        overrides |= {"train.seed": 1} if base == "other" else {}
        file = HERE.parent / "recipes" / RECIPES[name]
        recipe = ingot.load_recipe(file, [f"{key}={value}" for key, value in overrides.items()])
        run: Any = ingot.finetune(recipe, home=file.parent)
    finally:
        quantized.in_float8 = real
    folder = Path(getattr(run, "folder", run))
    points = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))["stages"]["finetune"]
    return {
        "bits": bits(base),
        "validation": {
            point["step"]: point["metrics"]["validation_loss"]
            for point in points
            if "validation_loss" in point["metrics"]
        },
        "merge_difference": facts["merge_difference"],
        "merge_difference_full_base": facts.get("merge_difference_full_base"),
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    hardware = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in hardware["versions"].items() if name != "trl")
    lines = ["# Training over a base in few bits", "", f"{hardware['cpu']}; {hardware['date']}; {versions}."]
    for name, found in report["recipes"].items():
        lines += ["", f"## {name}, {report['steps']} steps of the same rows", ""]
        lines += ["| base | bits a weight | validation loss | beside the full | farthest in its curve | (1) | (2) |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [_line(kind, numbers, found["none"]) for kind, numbers in found.items()]
        for words, differ in (("at the end", _last), ("all along", _farthest)):
            worst = max(abs(differ(found[kind], found["none"])) for kind in ("fp8", "fp8 products"))
            noise = abs(differ(found["other seed"], found["none"]))
            verdict = "reached" if worst <= GOAL else "missed"
            lines += ["", f"FP8 within {GOAL:.1%} {words}: {verdict}, {worst:.2%} (another seed {noise:.2%})."]
    lines += ["", "(1), (2): largest difference of logits from the model as trained, as a share of the largest logit,"]
    lines += [
        "when its adapter is merged into (1) its own base, turned back, as Ingot exports it, (2) the base in full."
    ]
    return "\n".join(lines) + "\n"


def _line(kind: str, numbers: dict[str, Any], base: dict[str, Any]) -> str:
    full, loss = numbers["merge_difference_full_base"], list(numbers["validation"].values())[-1]
    beside = "|  |  " if kind == "none" else f"| {_last(numbers, base):+.2%} | {_farthest(numbers, base):+.2%} "
    merged = f"| {numbers['merge_difference']:.1e} | {'' if full is None else f'{full:.1e}'} |"
    return f"| {kind} | {numbers['bits']:.2f} | {loss:.5f} {beside}{merged}"


def _apart(numbers: dict[str, Any], base: dict[str, Any]) -> list[float]:
    """Relative difference of the losses at each validated step."""
    return [loss / base["validation"][step] - 1 for step, loss in numbers["validation"].items()]


def _last(numbers: dict[str, Any], base: dict[str, Any]) -> float:
    return _apart(numbers, base)[-1]


def _farthest(numbers: dict[str, Any], base: dict[str, Any]) -> float:
    return max(_apart(numbers, base), key=abs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=HERE / "results/quantization.json")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for name in args.recipes:
        found[name] = {}
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as folder:
                found[name][kind] = trained(name, kind, args.steps, Path(folder))
            print(name, kind, found[name][kind], flush=True)
    report = {"machine": machine(), "steps": args.steps, "recipes": found}
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
