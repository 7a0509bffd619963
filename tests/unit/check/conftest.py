"""A recipe's rows as the gate sees them, without its model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ingot.check.gate import ON_ROWS, _collect
from ingot.check.verdict import Status, Verdict
from ingot.preparation import prepare
from ingot.ranks import Ranks
from ingot.recipe_io import parse_recipe
from ingot.stages import resolve


@pytest.fixture
def on_rows(tmp_path: Path, model_folder: Path) -> Callable[..., dict[str, Verdict]]:
    """on_rows(rows, tokenizer=None, **sections) -> proof -> verdict, of the proofs on rows."""

    def prove(rows: list[dict[str, Any]], tokenizer: Any = None, **sections: Any) -> dict[str, Verdict]:
        if tokenizer is not None:
            tokenizer.save_pretrained(model_folder)
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        recipe = parse_recipe({
            "name": "rows",
            "model": {"source": str(model_folder), "dtype": "float32"},
            "data": {"train": "train.jsonl", "validation_share": 0, "test_share": 0, "max_tokens": 512,
                     "cache": str(tmp_path / "cache"), **sections.pop("data", {})},
            "evaluate": {"enabled": False}, "package": {"enabled": False}, "serve": {"enabled": False},
            **sections,
        })  # fmt: skip
        device = torch.device("cpu")
        recipe = resolve(recipe, tmp_path, Ranks(), device, lambda _: None)
        subject, _ = _collect(recipe, tmp_path, prepare(recipe, tmp_path), device)
        return {name: proof(subject) for name, proof in ON_ROWS.items()}

    return prove


@pytest.fixture
def failed() -> Callable[[dict[str, Verdict]], list[str]]:
    """Names of the proofs that failed."""
    return lambda verdicts: [name for name, verdict in verdicts.items() if verdict.status is Status.failed]
