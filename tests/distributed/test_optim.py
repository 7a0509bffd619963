"""8-bit moments and bfloat16 weights on several ranks: as one rank, and continued on others with the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow  # launches of several ranks; test_matrix.py has a cell of each kind

LARGE = {"kind": "llama", "hidden_size": 64, "intermediate_size": 96}  # matrices of more elements than stay in float32
EIGHT = {"lr": 3e-3, "weight_decay": 0.1, "clip_grad_norm": 0.5, "state": "int8"}


def cell(name: str, strategy: str, **more: Any) -> dict[str, Any]:
    optim = {**EIGHT, "weights": more.pop("weights", "float32")}
    sections = {
        "parallel": {"strategy": strategy},
        "optim": optim,
        "train": {"max_steps": 6, "evaluate_every_steps": 3},
    }
    return {"name": name, "model": LARGE, "sections": sections, "fused": False, **more}


CELLS = [
    cell("ddp", "ddp"),
    cell("fsdp", "fsdp"),
    cell("halves", "fsdp", weights="bfloat16", dtype="bfloat16"),
    cell("halves-cut-off", "fsdp", stop=4, folder="halves-cut", weights="bfloat16", dtype="bfloat16"),
    cell("halves-continued", "fsdp", resume=True, folder="halves-cut", weights="bfloat16", dtype="bfloat16"),
]


@pytest.fixture(scope="module")
def out(trainer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optim")
    trainer.finished(trainer.launch(2, CELLS, folder))
    trainer.train(cell("one", "none"), folder)
    trainer.train(cell("one-cut-off", "none", stop=4, folder="one-cut"), folder)
    trainer.train(cell("one-continued", "none", resume=True, folder="one-cut"), folder)
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_ranks_train_as_one(name: str, trainer: Any, out: Path) -> None:
    found, expected = trainer.results(out, name)[0], trainer.results(out, "one")[0]
    assert found["same"]
    assert max(expected["norms"]) > EIGHT["clip_grad_norm"]  # clipping inside of the update has something to do
    # A sum in another order may pick the neighbour of a code: that moves a weight by a share of one step.
    assert found["losses"] == pytest.approx(expected["losses"], abs=2e-4)
    assert expected["losses"][-1] < expected["losses"][0]


@pytest.mark.parametrize(("name", "straight"), [("halves-continued", "halves"), ("one-continued", "one")])
def test_a_run_continues_with_the_same_bits(name: str, straight: str, trainer: Any, out: Path) -> None:
    found, expected = trainer.results(out, name), trainer.results(out, straight)
    assert 0 < len(found[0]["losses"]) < 6
    assert found[0]["losses"] == expected[0]["losses"][-len(found[0]["losses"]) :]
    weights = {key: value for key, value in expected[1].items() if key.startswith("weight/")}
    assert weights
    assert all(torch.equal(found[1][key], value) for key, value in weights.items())
