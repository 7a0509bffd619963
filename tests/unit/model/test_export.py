"""What an exported folder says of itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from ingot.model.export import export_model


@pytest.mark.parametrize(("stated", "saved"), [(None, 64), (512, 64), (32, 32)])
def test_the_tokenizer_cuts_where_learned_positions_end(
    make_tokenizer: Callable[..., Any], tmp_path: Path, stated: int | None, saved: int
) -> None:
    tokenizer = make_tokenizer(None)
    if stated:
        tokenizer.model_max_length = stated
    before = tokenizer.model_max_length
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    folder = export_model(model, tokenizer, tmp_path / "model", torch.float32, {})
    found = AutoTokenizer.from_pretrained(folder)
    assert (found.model_max_length, tokenizer.model_max_length) == (saved, before)
    assert model(**found("Hello! " * 100, truncation=True, return_tensors="pt")).logits.isfinite().all()


def test_rotary_positions_go_on_behind_their_number(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(None)
    tokenizer.model_max_length = 512
    folder = export_model(model, tokenizer, tmp_path / "model", torch.float32, {})
    assert model.config.max_position_embeddings == 128
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 512
