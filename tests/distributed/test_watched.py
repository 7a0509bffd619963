"""Tasks that are measured while two gloo ranks train: the values of one rank, and training that knows nothing of it."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LORA = {"kind": "lora", "rank": 4}
EVEN = {"vocab_size": 98, "tie_word_embeddings": False}  # ranks share the vocabulary, which is 97 elsewhere


def cell(name: str, strategy: str, **more: Any) -> dict[str, Any]:
    model = more.pop("model", {"kind": "llama"})
    sections = {"parallel": {"strategy": strategy, **more.pop("parallel", {})}, **more.pop("sections", {})}
    return {"name": name, "model": model, "sections": {**sections, "train": {"max_steps": 5, "final": "last"}}, **more}


QUICK = [cell("ddp lora", "ddp", sections={"adapter": LORA}), cell("fsdp", "fsdp")]
T5 = {
    "kind": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
TRANSLATION = {"objective": {"task": "translation"}, "data": {"max_target_tokens": 16, "batches": "padded"}}
LONG = [
    cell("ddp", "ddp"),
    cell("ddp dropout", "ddp", sections={"adapter": {**LORA, "dropout": 0.3}}),
    cell("fsdp lora", "fsdp", sections={"adapter": LORA}),
    cell("hsdp", "hsdp", parallel={"shard_ranks": 1}),
    cell("zero2", "zero2"),
    cell("zero3", "zero3"),
    cell("zero3 lora", "zero3", sections={"adapter": LORA}),
    cell("context", "none", parallel={"context": 2}),
    cell("tensor", "ddp", parallel={"tensor": 2}),
    cell("tensor of parts", "ddp", parallel={"tensor": 2}, model={"kind": "llama", **EVEN}),
    cell("tensor fsdp", "fsdp", parallel={"tensor": 2}),
    cell("fsdp t5", "fsdp", kind="targets", model=T5, sections=TRANSLATION),
]
SHARING = ("ddp", "ddp lora", "ddp dropout", "zero2", "context")  # every rank answers rows of its own


@pytest.fixture(scope="module")
def ranks(trainer: ModuleType) -> ModuleType:
    """watched_ranks.py, which the ranks run as a script, as a module."""
    spec = importlib.util.spec_from_file_location("watched_ranks", Path(__file__).with_name("watched_ranks.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["watched_ranks"] = module
    spec.loader.exec_module(module)
    return module


def check(trainer: ModuleType, ranks: ModuleType, cells: list[dict[str, Any]], folder: Path) -> None:
    many, one = folder / "many", folder / "one"
    started = trainer.launch(2, cells, many, script=ranks.__file__)
    one.mkdir()
    for it in cells:
        sections = {name: section for name, section in it["sections"].items() if name != "parallel"}
        ranks.both({**it, "sections": sections}, one, trainer.Ranks())
    trainer.finished(started)
    for it in cells:
        found, expected = (json.loads((where / f"{it['name']}.json").read_text()) for where in (many, one))
        assert found["same"], f"{it['name']}: other weights or losses than without measuring"
        assert found["alike"], f"{it['name']}: ranks disagree"
        assert [point[0] for point in found["curve"]] == [0, 2, 4, 5]
        drops = "dropout" in it["name"]  # other ranks drop others: only the base model is the same
        for point, reference in list(zip(found["curve"], expected["curve"], strict=True))[: 1 if drops else None]:
            assert point == pytest.approx(reference, abs=1e-6), it["name"]
        assert drops or found["best"] == expected["best"]
        assert len({point[1] for point in expected["curve"]}) > 1, "the text never changes: nothing is shown"
        shares = [6 * 4, 5 * 4] if it["name"] in SHARING else [11 * 4, 11 * 4]
        assert found["answered"] == shares, it["name"]


@pytest.mark.slow
def test_ranks_measure_what_one_measures(trainer: ModuleType, ranks: ModuleType, tmp_path: Path) -> None:
    check(trainer, ranks, QUICK, tmp_path)


@pytest.mark.slow
def test_so_do_other_strategies(trainer: ModuleType, ranks: ModuleType, tmp_path: Path) -> None:
    check(trainer, ranks, LONG, tmp_path)
