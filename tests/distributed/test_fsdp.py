"""Fully sharded training on gloo ranks: what one rank learns, from a model that no rank holds whole."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ingot.recipe_io import dump_recipe, parse_recipe
from ingot.track import read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOLERANCE = 1e-5  # of each loss, float32
STEPS = 6
IN_PARTS = [
    "tied lora", "tied full", "untied full", "experts full", "experts lora", "encoder full", "encoder lora", "new head",
    "trained head", "head of other size", "copies", "experts all", "tied head",
]  # fmt: skip
WHOLE = {"random": "model.initialization=random", "dora": "adapter.dora"}


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    """cells.py, which the ranks run as a script, as a module."""
    spec = importlib.util.spec_from_file_location("fsdp_cells", HERE / "cells.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fsdp_cells"] = module
    spec.loader.exec_module(module)
    return module


FEW = {"rank": 1, "targets": ["q_proj"]}  # so few that their gradients wait for the last microbatch
PLAIN: dict[str, dict[str, Any]] = {
    "full padded": {"adapter": {"kind": "none"}, "data": {"batches": "padded"}},
    "full recomputed": {"adapter": {"kind": "none"}, "train": {"activation_checkpointing": "full"}},
    "lora": {"adapter": {"kind": "lora", "rank": 4}},
    "lora padded recomputed": {
        "adapter": {"kind": "lora", "rank": 4},
        "data": {"batches": "padded"},
        "train": {"activation_checkpointing": "full"},
    },
    "few packed": {
        "adapter": {"kind": "lora", **FEW},
        "data": {"batches": "packed"},
        "optim": {"clip_grad_norm": 1e-3},
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "fsdp": {"strategy": "fsdp"},
    "copies": {"strategy": "hsdp", "shard_ranks": 1},
    "parts": {"strategy": "hsdp", "shard_ranks": 2},
}
BLOCKS = [
    (shape, plain) for shape in SHAPES for plain in PLAIN if shape == "fsdp" or plain in ("full padded", "few packed")
]


def cell(name: str, sections: dict[str, Any], parallel: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """As cells.py takes it."""
    return {"name": name, "sections": {**sections, "parallel": parallel or {"strategy": "none"}}, **more}


@pytest.fixture(scope="module")
def curves(trainer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of every cell, on one rank and, in one launch, on two."""
    out = tmp_path_factory.mktemp("cells")
    torch.set_num_threads(1)  # beside two ranks more threads only wait for each other
    fsdp, ddp = SHAPES["fsdp"], {"strategy": "ddp"}
    dropped = {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.3}}
    half, bfloat16 = {"stop": 4}, {"dtype": "bfloat16"}
    for name, sections in PLAIN.items():
        trainer.train(cell(name, sections), out)
    trainer.train(cell("bfloat16", PLAIN["lora"], **bfloat16), out)
    trainer.train(cell("half of one", PLAIN["full padded"], folder="one", **half), out)
    two = [cell(f"{shape} {plain}", PLAIN[plain], SHAPES[shape]) for shape, plain in BLOCKS]
    two += [
        cell("fsdp bfloat16", PLAIN["lora"], fsdp, **bfloat16),
        cell("fsdp dropout", dropped, fsdp),
        cell("ddp dropout", dropped, ddp),
        cell("half of fsdp", PLAIN["full padded"], fsdp, folder="two", **half),
        cell("fsdp after one", PLAIN["full padded"], fsdp, folder="one", resume=True),
        cell("copies after fsdp", PLAIN["full padded"], SHAPES["copies"], folder="two-again", resume=True),
    ]
    # A folder is continued once; hsdp goes on from a copy of what fsdp left.
    first, last = two[:-1], two[-1:]
    trainer.finished(trainer.launch(2, first, out), seconds=500)
    shutil.copytree(out / "two", out / "two-again", symlinks=True)
    trainer.train(cell("one after fsdp", PLAIN["full padded"], folder="two", resume=True), out)
    trainer.finished(trainer.launch(2, last, out), seconds=300)
    return out


@pytest.mark.parametrize(("shape", "plain"), BLOCKS)
def test_learns_what_one_rank_learns(trainer: ModuleType, curves: Path, shape: str, plain: str) -> None:
    one, tensors = trainer.results(curves, plain)
    two, found = trainer.results(curves, f"{shape} {plain}")
    assert len(two["losses"]) == STEPS
    for name in ("losses", "watched"):
        assert two[name] == pytest.approx(one[name], abs=TOLERANCE), name
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=TOLERANCE, msg=name)
    assert any(norm > PLAIN[plain].get("optim", {}).get("clip_grad_norm", 0.5) for norm in one["norms"])


def test_bfloat16_is_that_of_one_rank(trainer: ModuleType, curves: Path) -> None:
    """Products are rounded to eight bits, and sums of other rows round elsewhere."""
    one, two = (trainer.results(curves, name)[0]["losses"] for name in ("bfloat16", "fsdp bfloat16"))
    assert two == pytest.approx(one, abs=5e-3)
    exact = trainer.results(curves, "lora")[0]["losses"]
    assert two != pytest.approx(exact, abs=TOLERANCE)


def test_dropout_is_that_of_ddp(trainer: ModuleType, curves: Path) -> None:
    fsdp, ddp = (trainer.results(curves, f"{name} dropout")[0]["losses"] for name in ("fsdp", "ddp"))
    assert fsdp == pytest.approx(ddp, abs=TOLERANCE)


