"""Each way to choose a token does what its name says, to its own row alone, and what is told is the model's own."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process

from ingot.model.generate import generate, stream
from ingot.model.sampling import Generation, InputError, Piece, Row, Sampling, choose

DRAWS = 2000


def _row(sampling: Sampling, i: int = 0, prompt: tuple[int, ...] = (1,), ids: tuple[int, ...] = ()) -> Row:
    return Row(i, list(prompt), str, random.Random(f"7/{i}"), sampling, list(ids))


def _drawn(probs: list[float], **options: Any) -> set[int]:
    logits_BV = torch.log(torch.tensor(probs)).expand(DRAWS, len(probs))
    sampling = Sampling(1, temperature=1.0, **options)
    return set(choose(logits_BV, [_row(sampling, i) for i in range(DRAWS)]))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"min_p": 0.5}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        # 0.4 of the 0.7 that top_k leaves is more than half of it: top_p is a share of what is left.
        ({"top_k": 2, "top_p": 0.55}, {1}),
        ({"top_p": 0.55}, {1, 3}),
        ({"top_p": 1e-300}, {1}),  # 0 in float32
        ({"logit_bias": ((2, 100.0),)}, {2}),
        ({"logit_bias": ((1, -100.0), (3, -100.0))}, {0, 2}),
    ],
)
def test_what_may_be_drawn(options: dict[str, Any], wanted: set[int]) -> None:
    assert _drawn([0.18, 0.4, 0.12, 0.3], **options) == wanted


def test_penalties_are_those_of_the_references() -> None:
    torch.manual_seed(0)
    logits_BV, prompt, ids = torch.randn(1, 12), (3, 4, 4), (5, 5, 6)
    row = _row(Sampling(9, repetition_penalty=1.7), prompt=prompt, ids=ids)
    processor = logits_process.RepetitionPenaltyLogitsProcessor(1.7)
    wanted = processor(torch.tensor([[*prompt, *ids]]), logits_BV.clone())
    told = _shaped_logits(row, logits_BV)
    torch.testing.assert_close(told, wanted)
    # OpenAI: mu[j] - c[j] * frequency - (c[j] > 0) * presence, over what was written.
    row = _row(Sampling(9, presence_penalty=0.5, frequency_penalty=0.25), prompt=prompt, ids=ids)
    wanted = logits_BV.clone()
    wanted[0, 5] -= 2 * 0.25 + 0.5
    wanted[0, 6] -= 0.25 + 0.5
    torch.testing.assert_close(_shaped_logits(row, logits_BV), wanted)


def _shaped_logits(row: Row, logits_BV: Tensor) -> Tensor:
    from ingot.model.sampling import _shaped

    before = logits_BV.clone()
    shaped = _shaped(logits_BV, [row])
    assert torch.equal(logits_BV, before)  # the model's own logits are still to be told
    return shaped


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-5])
def test_hardly_any_temperature_is_none(temperature: float) -> None:
    logits_BV = torch.tensor([[90.0, 99.0, -300.0]])
    row = _row(Sampling(1, temperature=temperature, repetition_penalty=0.01), prompt=(1,))
    assert choose(logits_BV, [row]) == [1]


def test_rows_do_not_share_their_settings() -> None:
    logits_BV = torch.log(torch.tensor([0.2, 0.5, 0.3])).expand(3, 3).contiguous()
    rows = [
        _row(Sampling(1, logit_bias=((0, 50.0),))),
        _row(Sampling(1)),
        _row(Sampling(1, frequency_penalty=2.0), ids=(1, 1)),
    ]
    assert choose(logits_BV, rows) == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3.0}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_values_out_of_bounds_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        Sampling(1, **options)
    assert caught.value.field == field


class _Script:
    """Allows given ids, one after the other."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.finished, self.failed = ids, False, False

    def allowed(self, width: int) -> Tensor:
        open_V = torch.zeros(width, dtype=torch.bool)
        open_V[self.ids[0]] = True
        return open_V

    def push(self, token: int) -> None:
        assert token == self.ids.pop(0)
        self.finished = not self.ids


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_a_guide_leads_its_own_row(tiny_llama: Callable[..., Any], temperature: float) -> None:
    model, tokenizer = tiny_llama()
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": temperature, "seed": 3}
    [free] = generate(model, tokenizer, [[5, 6]], **options)
    [led] = generate(model, tokenizer, [[5, 6]], guide=lambda: _Script([30, 31, 32]), **options)
    assert led.ids == [30, 31, 32] and led.finish_reason == "stop"
    assert free.ids[:3] != led.ids


