"""What a base in few bits costs in loss: the quickstart's training over each, with the same rows, order and adapters.

    python benchmarks/quantization.py [STEPS] [OUT.json]

`fp8 products` computes as a Hopper GPU does: activations and gradients are rounded to float8, too, a scale a row. On
another device that is simulated. About five minutes on two CPU cores for 120 steps.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import ingot
from ingot.model.quantize import QuantizedLinear

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("none", "int8", "fp8", "fp8 products", "nf4")


def losses(kind: str, steps: int, folder: Path) -> dict[str, float]:
    """Validation loss at the end and the mean training loss of the last ten steps."""
    simulated = kind.endswith("products")
    real = QuantizedLinear._in_float8
    if simulated:
        QuantizedLinear._in_float8 = lambda self, like: self.kind == "fp8"  # type: ignore[method-assign]
    try:
        overrides = {"quantization.kind": kind.split()[0], "train.max_steps": steps, "output": str(folder)}
        overrides |= {"check.enabled": False, "track.enabled": False, "train.final": "last"}
        recipe = ingot.load_recipe(
            ROOT / "recipes/quickstart.yaml", [f"{key}={value}" for key, value in overrides.items()]
        )
        run: Any = ingot.finetune(recipe)
    finally:
        QuantizedLinear._in_float8 = real  # type: ignore[method-assign]
    folder = Path(getattr(run, "folder", run))
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [line["metrics"]["train_loss"] for line in lines if "train_loss" in line["metrics"]]
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))["stages"]["finetune"]
    return {"validation": facts["best_validation_loss"], "last_ten": sum(train[-10:]) / 10, "steps": len(train)}


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 120
    found: dict[str, Any] = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = losses(kind, steps, Path(folder))
        apart = found[kind]["validation"] / found["none"]["validation"] - 1
        print(
            f"{kind:14s} validation {found[kind]['validation']:.5f} ({apart:+.2%})  train {found[kind]['last_ten']:.5f}"
        )
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
