"""DeepSpeed ZeRO on two gloo ranks: the losses of one rank, exact steps, checkpoints that any strategy goes on from."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # launches of several ranks; test_matrix.py has a cell of each kind

HERE = Path(__file__).parent
STAGES = ("zero1", "zero2", "zero3")
LORA = {"kind": "lora", "rank": 1, "alpha": 2.0}  # one row: the second rank's part of a checkpoint is empty
ADAPTERS = {"lora": LORA, "head": {**LORA, "targets": ["lm_head", "q_proj"]}, "full": {"kind": "none"}}
# name -> (what one rank trains, the cell's own settings). `tight`: every parameter is cut, small buckets.
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "zero2-full": ("full", {"parallel": {"strategy": "zero2"}}),
    "zero3-full": ("full", {"parallel": {"strategy": "zero3"}}),
    "zero3-recomputed": ("lora", {"parallel": {"strategy": "zero3"}, "train": {"activation_checkpointing": "full"}}),
    "zero3-head": ("head", {"parallel": {"strategy": "zero3"}}),
    "zero3-lora-offloaded": ("lora", {"parallel": {"strategy": "zero3", "offload": "parameters"}}),
    "zero1-lora-offloaded": ("lora", {"parallel": {"strategy": "zero1", "offload": "optimizer"}}),
}
CHECKS = (
    "start_changes_nothing",
    "steps_are_those_of_ddp",
    "not_finite_updates_nothing",
    "dropped_gradients_are_gone",
    "unused_parameters_get_no_old_gradient",
    "matrix_products_are_of_the_compute_type",
    "weights_read_in_parts_train_as_whole_ones",
)


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    """cells.py as a module."""
    spec = importlib.util.spec_from_file_location("cells", HERE / "cells.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cells"] = module
    spec.loader.exec_module(module)
    return module


def cell(name: str, kind: str, sections: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A run as cells.py takes it; `kind`: one of ADAPTERS."""
    # Adam divides by a gradient's size: with a smaller eps rounding decides the sign of the smallest updates.
    fixed = {"adapter": ADAPTERS[kind], "optim": {"eps": 1e-4}}
    return {"name": name, "sections": {**(sections or {}), **fixed}, **more}


@pytest.fixture(scope="module")
def out(trainer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of two ranks for everything; what one rank does before and after it.

    A checkpoint is written behind step 3, and runs named "cut" end behind step 4 of 6.
    """
    folder = tmp_path_factory.mktemp("zero")
    for name in ADAPTERS:
        trainer.train(cell(name, name), folder)
    trainer.train(cell("cut-one", "lora", stop=4), folder)
    cells = [cell(name, kind, own, tight=True) for name, (kind, own) in TRAINED.items()]
    for stage in STAGES:
        sections = {"parallel": {"strategy": stage}}
        shutil.copytree(folder / "cut-one", folder / f"one-to-{stage}", symlinks=True)
        cells.append(cell(f"one-to-{stage}", "lora", sections, resume=True, tight=True))
        cells.append(cell(f"cut-{stage}", "lora", sections, stop=4, tight=True))
    # Behind a checkpoint of another stage, and behind offloading.
    other = {"parallel": {"strategy": "zero1", "offload": "optimizer"}}
    cells.append(cell("zero3-to-zero1", "lora", other, folder="cut-zero3", resume=True, stop=5))
    trainer.finished(trainer.launch(2, cells, folder, str(HERE / "zero_ranks.py")), seconds=550)
    for stage in STAGES:
        trainer.train(cell(f"{stage}-to-one", "lora", folder=f"cut-{stage}", resume=True), folder)
    return folder


def losses(trainer: ModuleType, out: Path, name: str) -> list[float]:
    return trainer.results(out, name)[0]["losses"]


@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_train_as_one(name: str, out: Path, trainer: ModuleType) -> None:
    found, weights = trainer.results(out, name)
    expected, expected_weights = trainer.results(out, TRAINED[name][0])
    assert len(found["losses"]) == 6
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["watched"] == pytest.approx(expected["watched"], abs=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert found["losses"][-1] < found["losses"][0]
    for key, weight in weights.items():
        assert weight.shape == expected_weights[key].shape
        assert (weight - expected_weights[key]).abs().max() < 1e-4, key


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_goes_on_where_two_stopped(stage: str, out: Path, trainer: ModuleType) -> None:
    assert losses(trainer, out, f"{stage}-to-one") == pytest.approx(losses(trainer, out, "lora")[3:], abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_go_on_where_one_stopped(stage: str, out: Path, trainer: ModuleType) -> None:
    assert losses(trainer, out, f"one-to-{stage}") == pytest.approx(losses(trainer, out, "lora")[3:], abs=1e-5)


def test_one_stage_goes_on_where_another_stopped(out: Path, trainer: ModuleType) -> None:
    assert losses(trainer, out, "zero3-to-zero1") == pytest.approx(losses(trainer, out, "lora")[3:5], abs=1e-5)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("stage", STAGES)
def test_inside(stage: str, check: str, out: Path) -> None:
    """zero_ranks.py holds the checks."""
    assert json.loads((out / "checks.json").read_text())[f"{stage} {check}"] == ""


def test_no_check_is_forgotten(out: Path) -> None:
    assert len(json.loads((out / "checks.json").read_text())) == len(STAGES) * len(CHECKS)
