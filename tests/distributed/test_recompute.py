"""Activations that are kept in part, and compiled blocks, on several ranks: each cell against one rank."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # launches of several ranks; test_matrix.py has a cell of each kind

WIDE = {"kind": "llama", "hidden_size": 160, "intermediate_size": 192}  # products over more numbers than NARROW


def cell(name: str, strategy: str, adapter: str, **train: Any) -> dict[str, Any]:
    sections = {
        "adapter": {"kind": adapter, "rank": 4},
        "parallel": {"strategy": strategy},
        "train": {"max_steps": 3, "evaluate_every_steps": 3, **train},
    }
    return {"name": name.replace(" ", "-"), "model": WIDE, "sections": sections}


SELECTIVE = [
    cell(f"selective {strategy} {adapter}", strategy, adapter, activation_checkpointing="selective")
    for strategy, adapter in (("ddp", "lora"), ("fsdp", "lora"), ("fsdp", "none"), ("zero2", "none"), ("zero3", "lora"))
]
COMPILED = [cell(f"compiled {strategy}", strategy, "lora", compile=True) for strategy in ("ddp", "fsdp")]


@pytest.fixture(scope="module")
def selective(compared: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compared(2, SELECTIVE, tmp_path_factory.mktemp("selective"))


@pytest.mark.parametrize("name", [one["name"] for one in SELECTIVE])
def test_ranks_that_keep_products_train_as_one(name: str, selective: Any) -> None:
    selective(name, gradients="zero" not in name)  # DeepSpeed keeps them to itself


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is imported
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where it looks at a block's input
def test_ranks_with_compiled_blocks_train_as_one(compared: Any, tmp_path: Path) -> None:
    compare = compared(2, COMPILED, tmp_path)
    for one in COMPILED:
        compare(one["name"])
