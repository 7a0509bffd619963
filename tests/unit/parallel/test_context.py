"""Which models can share lines; sharing itself: tests/distributed/test_context.py."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from ingot.errors import RecipeError
from ingot.parallel.context import check, exchange_of
from ingot.parallel.layout import Layout

SMALL: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}


class Mixer(nn.Module):
    """A model as far as its configuration says."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        text = SimpleNamespace(num_attention_heads=4, **config)
        self.config = SimpleNamespace(get_text_config=lambda: text)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_heads_are_shared_evenly(size: int) -> None:
    check(LlamaForCausalLM(LlamaConfig(**SMALL)), size)


@pytest.mark.parametrize("size", [4, 5, 12])
def test_other_sizes_are_turned_away_with_those_that_work(size: int) -> None:
    with pytest.raises(RecipeError, match=rf"parallel.context = {size}: .* has 6; use one of 1, 2, 3, 6"):
        check(LlamaForCausalLM(LlamaConfig(**SMALL)), size)


def test_a_tensor_group_has_shared_the_heads_before() -> None:
    check(LlamaForCausalLM(LlamaConfig(**SMALL)), 2, tensor=3)
    with pytest.raises(
        RecipeError, match=r"context = 3: .* has 6, parted by parallel.tensor=3 before; use one of 1, 2$"
    ):
        check(LlamaForCausalLM(LlamaConfig(**SMALL)), 3, tensor=3)


@pytest.mark.parametrize("kind", ["linear_attention", "conv", "chunked_attention"])
def test_what_carries_a_state_is_turned_away(kind: str) -> None:
    check(Mixer(layer_types=["full_attention", "sliding_attention"]), 2)
    with pytest.raises(RecipeError, match=rf"Mixer mixes tokens by other means.*{kind}"):
        check(Mixer(layer_types=["full_attention", kind]), 2)


def test_sinks_are_turned_away() -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 4}
    with pytest.raises(RecipeError, match="GptOssForCausalLM has attention sinks"):
        check(GptOssForCausalLM(GptOssConfig(**SMALL, **experts)), 2)


def test_whole_lines_need_no_exchange() -> None:
    assert exchange_of(Layout()) is None
