"""Encoders that compute no padding: the same answers, with less work, and only where that can be."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
)

from ingot.model import unpadded
from ingot.model.kinds import padded
from ingot.model.pooling import MeanPoolClassifier
from ingot.model.unpadded import NAME, unpad

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 64, "num_labels": 3}  # fmt: skip
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [21, 22], [31], [41, 42, 43, 44, 45, 46, 47], [51, 52, 53], [61]]
TOKENS = sum(map(len, ROWS))


def _config(kind: Any, **more: Any) -> Any:
    names = {"intermediate_size": "hidden_dim"} if kind is DistilBertConfig else {}
    return kind(**{names.get(name, name): value for name, value in (SIZES | more).items()})


def _made(auto: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return auto.from_config(config).eval()


@torch.no_grad()
def _answer(model: nn.Module, rows: list[list[int]] = ROWS) -> Tensor:
    inputs = padded(model, rows, model.config.pad_token_id or 0)  # type: ignore[union-attr]
    output: Any = model(**inputs)
    if isinstance(output, Tensor):
        return output
    if "logits" in output and output.logits.dim() == 2:
        return output.logits
    states: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return states[inputs["attention_mask"].bool()]


def _tokens(layer: nn.Module, seen: list[int]) -> Callable[[], None]:
    return layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel())).remove


@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig, ElectraConfig, DistilBertConfig])
@pytest.mark.parametrize(
    "auto", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForMaskedLM]
)
def test_the_answers_are_those_of_padded_rows(auto: Any, kind: Any) -> None:
    model = _made(auto, _config(kind))
    wanted, alone = _answer(model), torch.cat([_answer(model, [row]) for row in ROWS])
    assert unpad(model)
    torch.testing.assert_close(_answer(model), wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(_answer(model), alone, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(_answer(model, ROWS[:1]), alone[: 1 if wanted.shape[0] == len(ROWS) else len(ROWS[0])])


def test_the_mean_of_a_row_is_that_of_its_tokens() -> None:
    torch.manual_seed(0)
    model = MeanPoolClassifier(AutoModel.from_config(_config(BertConfig)), 3).eval()
    wanted = _answer(model)
    assert unpad(model)
    torch.testing.assert_close(_answer(model), wanted)


def test_layers_compute_no_padding_and_the_last_one_what_the_head_reads() -> None:
    one, every = (_made(auto, _config(BertConfig)) for auto in
                  (AutoModelForSequenceClassification, AutoModelForTokenClassification))  # fmt: skip
    for model, last in ((one, len(ROWS)), (every, TOKENS)):
        assert unpad(model)
        seen: list[int] = []
        ends = [_tokens(layer, seen) for layer in (model.bert.encoder.layer[0].intermediate.dense,
                                                   model.bert.encoder.layer[1].attention.self.key,
                                                   model.bert.encoder.layer[1].intermediate.dense)]  # fmt: skip
        _answer(model)
        assert seen == [TOKENS, TOKENS, last]
        for end in ends:
            end()


@pytest.mark.parametrize(
    ("auto", "config"),
    [
        (AutoModelForSequenceClassification, _config(LlamaConfig, pad_token_id=0)),
        (AutoModelForSequenceClassification, GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, pad_token_id=0)),
        (AutoModel, _config(ModernBertConfig, pad_token_id=0)),
        (AutoModel, _config(BertConfig, is_decoder=True)),
    ],
)
def test_what_it_does_not_suit_stays_as_it_is(auto: Any, config: Any) -> None:
    model = _made(auto, config)
    wanted, before = _answer(model), model.config._attn_implementation
    assert not unpad(model)
    assert model.config._attn_implementation == before != NAME
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(_answer(model), wanted)


class _Mixing(nn.Module):
    """A layer that carries something from token to token, past attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *args: Any, **options: Any) -> Any:
        return self.layer(hidden + hidden.roll(1, 1), *args, **options)


def test_a_layer_that_mixes_rows_is_found_out() -> None:
    model = _made(AutoModel, _config(BertConfig))
    model.encoder.layer[1] = _Mixing(model.encoder.layer[1])
    wanted = _answer(model)
    assert not unpad(model)
    assert torch.equal(_answer(model), wanted)


def test_a_window_that_the_trial_would_not_reach_is_seen() -> None:
    model = _made(AutoModel, _config(BertConfig, local_attention_window=16))
    assert not unpad(model)


def test_a_head_that_looks_at_padding_keeps_it() -> None:
    model = _made(AutoModelForSequenceClassification, _config(BertConfig))
    model.bert.pooler.forward = lambda hidden: hidden.mean(1)
    wanted = _answer(model)
    assert not unpad(model)
    assert torch.equal(_answer(model), wanted)


def test_passes_on_several_threads_and_one_that_fails_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _made(AutoModelForSequenceClassification, _config(BertConfig))
    assert unpad(model)
    halves = [ROWS[:3], ROWS[3:]]
    wanted, wrong = [_answer(model, half) for half in halves], []

    def work(number: int) -> None:
        found = [_answer(model, halves[number]) for _ in range(30)]
        wrong.extend(it for it in found if not torch.allclose(it, wanted[number], atol=1e-6))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

    def failing(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(model.bert.encoder.layer[1], "forward", failing)
        with pytest.raises(MemoryError):
            _answer(model)
    assert unpadded._now.rows is None
    assert torch.allclose(_answer(model, halves[0]), wanted[0], atol=1e-6)


def test_a_row_without_a_token_is_computed_as_before() -> None:
    model = _made(AutoModel, _config(BertConfig))
    inputs = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])}
    with torch.no_grad():
        wanted = model(**inputs).last_hidden_state[0]
        assert unpad(model)
        torch.testing.assert_close(model(**inputs).last_hidden_state[0], wanted)


def test_it_may_be_asked_for_twice() -> None:
    model = _made(AutoModel, _config(BertConfig))
    wanted = _answer(model)
    assert unpad(model)
    hooks = len(model._forward_pre_hooks)
    assert unpad(model)
    assert len(model._forward_pre_hooks) == hooks
    torch.testing.assert_close(_answer(model), wanted)
