"""Two GPUs share lines and matrices over NCCL: the same losses and gradients as one."""

from typing import Any

import pytest
import torch

LORA = {"adapter": {"kind": "lora", "rank": 4}}


def cell(name: str, strategy: str, sections: dict[str, Any], **shared: int) -> dict[str, Any]:
    parallel = {"parallel": {"strategy": strategy, **shared}}
    return {"name": name, "device": "cuda", "model": {"kind": "llama"}, "sections": {**parallel, **sections}}


CELLS = [
    cell("lines", "ddp", {}, context=2),
    cell("lines, adapters, packed", "ddp", {**LORA, "data": {"batches": "packed"}}, context=2),
    cell("lines, fsdp, recomputed", "fsdp", {"train": {"activation_checkpointing": "full"}}, context=2),
    cell("matrices", "ddp", {}, tensor=2),
    cell("matrices, adapters", "ddp", LORA, tensor=2),
    cell("matrices, fsdp", "fsdp", {}, tensor=2),
]


@pytest.fixture(scope="session")
def ran(compared: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return compared(2, CELLS, tmp_path_factory.mktemp("gpus"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [cell["name"] for cell in CELLS])
def test_two_gpus_train_as_one(ran: Any, name: str) -> None:
    ran(name, tolerance=1e-4)
