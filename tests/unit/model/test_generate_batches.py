"""Rows that leave a running batch, and rows that take their places: the answers are those of each row alone."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, GPT2Config, GPT2LMHeadModel

from ingot.model.generate import generate
from ingot.model.generate_cache import ROOM, GrowingLayer, cut, growing, join, shrink
from ingot.model.running import alike

LONGEST, MOST = 12, 14
DECODERS = ("llama", "mistral", "gemma3_text", "gpt_oss", "falcon_h1", "gptj", "llama4_text")


class Letters:
    """What `generate` needs of a tokenizer: ids of a vocabulary of 97 as characters."""

    chat_template = pad_token_id = eos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(33 + i) for i in ids)


def _prompts(count: int) -> list[list[int]]:
    draws = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, LONGEST, (count,), generator=draws).tolist()
    return [torch.randint(3, 97, (length,), generator=draws).tolist() for length in lengths]


def _alone(model: Any, prompt: list[int], end: int | None = None) -> list[int]:
    config = GenerationConfig(max_new_tokens=MOST, do_sample=False, eos_token_id=end, pad_token_id=0)
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()


def _ended(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Give the model an end token that rows write at different times; their answers, each alone."""
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    free = [_alone(model, prompt) for prompt in prompts]
    places = Counter(token for ids in free for token in set(ids[1:]) - set(ids[:1]))
    end = places.most_common(1)[0][0]
    wanted = [_alone(model, prompt, end) for prompt in prompts]
    model.generation_config.eos_token_id = end
    assert len({len(ids) for ids in wanted}) > 2
    return wanted


