"""What engines refuse of an adapter, by its configuration."""

from typing import Any

import pytest

from ingot.packaging.portability import refusals

PLAIN: dict[str, Any] = {
    "r": 16,
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": None,
}


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
def test_a_plain_adapter_is_taken_by_all(rank: int) -> None:
    assert refusals(PLAIN | {"r": rank}, tokens=100, rows=128) == []


@pytest.mark.parametrize(
    ("changes", "engine", "why", "fix"),
    [
        ({"use_dora": True}, "vLLM", "DoRA", "adapter.dora"),
        ({"bias": "all"}, "vLLM", "bias", "merged"),
        ({"modules_to_save": ["score"]}, "llama.cpp", "score", "merged"),
        ({"target_parameters": ["experts.down_proj"]}, "vLLM", "experts", "adapter.targets"),
        ({"r": 12}, "vLLM", "room of 16", "adapter.rank: 16"),
        ({"r": 128}, "TGI", "over 64", "adapter.rank: 64"),
        ({"r": 1024}, "vLLM", "512", "adapter.rank"),
        ({"target_modules": ["q_proj", "lm_head"]}, "vLLM", "lm_head", "adapter.targets"),
        ({"target_modules": ["model.embed_tokens"]}, "vLLM", "embed_tokens", "adapter.targets"),
    ],
)
def test_what_is_refused_names_engine_reason_and_field(
    changes: dict[str, Any], engine: str, why: str, fix: str
) -> None:
    [found] = refusals(PLAIN | changes)
    assert engine in found.engines
    assert why in found.why
    assert fix in found.fix


def test_a_resized_vocabulary() -> None:
    [found] = refusals(PLAIN, tokens=130, rows=128)
    assert "130 tokens" in found.why
