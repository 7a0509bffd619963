"""Cutting by a plan, as far as one process can see it; on two ranks: tests/distributed/test_tensor.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ingot.errors import RecipeError
from ingot.model.split import PartDropout, split


def llama(**changes: Any) -> LlamaForCausalLM:
    small = {"vocab_size": 17, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**{**small, "num_attention_heads": 6, "num_key_value_heads": 3, **changes}))


def ranks(size: int) -> Any:
    return SimpleNamespace(size=lambda: size)


@pytest.mark.parametrize("size", [2, 4])
def test_parts_drop_what_the_whole_drops(size: int) -> None:
    whole, features = torch.randn(3, 8), 8
    torch.manual_seed(1)
    expected = nn.Dropout(0.4)(whole)
    parts = []
    for rank, part in enumerate(whole.chunk(size, dim=-1)):
        torch.manual_seed(1)
        parts.append(PartDropout(0.4, features, size, rank)(part))
    torch.testing.assert_close(torch.cat(parts, dim=-1), expected)
    assert (expected == 0).any() and (expected != 0).any()


def test_nothing_is_dropped_in_evaluation() -> None:
    part = torch.randn(3, 4)
    assert PartDropout(0.4, 8, 2, 0).eval()(part) is part


@pytest.mark.parametrize(("size", "changes"), [(2, {}), (4, {}), (6, {}), (2, {"num_key_value_heads": 1})])
def test_heads_are_not_cut(size: int, changes: dict[str, int]) -> None:
    allowed = "1, 3" if not changes else "1"
    with pytest.raises(
        RecipeError, match=f"parallel.tensor = {size}: each rank takes whole heads.*use one of {allowed}$"
    ):
        split(llama(**changes), ranks(size), 0)


def test_a_model_without_a_plan_is_named() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(RecipeError, match=r"no tensor-parallel plan for GPT2LMHeadModel; .*fsdp"):
        split(model, ranks(2), 0)