def _model(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():  # answers of a model as it is drawn are one token over and over
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.parametrize("kind", DECODERS)
def test_answers_are_those_of_each_row_alone(small_config: Callable[..., Any], kind: str) -> None:
    model, prompts = _model(small_config(kind)), _prompts(9)
    wanted = _ended(model, prompts)
    for tokens in (4 * (LONGEST + MOST), 10_000):
        found = generate(model, Letters(), prompts, max_new_tokens=MOST, tokens_per_batch=tokens)  # type: ignore[arg-type]
        assert [one.ids for one in found] == wanted


def _shapes(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Of each call of the model's blocks: rows, tokens run, tokens held."""
    seen: list[tuple[int, int, int]] = []
    inner = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    forward = inner.forward

    def spy(**inputs: Any) -> Any:
        seen.append((*inputs["input_ids"].shape, inputs["attention_mask"].shape[1]))
        return forward(**inputs)

    monkeypatch.setattr(inner, "forward", spy)
    return seen


def test_a_waiting_row_takes_the_place_of_a_finished_one(
    small_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = _model(small_config("llama")), _prompts(16)
    wanted = _ended(model, prompts)
    seen, heard = _shapes(model, monkeypatch), []
    budget = 4 * (LONGEST + MOST)
    found = generate(
        model,
        Letters(),
        prompts,
        max_new_tokens=MOST,
        tokens_per_batch=budget,
        progress=heard.append,  # type: ignore[arg-type]
    )
    assert [one.ids for one in found] == wanted
    assert sum(heard) == len(prompts)
    prompts_run = [place for place, (_, run, held) in enumerate(seen) if run == held]
    steps = [place for place, (_, run, held) in enumerate(seen) if run < held]
    assert sum(seen[place][0] for place in prompts_run) == len(prompts)
    # The batch is wider after the second entry than the rows that enter: others were running.
    assert any(seen[place][0] > seen[place - 1][0] for place in steps if place - 1 in prompts_run[1:])
    # All rows of one batch at a time until the last of them is finished would take this many.
    order = sorted(wanted, key=len, reverse=True)
    assert len(steps) < sum(len(order[place]) - 1 for place in range(0, len(order), 4)) * 1.3
    assert max(rows * held for rows, _, held in seen) <= budget


def test_columns_that_only_finished_rows_needed_are_dropped(
    small_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = _model(small_config("llama")), [[5] * 40, [7, 8, 9]]
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    long, short = (_alone(model, prompt) for prompt in prompts)
    end = next(token for token in long[1:] if token not in short)
    model.generation_config.eos_token_id = end
    seen = _shapes(model, monkeypatch)
    found = generate(model, Letters(), prompts, max_new_tokens=MOST, tokens_per_batch=10_000)  # type: ignore[arg-type]
    assert found[1].ids == short
    assert seen[-1] == (1, 1, 3 + MOST - 1)


def test_an_adapter_gets_positions_and_one_row_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's `forward` names neither argument; GPT-2's positions are learned, so padding would shift them."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=97, eos_token_id=None, bos_token_id=None, **sizes))
    lora: Any = LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    model: Any = get_peft_model(base, lora).eval()
    prompts = _prompts(5)
    wanted = [_alone(model, prompt) for prompt in prompts]
    rows: list[int] = []
    base.lm_head.register_forward_hook(lambda _module, given, _output: rows.append(given[0].shape[1]))
    found = generate(model, Letters(), prompts, max_new_tokens=MOST, tokens_per_batch=10_000)  # type: ignore[arg-type]
    assert [one.ids for one in found] == wanted
    assert set(rows) == {1}


def test_a_layer_has_room_for_tokens_to_come() -> None:
    draws = torch.Generator().manual_seed(0)

    def states(rows: int, tokens: int) -> torch.Tensor:
        return torch.randn(rows, 2, tokens, 4, generator=draws)

    cache, reference = DynamicCache(), DynamicCache()
    keys, values = states(3, 5), states(3, 5)
    cache.update(keys, values, 0), reference.update(keys, values, 0)
    assert growing(cache)
    places = set()
    for _ in range(ROOM + 1):
        keys, values = states(3, 1), states(3, 1)
        found, wanted = cache.update(keys, values, 0), reference.update(keys, values, 0)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
        places.add(found[0].data_ptr())
    assert len(places) == 1
    layer = cache.layers[0]
    assert isinstance(layer, GrowingLayer)
    assert cache.get_seq_length() == reference.get_seq_length() == 5 + ROOM + 1


def test_buffers_of_a_full_batch_stay() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(8, 2, 60, 4), torch.zeros(8, 2, 60, 4), 0)
    assert growing(cache)
    layer: Any = cache.layers[0]
    places = set()
    for token in range(20 * ROOM):
        cache.update(torch.full((8, 2, 1, 4), float(token)), torch.zeros(8, 2, 1, 4), 0)
        cut(cache, 1)
        places.add(layer._buffers[0].data_ptr())
    assert layer.keys[0, 0, :, 0].tolist() == [float(token) for token in range(20 * ROOM - 60, 20 * ROOM)]
    assert len(places) == 1
    cut(cache, 59)
    shrink(cache, [], 2)
    for _ in range(3 * ROOM):
        cache.update(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4), 0)
        cut(cache, 1)
    assert layer._buffers[0].shape == (2, 2, 1 + 1 + ROOM, 4)  # a small batch does not keep what a large one needed


def test_rows_that_leave_and_join_are_those_of_lists() -> None:
    """Held against a list of each row's own keys, through any order of steps, joins, leaves and cuts."""
    draws, choices = torch.Generator().manual_seed(0), random.Random(0)

    def begun(rows: int, tokens: int) -> tuple[DynamicCache, list[torch.Tensor]]:
        keys = torch.randn(rows, 2, tokens, 4, generator=draws)
        cache = DynamicCache()
        cache.update(keys, -keys, 0)
        assert growing(cache)
        return cache, list(keys)

    cache, wanted = begun(3, 5)
    layer: Any = cache.layers[0]
    for _ in range(400):
        what = choices.choice(["step"] * 6 + ["join", "leave"])
        if what == "step":
            keys = torch.randn(len(wanted), 2, 1, 4, generator=draws)
            cache.update(keys, -keys, 0)
            wanted = [torch.cat([row, new], 1) for row, new in zip(wanted, keys, strict=True)]
        elif what == "join" and len(wanted) < 12:
            other, more = begun(choices.randrange(1, 4), choices.randrange(1, 60))
            join(cache, other)
            wanted += more
        elif what == "leave" and len(wanted) > 2:
            wanted[0] = wanted[-1]
            shrink(cache, [(len(wanted) - 1, 0)], len(wanted) - 1)
            wanted.pop()
        cut(cache, layer.keys.shape[2] - max(row.shape[1] for row in wanted))
        assert layer.keys.shape[0] == len(wanted)
        for place, row in enumerate(wanted):
            assert torch.equal(layer.keys[place, :, -row.shape[1] :], row)
            assert torch.equal(layer.values[place, :, -row.shape[1] :], -row)
            assert not layer.values[place, :, : -row.shape[1]].any()  # what is masked is multiplied by 0, not skipped
        assert layer._buffers[0].shape[0] <= 14 + 14 // 4


def test_rows_of_similar_length_go_together() -> None:
    lengths = [3, 90, 4, 88, 91, 5, 40]
    groups = alike(lengths, 8)
    assert sorted(place for group in groups for place in group) == list(range(7))
    assert [[lengths[place] for place in group] for group in groups] == [[91, 90, 88], [40], [5, 4, 3]]
    assert alike(lengths, 10_000) == [[4, 1, 3, 6, 5, 2, 0]]
    assert alike([], 8) == []
