"""dpo, orpo, reward and distillation on two gloo ranks: the losses of one."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # launches of several ranks; test_matrix.py has a cell of each kind

OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"task": "chat-completion", "method": "dpo", "beta": 0.5},
    "orpo": {"task": "chat-completion", "method": "orpo"},
    "reward": {"task": "reward"},
    "distillation": {"task": "language-modeling", "method": "distillation", "teacher": "unused", "temperature": 2.0},
}
LORA = {"kind": "lora", "rank": 4}
ONE_ROW = {"tokens_per_step": 1}  # a row a step: the other rank gets a muted one


def cell(name: str, objective: str, strategy: str, **sections: Any) -> dict[str, Any]:
    batches = "padded" if objective == "reward" else sections.pop("batches", "padding-free")
    base = {
        "data": {"max_tokens": 24, "batches": batches},
        "objective": OBJECTIVES[objective],
        "parallel": {"strategy": strategy, **sections.pop("parallel", {})},
        "train": {"max_steps": 4, "evaluate_every_steps": 4, "tokens_per_step": 130, **sections.pop("train", {})},
    }
    return {"name": name, "model": sections.pop("model", {}), "sections": {**base, **sections}}


TENSOR: dict[str, Any] = {"strategy": "ddp", "parallel": {"tensor": 2}}
EVEN = {"vocab_size": 98, "tie_word_embeddings": False}  # ranks share the vocabulary, which is 97 elsewhere
QUICK = [
    *(cell(f"ddp {name}", name, "ddp") for name in OBJECTIVES),
    cell("ddp dpo muted", "dpo", "ddp", train=ONE_ROW),
    cell("tensor dpo of parts", "dpo", **TENSOR, model=EVEN),
    cell("tensor dpo of parts lora", "dpo", **TENSOR, model=EVEN, adapter={**LORA, "targets": ["lm_head", "q_proj"]}),
]
LONG = [
    cell("ddp dpo padded lora", "dpo", "ddp", batches="padded", adapter=LORA),
    cell("ddp orpo muted", "orpo", "ddp", train=ONE_ROW),
    cell("ddp reward muted", "reward", "ddp", train=ONE_ROW),
    *(cell(f"fsdp {name}", name, "fsdp") for name in OBJECTIVES),
    cell("fsdp dpo lora muted", "dpo", "fsdp", adapter=LORA, train=ONE_ROW),
    cell("zero2 dpo muted", "dpo", "zero2", train=ONE_ROW),
    cell("zero3 dpo", "dpo", "zero3", adapter=LORA),
    cell("tensor dpo", "dpo", **TENSOR),
    cell("tensor orpo of parts", "orpo", **TENSOR, model=EVEN),
    cell("tensor reward", "reward", **TENSOR),
    cell("tensor distillation", "distillation", **TENSOR),
    cell("tensor distillation of parts", "distillation", **TENSOR, model=EVEN),
]


@pytest.fixture(scope="module")
def ranks(trainer: ModuleType) -> ModuleType:
    """preference_ranks.py, which the ranks run as a script, as a module."""
    spec = importlib.util.spec_from_file_location("preference_ranks", Path(__file__).with_name("preference_ranks.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["preference_ranks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["preference_ranks"])
    return sys.modules["preference_ranks"]


def curves(cells: list[dict[str, Any]], trainer: ModuleType, ranks: ModuleType, out: Path) -> Any:
    """curves(name) -> what a cell did on two ranks, and on one."""
    (out / "one").mkdir()
    started = trainer.launch(2, cells, out / "two", script=ranks.__file__)
    for one in cells:
        sections = {name: section for name, section in one["sections"].items() if name != "parallel"}
        ranks.train({**one, "sections": sections}, out / "one", ranks.Ranks())
    trainer.finished(started)
    return lambda name: [json.loads((out / many / f"{name}.json").read_text()) for many in ("two", "one")]


@pytest.fixture(scope="module")
def quick(trainer: ModuleType, ranks: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return curves(QUICK, trainer, ranks, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def long(trainer: ModuleType, ranks: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return curves(LONG, trainer, ranks, tmp_path_factory.mktemp("long"))


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["watched"] == pytest.approx(expected["watched"], abs=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert len(expected["losses"]) == 4
    assert len(set(expected["losses"])) > 1
    for pair, other in zip(found["reference"], expected["reference"], strict=True):
        assert pair == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("name", [cell["name"] for cell in QUICK])
def test_two_ranks_train_as_one(name: str, quick: Any) -> None:
    found, expected = quick(name)
    same(found, expected)
    if "dpo" in name:
        assert all(chosen < 0 and rejected < 0 for chosen, rejected in expected["reference"])
    if "of parts" in name:
        assert found["carried"] == 32  # what a layer gives for a token: no logits are gathered


@pytest.mark.slow
@pytest.mark.parametrize("name", [cell["name"] for cell in LONG])
def test_they_do_so_in_parts_and_with_empty_hands(name: str, long: Any) -> None:
    same(*long(name))
