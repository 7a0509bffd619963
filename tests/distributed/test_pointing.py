"""Classes, label sets, tags, answers, hidden tokens on two gloo ranks: losses, gradients and weights as on one."""

from pathlib import Path
from typing import Any

import pytest

BERT = {"kind": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SETS, TAGS, POINT, GAPS = "multi-label-classification", "token-classification", "question-answering", "fill-mask"
CLASS = "text-classification"
LORA = {"kind": "lora", "rank": 4}


def cell(name: str, task: str, strategy: str, batches: str = "padding-free", **sections: Any) -> dict[str, Any]:
    train = {"max_steps": 4, "evaluate_every_steps": 4, **sections.pop("train", {})}
    base = {
        "data": {"batches": batches},
        "objective": {"task": task},
        "parallel": {"strategy": strategy},
        "train": train,
    }
    kinds = {"num_labels": 3} if task == TAGS else {}
    return {"name": name, "model": {**BERT, **kinds}, "sections": {**base, **sections}}


# One of a row a step: the second rank gets a muted one.
MUTED = {"tokens_per_step": 12, "tokens_per_microbatch": 48}
CELLS = [
    cell("ddp class muted", CLASS, "ddp", train=MUTED),
    cell("ddp sets", SETS, "ddp"),
    cell("ddp tags muted", TAGS, "ddp", train=MUTED),
    cell("ddp answers muted", POINT, "ddp", "padded", train=MUTED),
    cell("ddp gaps", GAPS, "ddp", adapter=LORA),
    cell("fsdp class", CLASS, "fsdp", "padded"),
    cell("fsdp sets muted", SETS, "fsdp", train=MUTED),
    cell("fsdp tags", TAGS, "fsdp", "padded"),
    cell("fsdp answers", POINT, "fsdp", "padded", adapter=LORA),
    cell("fsdp gaps muted", GAPS, "fsdp", train=MUTED),
]


@pytest.fixture(scope="module")
def compare(compared: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("pointing")
    return compared(2, CELLS, folder)


@pytest.mark.parametrize("name", [cell["name"] for cell in CELLS])
def test_two_ranks_train_as_one(name: str, compare: Any) -> None:
    compare(name)
