"""Two ranks share every line of tokens: the same losses, gradients and model as one rank that holds whole lines."""

import json
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow  # launches of several ranks; test_matrix.py has a cell of each kind

LORA = {"kind": "lora", "rank": 4}


def cell(name: str, kind: str = "llama", model: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    sections = {"parallel": {"strategy": "ddp", "context": 2}, **more.pop("sections", {})}
    return {"name": name, "model": {"kind": kind, **(model or {})}, "sections": sections, **more}


CELLS = [
    # 120 tokens a step in microbatches of 48, clipped; two key heads for four query heads
    cell("full"),
    cell("lora packed", sections={"adapter": LORA, "data": {"batches": "packed"}}),
    cell("recomputed", sections={"adapter": LORA, "train": {"activation_checkpointing": "full"}}),
    cell("one key head", model={"num_key_value_heads": 1}),
    cell("three key heads", model={"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}),
    cell("window over the cut", "gemma3_text", {"head_dim": 8, "sliding_window": 5}),
    cell("learned positions", "gpt2", {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}),
    cell(
        "lines of two or three tokens",
        lengths={"shortest": 2, "longest": 3},
        sections={"train": {"tokens_per_step": 4}},
    ),
]
CUT_OFF = {"stop": 5}  # the last checkpoint before is that of step 3
UNEVEN = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}


@pytest.fixture(scope="session")
def ran(compared: Any, trainer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("context")
    one_rank = {"parallel": {}}
    trainer.train(cell("begun by one", folder="handed to two", sections=one_rank, **CUT_OFF), folder / "many")
    isolated = cell("isolated", model={"tie_word_embeddings": False}, lengths={"two_kinds": True})
    more = [
        cell("half", "qwen3", {"head_dim": 8}, dtype="bfloat16"),
        cell("begun by two", folder="handed to one", **CUT_OFF),
        cell("taken over by two", folder="handed to two", resume=True, alone=True),
        cell("three heads", model=UNEVEN, fails=True),
    ]
    compare = compared(2, [*CELLS, isolated, *more], folder)
    trainer.train(cell("taken over by one", folder="handed to one", sections=one_rank, resume=True), folder / "many")
    return compare


@pytest.mark.parametrize("name", [cell["name"] for cell in CELLS])
def test_two_ranks_train_as_one(ran: Any, name: str) -> None:
    ran(name)


def test_no_gradient_leaves_a_document_that_lies_on_both_ranks(ran: Any, trainer: ModuleType) -> None:
    """Every second document is learned; the words of the others must not get any gradient."""
    ran("isolated")
    gradient = trainer.results(ran.many, "isolated")[1]["grad/model.embed_tokens.weight"]
    assert gradient[trainer.HALF :].abs().max() > 0
    assert torch.equal(gradient[: trainer.HALF], torch.zeros_like(gradient[: trainer.HALF]))


def test_half_precision_differs_by_its_rounding(ran: Any, trainer: ModuleType) -> None:
    """Norms of heads leave float32, and values are bfloat16: what is exchanged has one type."""
    (curve, found), (reference, expected) = (trainer.results(out, "half") for out in (ran.many, ran.one))
    assert curve["losses"] == pytest.approx(reference["losses"], abs=0.02)  # of 4.6; bfloat16 keeps 8 bits
    gradients = [key for key in expected if key.startswith("grad/")]
    difference = sum((found[key] - expected[key]).square().sum() for key in gradients) ** 0.5
    assert difference / sum(expected[key].square().sum() for key in gradients) ** 0.5 < 0.02


@pytest.mark.parametrize("by", ["one", "two"])
def test_a_run_goes_on_with_another_number_of_ranks_to_a_line(ran: Any, trainer: ModuleType, by: str) -> None:
    whole, rest = (trainer.results(ran.many, name)[0] for name in ("full", f"taken over by {by}"))
    assert len(rest["losses"]) == 3
    assert rest["losses"] == pytest.approx(whole["losses"][3:], abs=1e-5)
    assert rest["watched"] == pytest.approx(whole["watched"][1:], abs=1e-5)


def test_heads_that_cannot_be_shared_are_named(ran: Any) -> None:
    said = json.loads((ran.many / "three heads.json").read_text())
    assert said["kind"] == "RecipeError"
    assert "parallel.context = 2" in said["error"]
    assert "has 3; use one of 1, 3" in said["error"]
