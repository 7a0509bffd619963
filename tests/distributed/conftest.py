"""What trains cells on several ranks, for tests of several files."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def trainer() -> ModuleType:
    """cells.py, which the ranks run as a script, as a module."""
    if "cells" not in sys.modules:
        spec = importlib.util.spec_from_file_location("cells", Path(__file__).with_name("cells.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules["cells"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["cells"])
    return sys.modules["cells"]


@pytest.fixture(scope="session")
def compared(trainer: ModuleType) -> Any:
    """compared(n_ranks, cells, folder) trains `cells` on ranks and on one; compare(name) asserts that they agree."""

    def run(n_ranks: int, cells: list[dict[str, Any]], folder: Path) -> Any:
        many, one = folder / "many", folder / "one"
        one.mkdir(parents=True, exist_ok=True)
        ranks = trainer.launch(n_ranks, cells, many)
        for cell in cells:
            sections = {name: section for name, section in cell["sections"].items() if name != "parallel"}
            if not (cell.get("fails") or cell.get("alone")):  # nothing to compare with
                trainer.train({**cell, "sections": sections}, one)
        trainer.finished(ranks, seconds=1500)

        def compare(name: str, tolerance: float = 1e-5, *, gradients: bool = True) -> None:
            found, expected = trainer.results(many, name), trainer.results(one, name)
            curve, reference = found[0], expected[0]
            assert curve["losses"] == pytest.approx(reference["losses"], abs=tolerance)
            assert curve["watched"] == pytest.approx(reference["watched"], abs=tolerance)
            assert curve["norms"] == pytest.approx(reference["norms"], rel=max(tolerance, 1e-4))
            assert curve["same"]
            assert len(set(reference["losses"])) == len(reference["losses"]) > 1
            keys = [key for key in expected[1] if key.startswith("grad/")] if gradients else []
            for key in keys:
                difference = (found[1][key] - expected[1][key]).abs().max().item()
                assert difference < tolerance, f"{name}: {key} differs by {difference}"

        compare.many, compare.one = many, one  # type: ignore[attr-defined]
        return compare

    return run
