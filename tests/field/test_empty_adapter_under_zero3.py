"""Under ZeRO-3 a rank's parameters are empty tensors between uses, and saving them writes an adapter of 40 bytes while
training looks fine.

peft#453 (2023), huggingface/trl#4416, peft#2892, peft#2500, DeepSpeed#7900.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ingot.parallel.strategies import parallelize
from ingot.preparation import prepare
from ingot.ranks import Ranks
from ingot.recipe_io import dump_recipe, load_recipe, parse_recipe
from ingot.track import read_metrics
from ingot.train.loop import validation_loss

# The command line as users type it, but nothing is small enough to stay whole: every tensor is cut.
COMMAND = """
from ingot.parallel import zero
zero.WHOLE_ELEMENTS = 0
from ingot.cli import main
main()
"""


@pytest.fixture
def recipe_file(tmp_path: Path, model_folder: Path) -> Path:
    rows = [{"prompt": f"item {n} costs", "completion": f" {n * 7 % 50} euros"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe(
        {
            "name": "adapter",
            "model": {"source": str(model_folder), "dtype": "float32"},
            "data": {"train": "rows.jsonl", "max_tokens": 64, "cache": str(tmp_path / "cache")},
            "objective": {"task": "text-generation"},
            "adapter": {"rank": 3},
            "optim": {"lr": 5e-3},
            "train": {"max_steps": 4, "tokens_per_step": 300, "tokens_per_microbatch": 100, "final": "last"},
            "parallel": {"strategy": "zero3"},
            "evaluate": {"enabled": False},
            "track": {"enabled": False},
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return path


def test_the_saved_adapter_is_the_trained_one(recipe_file: Path, model_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(COMMAND)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    roots = os.pathsep.join(str(Path(__file__).resolve().parents[2] / name) for name in ("engine", "kernels"))
    done = subprocess.run(
        [*launch, "finetune", str(recipe_file), f"output={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": roots},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    [run] = [path.parent for path in (tmp_path / "out").glob("*/run.json")]

    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 7  # A and B of seven linear layers in two blocks
    assert [name for name, tensor in saved.items() if tensor.numel() == 0 or not tensor.any()] == []

    base = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="ingot")
    recipe = load_recipe(recipe_file)
    recipe = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"batches": "padded"}),
            "parallel": recipe.parallel.model_copy(update={"strategy": "none"}),
        }
    )
    rows = prepare(recipe, tmp_path).rows

    def loss(model: torch.nn.Module) -> float:
        sharded = parallelize(model, Ranks(), recipe, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            return validation_loss(sharded, rows, recipe, recipe.train.tokens_per_microbatch)

    before = loss(base)
    after = loss(PeftModel.from_pretrained(base, run / "adapter", is_trainable=True))
    metrics = [point["metrics"] for point in read_metrics(run / "metrics.jsonl")]
    watched = [values["validation_loss"] for values in metrics if "validation_loss" in values]
    assert after == pytest.approx(watched[-1], abs=1e-5)
    assert after < before - 0.01