def test_a_guide_that_gave_up_left_the_answer_unfinished() -> None:
    for token, ends in ((5, frozenset({5})), (5, frozenset[int]())):
        script = _Script([5])
        script.failed = True
        row = _row(Sampling(9, guide=lambda it=script: it))  # type: ignore[misc]
        row.push(token, ends)
        assert row.finish_reason == "length"


# --- what is told of tokens ------------------------------------------------------------------------------------------


def test_what_is_told_is_the_models_own(tiny_llama: Callable[..., Any]) -> None:
    model, tokenizer = tiny_llama(None)
    prompt, bias = tokenizer("What is")["input_ids"], ((7, 100.0),)
    [answer] = generate(model, tokenizer, [prompt], max_new_tokens=4, top_logprobs=3, logit_bias=bias)
    assert answer.ids == [7] * 4
    with torch.inference_mode():
        logits_TV = model(input_ids=torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1]
    wanted_TV = logits_TV.log_softmax(-1)
    assert len(answer.told) == 4
    for place, told in enumerate(answer.told):
        assert told.token == 7
        assert told.logprob == pytest.approx(float(wanted_TV[place, 7]), abs=1e-4)
        best = wanted_TV[place].topk(3)
        assert [i for i, _ in told.top] == best.indices.tolist()
        assert [value for _, value in told.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    [silent] = generate(model, tokenizer, [prompt], max_new_tokens=4)
    assert silent.told == ()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_stream_tells_of_each_token_once(tiny_llama: Callable[..., Any], stopped: bool) -> None:
    model, tokenizer = tiny_llama(None)
    prompt = tokenizer("The quick brown fox")["input_ids"]
    [free] = generate(model, tokenizer, [prompt], max_new_tokens=16, temperature=1.0, seed=1)
    stop = (free.text[7:9],) if stopped else ()
    sampling = Sampling(16, temperature=1.0, seed=1, stop=stop, top_logprobs=0)
    *pieces, whole = stream(model, tokenizer, prompt, sampling)
    assert isinstance(whole, Generation)
    assert "".join(pieces) == whole.text  # type: ignore[arg-type]
    told = [one for piece in pieces if isinstance(piece, Piece) for one in piece.told]
    assert tuple(told) == whole.told
    ids = [one.token for one in whole.told]
    assert ids == whole.ids[: len(ids)]
    assert tokenizer.decode(ids).startswith(whole.text)
    assert not tokenizer.decode(ids[:-1]).startswith(whole.text)


# --- what is decoded -------------------------------------------------------------------------------------------------


def _bytes_row(sampling: Sampling, decoded: list[int]) -> Row:
    """A row of tokens that are bytes; `decoded` hears how many are decoded each time."""

    def decode(ids: list[int]) -> str:
        decoded.append(len(ids))
        return bytes(ids).decode("utf-8", errors="replace")

    return Row(0, [65] * 20, decode, random.Random(0), sampling)


@pytest.mark.parametrize("garbage", [False, True])
def test_pieces_of_a_long_answer_are_its_text_and_cost_little(garbage: bool) -> None:
    draws = random.Random(1)
    text = "".join(draws.choice("abc é猫🚀") for _ in range(600))
    ids = [draws.randrange(256) for _ in range(900)] if garbage else list(text.encode())
    decoded: list[int] = []
    row, pieces = _bytes_row(Sampling(len(ids), stop=("zzzz",)), decoded), []
    for token in ids:
        row.push(token, frozenset())
        pieces.append(row.piece())
    whole = bytes([65] * 8 + ids).decode("utf-8", errors="replace")[8:]
    assert row.result().text == "".join(pieces) == whole
    if not garbage:
        assert max(decoded) < 60


def test_an_answer_that_nobody_reads_is_decoded_once() -> None:
    decoded: list[int] = []
    row = _bytes_row(Sampling(300), decoded)
    for token in b"x" * 300:
        row.push(token, frozenset())
    assert decoded == []
    assert row.result().text == "x" * 300
    assert len(decoded) <= 2
