"""Adapters on fused experts and on a tied head on two gloo ranks: what one rank learns, and what it continues."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow  # one launch, and the unit tests cover one rank
HERE = Path(__file__).parent
TOLERANCE = 1e-5  # of each loss, float32
STEPS = 6
EXPERTS: dict[str, Any] = {"kind": "mixtral", "num_local_experts": 4, "tie_word_embeddings": False}
HEAD: dict[str, Any] = {"kind": "llama"}
LORA: dict[str, Any] = {"kind": "lora", "rank": 4}
ENDS = {**LORA, "targets": ["lm_head", "embed_tokens", "q_proj"]}
# name: (model, adapter, parallel, what it equals on one rank)
SHARED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "ddp": (EXPERTS, LORA, {"strategy": "ddp"}, "experts"),
    "fsdp": (EXPERTS, LORA, {"strategy": "fsdp"}, "experts"),
    "zero3": (EXPERTS, LORA, {"strategy": "zero3"}, "experts"),
    "fsdp ends": (HEAD, ENDS, {"strategy": "fsdp"}, "ends"),
}


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    """cells.py, which the ranks run as a script, as a module."""
    spec = importlib.util.spec_from_file_location("expert_cells", HERE / "cells.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["expert_cells"] = module
    spec.loader.exec_module(module)
    return module


def cell(
    name: str, model: dict[str, Any], adapter: dict[str, Any], parallel: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """As cells.py takes it; on two ranks blocks are computed again."""
    recompute = {"activation_checkpointing": "full" if parallel["strategy"] == "fsdp" else "none"}
    # Adam makes a step of the learning rate's size out of a gradient that is next to nothing, and so out of its
    # rounding: with 3e-3 one weight of 1,536 differed by 8.5e-5 on an Intel Xeon, with 3e-4 by a tenth of that.
    return {
        "name": name,
        "model": model,
        "sections": {"adapter": adapter, "parallel": parallel, "train": recompute, "optim": {"lr": 3e-4}},
    } | more


@pytest.fixture(scope="module")
def curves(trainer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every cell on one rank and, in one launch, on two."""
    out = tmp_path_factory.mktemp("experts")
    fsdp = (EXPERTS, LORA, {"strategy": "fsdp"})
    # Weights of experts are compared without fused operations: Adam makes 4e-5 of one out of another rounding of a
    # gradient that is next to nothing. `half` and `rest` have them, and the losses of `fsdp`.
    two = [
        cell(name, model, adapter, parallel, fused=name not in ("ddp", "fsdp"))
        for name, (model, adapter, parallel, _) in SHARED.items()
    ]
    two += [cell("half", *fsdp, folder="halves", stop=4), cell("rest", *fsdp, folder="halves", resume=True)]
    two += [cell("tensor", EXPERTS, LORA, {"strategy": "ddp", "tensor": 2}, fails=True)]
    processes = trainer.launch(2, two, out)
    trainer.train(cell("experts", EXPERTS, LORA, {"strategy": "none"}), out)
    trainer.train(cell("ends", HEAD, ENDS, {"strategy": "none"}), out)
    trainer.finished(processes, seconds=300)
    return out


@pytest.mark.parametrize("name", SHARED)
def test_learns_what_one_rank_learns(trainer: ModuleType, curves: Path, name: str) -> None:
    one, tensors = trainer.results(curves, SHARED[name][-1])
    two, found = trainer.results(curves, name)
    assert len(two["losses"]) == STEPS
    assert two["losses"] == pytest.approx(one["losses"], abs=TOLERANCE)
    assert two["same"]
    weights = {key: tensor for key, tensor in tensors.items() if key.startswith("weight/")}
    assert {key for key in found if key.startswith("weight/")} == set(weights)
    gradients = {key: tensor for key, tensor in tensors.items() if key.startswith("grad/")}
    if name in ("ddp", "fsdp"):  # DeepSpeed keeps its own, and `fsdp ends` has fused operations
        assert {key for key in found if key.startswith("grad/")} == set(gradients)
        for key, tensor in gradients.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    for key, tensor in weights.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=2 * TOLERANCE, msg=key)


def test_goes_on_where_it_was(trainer: ModuleType, curves: Path) -> None:
    straight, rest = (trainer.results(curves, name)[0]["losses"] for name in ("fsdp", "rest"))
    assert rest == pytest.approx(straight[3:], abs=TOLERANCE)


def test_tensor_parallel_says_what_to_leave_out(curves: Path) -> None:
    said = (curves / "tensor.json").read_text()
    assert "cuts this layer as moe_tp_experts, and no adapter can be cut with it; leave it out" in said
