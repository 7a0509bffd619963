"""Every combination that the rules allow is trained on two gloo ranks and compared with one rank, step by step."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ingot.parallel.rules import Cell, cells

HERE = Path(__file__).parent
TOLERANCE = 1e-5  # of each loss, float32
CELLS = list(cells())
# The normal part: one of each (strategy, adapter, quantization but int8 and fp8, offload, sharing), the batches in
# turn, and of those that share lines or matrices only what differs in nothing else. The rest: slow part.
_kinds: dict[tuple[Any, ...], list[Cell]] = {}
for _cell in CELLS:
    _kinds.setdefault(
        (_cell.strategy, _cell.adapter, _cell.quantization, _cell.offload, _cell.context, _cell.tensor), []
    ).append(_cell)
FEW = [
    cell
    for cell in (found[number % len(found)] for number, found in enumerate(_kinds.values()))
    if cell.quantization not in ("int8", "fp8") and (cell.context == cell.tensor == 1 or cell.offload == "none")
]
REST = [cell for cell in CELLS if cell not in FEW]
# Trained together. What deepspeed keeps of engines before makes each further one of stage 3 slower (2 s a cell in a new
# process, 10 s after sixty), and new processes take 30 s of two cores to begin.
_STAGE3 = [cell for cell in REST if cell.strategy == "zero3"]
GROUPS = [
    [cell for cell in REST if cell.strategy != "zero3"],
    *(_STAGE3[start : start + 24] for start in range(0, len(_STAGE3), 24)),
]


@pytest.fixture(scope="session")
def trainer() -> ModuleType:
    """cells.py, which the ranks run as a script, as a module."""
    spec = importlib.util.spec_from_file_location("cells", HERE / "cells.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cells"] = module
    spec.loader.exec_module(module)
    return module


def described(cell: Cell) -> dict[str, Any]:
    """`cell` as cells.py takes it."""
    return {
        "name": cell.name.replace(" ", "-"),
        "model": {"kind": "llama", "vocab_size": 98},  # ranks that share matrices share the vocabulary, too
        "sections": {
            "data": {"batches": cell.batches},
            "adapter": {"kind": cell.adapter, "rank": 4},
            "quantization": {"kind": cell.quantization},
            "parallel": {
                "strategy": cell.strategy,
                "offload": cell.offload,
                "context": cell.context,
                "tensor": cell.tensor,
            },
            "train": {"max_steps": 4, "evaluate_every_steps": 4},
        },
    }


def plain(cell: Cell) -> Cell:
    """What `cell` is compared with: the same on one rank."""
    return Cell("none", cell.adapter, cell.quantization, cell.batches, world=1)


def trained(trainer: ModuleType, chosen: list[Cell], out: Path) -> Path:
    """Curves of `chosen` on two ranks, and of what they are compared with, in `out`."""
    trainer.finished(trainer.launch(2, [described(cell) for cell in chosen if cell.world == 2], out), seconds=1000)
    for cell in {plain(cell) for cell in chosen} | {cell for cell in chosen if cell.world == 1}:
        trainer.train(described(cell), out)
    return out


@pytest.fixture(scope="session")
def few(trainer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(trainer, FEW, tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="session")
def rest(trainer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], Path]:
    """Where the curves of a cell are: its group is trained when the first of it is asked for."""
    made: dict[int, Path] = {}

    def folder(cell: Cell) -> Path:
        number = next(number for number, group in enumerate(GROUPS) if cell in group)
        if number not in made:
            made[number] = trained(trainer, GROUPS[number], tmp_path_factory.mktemp("rest"))
        return made[number]

    return folder


def check(trainer: ModuleType, out: Path, cell: Cell) -> None:
    found, _ = trainer.results(out, described(cell)["name"])
    expected, _ = trainer.results(out, described(plain(cell))["name"])
    assert len(found["losses"]) == 4
    assert found["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], abs=TOLERANCE, rel=1e-4)
    assert found["watched"] == pytest.approx(expected["watched"], abs=TOLERANCE)
    assert found["losses"][-1] != found["losses"][0]


@pytest.mark.parametrize("cell", FEW, ids=lambda cell: cell.name)
def test_two_ranks_train_as_one(cell: Cell, few: Path, trainer: ModuleType) -> None:
    check(trainer, few, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", REST, ids=lambda cell: cell.name)
def test_two_ranks_train_as_one_in_every_cell(cell: Cell, rest: Callable[[Cell], Path], trainer: ModuleType) -> None:
    check(trainer, rest(cell), cell)