@pytest.mark.parametrize("name", ["one after fsdp", "fsdp after one", "copies after fsdp"])
def test_checkpoints_fit_other_strategies(trainer: ModuleType, curves: Path, name: str) -> None:
    straight, after = (trainer.results(curves, each)[0]["losses"] for each in ("full padded", name))
    assert len(after) == STEPS - 3
    assert after == pytest.approx(straight[3:], abs=TOLERANCE)


@pytest.mark.slow
def test_four_ranks(trainer: ModuleType, tmp_path: Path) -> None:
    """Two copies of two parts, and rows that no number of ranks divides."""
    shapes = {"fsdp": SHAPES["fsdp"], "hsdp": SHAPES["parts"]}
    names = ("full padded", "lora padded recomputed", "few packed")
    for name in names:
        trainer.train(cell(name, PLAIN[name]), tmp_path)
    cells = [cell(f"{shape} {name}", PLAIN[name], shapes[shape]) for shape in shapes for name in names]
    trainer.finished(trainer.launch(4, cells, tmp_path), seconds=900)
    for each in cells:
        one, tensors = trainer.results(tmp_path, each["name"].split(" ", 1)[1])
        four, found = trainer.results(tmp_path, each["name"])
        assert four["losses"] == pytest.approx(one["losses"], abs=TOLERANCE), each["name"]
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=TOLERANCE, msg=f"{each['name']} {name}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What sharded_models.py found on two ranks."""
    out = tmp_path_factory.mktemp("models")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "sharded_models.py", out]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'engine'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)], capture_output=True, text=True, timeout=400, env=env
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    return found


@pytest.mark.parametrize("case", IN_PARTS)
def test_models_are_read_in_parts(models: dict[str, Any], case: str) -> None:
    """The very weights, adapters and heads that a rank alone has, with its gradients and steps."""
    found = models[case]
    assert found["in parts"]
    assert [note for note in found["notes"] if note.startswith("load:")] == []
    _same_model(found)


@pytest.mark.parametrize("case", WHOLE)
def test_models_that_are_loaded_whole_say_so(models: dict[str, Any], case: str) -> None:
    found = models[case]
    assert not found["in parts"]
    [note] = [note for note in found["notes"] if note.startswith("load:")]
    assert "every rank holds the whole model" in note
    assert WHOLE[case] in note
    _same_model(found)


def _same_model(found: dict[str, Any]) -> None:
    assert found["cut"]
    assert found["same trained"]
    assert found["weights"] == 0.0
    assert found["buffers"] == 0.0
    assert found["gradients"] < 1e-4  # of numbers around ten
    assert found["steps"] < 1e-5


def test_no_rank_holds_the_whole_model(models: dict[str, Any]) -> None:
    """Shares of the model in each rank's own memory at most: half of it and a tensor or two, against more than all."""
    assert models["memory"]["parts"] < 0.75
    assert models["memory"]["whole"] > 1.0


@pytest.fixture
def recipe_file(tmp_path: Path, model_folder: Path) -> Path:
    rows = [
        {"prompt": f"item {n} costs", "completion": f" {n * 7 % 50} euros and {'cents ' * (n % 9)}"} for n in range(90)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe(
        {
            "name": "fsdp",
            "model": {"source": str(model_folder)},
            "data": {"train": "rows.jsonl", "max_tokens": 64},
            "objective": {"task": "text-generation"},
            "optim": {"lr": 5e-3},
            "train": {"max_steps": STEPS, "tokens_per_step": 400, "tokens_per_microbatch": 100, "threads": 1},
            "evaluate": {"enabled": False},
            "track": {"enabled": False},
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return path


def finetuned(ranks: int, recipe: Path, out: Path, *more: str) -> Path:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "ingot", "finetune", str(recipe), f"output={out}", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [run] = [path.parent for path in out.glob("*/run.json")]
    return run


def losses(run: Path) -> list[float]:
    return [point["metrics"]["train_loss"] for point in read_metrics(run / "metrics.jsonl")]


def same_tensors(one: Path, two: Path, atol: float) -> None:
    a, b = load_file(one), load_file(two)
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=name)


@pytest.mark.slow
def test_run_folder_is_that_of_ddp(recipe_file: Path, tmp_path: Path) -> None:
    """Adapter and merged model, made from the checkpoint by rank 0 alone."""
    ddp = finetuned(2, recipe_file, tmp_path / "ddp")
    fsdp = finetuned(2, recipe_file, tmp_path / "fsdp", "parallel.strategy=fsdp")
    assert losses(fsdp) == pytest.approx(losses(ddp), abs=TOLERANCE)
    same_tensors(ddp / "adapter" / "adapter_model.safetensors", fsdp / "adapter" / "adapter_model.safetensors", 1e-4)
    same_tensors(ddp / "model" / "model.safetensors", fsdp / "model" / "model.safetensors", 1e-4)
    names = [{path.relative_to(run).as_posix() for path in (run / "model").rglob("*")} for run in (ddp, fsdp)]
    assert names[0] == names[1]
    facts = [json.loads((run / "run.json").read_text())["stages"]["finetune"] for run in (ddp, fsdp)]
    for name in ("parameters", "trainable_parameters", "steps", "final_step", "rows"):
        assert facts[0][name] == facts[1][name], name
