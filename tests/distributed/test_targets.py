"""Encoder-decoders on two gloo ranks: the same losses, gradients and weights as on one."""

from pathlib import Path
from typing import Any

import pytest

T5 = {"kind": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    "kind": "bart",
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 2,
}


def cell(name: str, model: dict[str, Any], strategy: str, **sections: Any) -> dict[str, Any]:
    base = {
        "data": {"max_tokens": 24, "max_target_tokens": 24, "batches": "padded"},
        "objective": {"task": "translation"},
        "parallel": {"strategy": strategy},
        "train": {"max_steps": 4, "evaluate_every_steps": 4, **sections.pop("train", {})},
    }
    return {"name": name, "model": {**model, "dropout_rate": 0.0, "dropout": 0.0}, "sections": {**base, **sections}}


def alike(cell: dict[str, Any]) -> dict[str, Any]:
    """`cell` with fused operations on one rank, too. Adam's first steps of a single row are signs of gradients, some of
    them next to nothing: one rounding of a norm becomes 2e-5 of the fourth loss.
    """
    return {**cell, "fused": True}


CELLS = [
    cell("ddp t5", T5, "ddp"),
    cell("ddp bart lora", BART, "ddp", adapter={"kind": "lora", "rank": 4}),
    # A row a step: the second rank gets a muted one.
    alike(cell("ddp t5 muted", T5, "ddp", train={"tokens_per_step": 12, "tokens_per_microbatch": 48})),
    cell("fsdp t5", T5, "fsdp"),
    cell("fsdp bart", BART, "fsdp"),
    cell("fsdp t5 lora muted", T5, "fsdp", adapter={"kind": "lora", "rank": 4}, train={"tokens_per_step": 12}),
]


@pytest.fixture(scope="module")
def compare(compared: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("targets")
    return compared(2, CELLS, folder)


@pytest.mark.parametrize("name", [cell["name"] for cell in CELLS])
def test_two_ranks_train_as_one(name: str, compare: Any) -> None:
    compare(name)
