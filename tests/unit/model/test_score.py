"""Scores by shared contexts and by windows against scores from all logits."""

import random
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

from ingot.errors import DataError, ModelError
from ingot.model import prefix, projection, sequences
from ingot.model.prefix import ENDLESS, shared_reach
from ingot.model.projection import Projection, target_nll
from ingot.model.score import Group, rolling, score

SHARING = ("llama", "gpt2", "gptj", "cohere", "granite", "stablelm", "mixtral")
# By the whole sequence: windows of 6 tokens (with a cap, with sinks, in chunks), state spaces, both.
WHOLE = ("mistral", "gemma2", "gpt_oss", "llama4_text", "mamba", "falcon_h1", "bloom")
BESIDE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "cohere": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}
SHORT = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 97}


@pytest.fixture
def tiny(small_config: Callable[..., Any]) -> Callable[..., Any]:
    """tiny(kind, **changes) -> a random model of two layers."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    def make(kind: str, **changes: Any) -> Any:
        beside = BESIDE.get(kind)
        config = (
            small_config(kind, **changes)
            if beside is None
            else AutoConfig.for_model(kind, **{**SHORT, **beside, **changes})
        )
        torch.manual_seed(0)
        family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return family.from_config(config, dtype=torch.float32).eval()

    return make


def drawn(seed: int = 0, n: int = 7, header: int = 10, longest: int = 6) -> list[Group]:
    """Groups of several lengths behind a header of `header` tokens."""
    draws = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draws.randrange(3, 97) for _ in range(count)]

    start = ids(header)
    return [
        Group(start + ids(draws.randint(1, 20)), [ids(draws.randint(1, longest)) for _ in range(draws.randint(1, 5))])
        for _ in range(n)
    ]


@torch.no_grad()
def plain(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By definition, from all logits."""
    if model.config.is_encoder_decoder:
        inputs = {"decoder_input_ids": torch.tensor([[model.config.decoder_start_token_id, *continuation[:-1]]])}
        logits_TV = model(input_ids=torch.tensor([context]), **inputs).logits[0]
    else:
        logits_TV = model(input_ids=torch.tensor([context + continuation[:-1]])).logits[0]
    told_TV = logits_TV.float().log_softmax(-1)[-len(continuation) :]
    wanted_T = torch.tensor(continuation)
    return told_TV.gather(1, wanted_T[:, None]).sum().item(), bool((told_TV.argmax(-1) == wanted_T).all())


def check(model: Any, groups: list[Group], within: float = 1e-5, **how: Any) -> None:
    found = score(model, groups, pad_id=0, **how)
    assert [[one.n_tokens for one in row] for row in found] == [[len(c) for c in g.continuations] for g in groups]
    for group, row in zip(groups, found, strict=True):
        for continuation, one in zip(group.continuations, row, strict=True):
            logprob, greedy = plain(model, list(group.context), list(continuation))
            assert one.logprob == pytest.approx(logprob, abs=within)
            assert one.greedy == greedy


class Watch:
    """Tokens that go into a model, and rows that go into its head."""

    def __init__(self, model: Any) -> None:
        self.fed: list[int] = []
        self.projected: list[int] = []
        model.get_input_embeddings().register_forward_hook(lambda _m, given, _o: self.fed.append(given[0].numel()))
        model.get_output_embeddings().register_forward_hook(
            lambda _m, _given, out: self.projected.append(out.shape[:-1].numel())
        )


@pytest.mark.parametrize("kind", [*SHARING, *WHOLE, "t5", "bart"])
def test_scores_equal_those_from_all_logits(tiny: Callable[..., Any], kind: str) -> None:
    model = tiny(kind, **({"decoder_start_token_id": 0} if kind == "t5" else {}))
    check(model, drawn(), tokens_per_batch=150)
    if kind in SHARING:
        assert shared_reach(model, 0) == ENDLESS
    elif kind in WHOLE:
        assert shared_reach(model, 0) == 0


def test_a_greedy_continuation_is_found(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    context = [5, 6, 7]
    written = model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    [[right, wrong]] = score(model, [Group(context, [written[0, 3:].tolist(), [3, 4]])], pad_id=0)
    assert right.greedy and not wrong.greedy


def test_a_window_is_shared_as_far_as_it_reaches(tiny: Callable[..., Any]) -> None:
    model = tiny("mistral", sliding_window=24)
    assert shared_reach(model, 0) == 24
    groups = drawn(1)
    lengths = [len(group.context) for group in groups]
    assert min(lengths) < 18 and max(lengths) > 24  # both ways are taken
    check(model, groups)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_budget_changes_nothing(tiny: Callable[..., Any], kind: str) -> None:
    model, groups = tiny(kind), drawn(2, 9)
    found = [score(model, groups, pad_id=0, tokens_per_batch=budget) for budget in (1, 90, 10_000)]
    for other in found[1:]:
        for one, two in zip(chain(*found[0]), chain(*other), strict=True):
            assert one.logprob == pytest.approx(two.logprob, abs=1e-5) and one.greedy == two.greedy


def test_too_long_loses_tokens_at_the_left(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2")  # its positions end at 64
    draws = random.Random(3)
    whole = [draws.randrange(3, 97) for _ in range(70)]
    tails = [whole[:1], whole[5:9], whole[7:10], whole[1:]]
    check_cut = score(model, [Group(whole[:62], tails[:3]), Group(whole, tails[:2])], pad_id=0)
    for context, row, used in ((whole[:62], check_cut[0], tails[:3]), (whole, check_cut[1], tails[:2])):
        for tail, one in zip(used, row, strict=True):
            kept = (context + tail)[-65:]
            logprob, _ = plain(model, kept[: len(kept) - len(tail)], tail)
            assert one.logprob == pytest.approx(logprob, abs=1e-5)
    with pytest.raises(DataError, match="a continuation of 69 tokens; the model reaches 64"):
        score(model, [Group(whole, [tails[3]])], pad_id=0)


def test_the_header_and_each_context_run_once(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    groups = [Group([*range(3, 43), 50 + n, 60 + n], [[3, 4, 5], [6, 7, 8], [9, 10, 11]]) for n in range(4)]
    shared_reach(model, 0)
    watch = Watch(model)
    score(model, groups, pad_id=0)
    # The header of 40, then 2 tokens of each context behind it (both differ), then 3 x 2 of continuations.
    assert watch.fed == [40, 4 * 2, 4 * 6]
    assert watch.projected == [0, 0, 4 + 4 * 6]  # a context's last row once, for all three


def test_one_token_continuations_need_no_second_pass(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    groups = [Group([3 + n, 4, 5], [[6], [7], [8], [9]]) for n in range(4)]
    check(model, groups)
    watch = Watch(model)
    score(model, groups, pad_id=0)
    assert watch.fed == [12] and watch.projected == [4]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "cohere", "bart"])
def test_no_more_rows_than_a_chunk_are_projected(
    tiny: Callable[..., Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of models that cap, scale or shift their logits behind the head."""
    changes = {"final_logit_softcapping": 0.1} if kind == "gemma2" else {}
    model = tiny(kind, **changes, **({"logits_scaling": 4.0} if kind == "granite" else {}))
    if kind == "bart":
        nn.init.normal_(model.final_logits_bias)
    monkeypatch.setattr(projection, "LOGITS", 97 * 5)
    watch = Watch(model)
    groups = drawn(4)
    score(model, groups, pad_id=0)
    assert max(watch.projected) == 5
    check(model, groups)


def test_a_head_that_is_not_known_gets_all_rows_at_once(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")

    def squared(_model: Any, _given: Any, output: Any) -> Any:
        output.logits = output.logits**2
        return output

    model.register_forward_hook(squared)
    monkeypatch.setattr(projection, "LOGITS", 97 * 5)
    check(model, drawn(4))


def test_long_lists_of_continuations_take_several_passes(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    monkeypatch.setattr(prefix, "SLAB", 7)
    check(model, drawn(5))


def test_progress_counts_groups_and_bad_input_is_named(tiny: Callable[..., Any]) -> None:
    model, heard = tiny("gpt2").train(), []
    score(model, [*drawn(6), Group([4], []), Group([4] * 64, [[3], [4, 5]])], pad_id=0, progress=heard.append)
    assert sum(heard) == 9 and model.training
    for wrong in (Group([], [[3]]), Group([3], [[4], []])):
        with pytest.raises(DataError, match="no token"):
            score(model, [wrong], pad_id=0)
    with pytest.raises(ModelError, match="no output head"):
        Projection(nn.Linear(2, 2))


def test_bfloat16_runs(tiny: Callable[..., Any]) -> None:
    check(tiny("llama").bfloat16(), drawn(7), within=0.3)


def test_an_adapter_counts(tiny: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    check(model, drawn(8))


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_rolling_predicts_every_token_once(tiny: Callable[..., Any], kind: str) -> None:
    model, heard = tiny(kind), []
    draws = random.Random(9)
    rows = [[draws.randrange(3, 97) for _ in range(count)] for count in (1, 15, 16, 17, 40, 0)]
    found = rolling(model, rows, prefix_id=1, max_length=16, pad_id=0, tokens_per_batch=40, progress=heard.append)
    assert sum(heard) == len(rows)
    for row, (total, count) in zip(rows, found, strict=True):
        assert count == len(row)
        wanted = 0.0
        for start in range(0, len(row), 16):
            end = min(start + 16, len(row))
            before = [1, *row][max(0, end - 16) : start + 1]  # the last window reaches back
            wanted += plain(model, before, row[start:end])[0]
        assert total == pytest.approx(wanted, abs=1e-4)


def test_rolling_refuses_what_has_no_text_likelihood(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="encoder-decoder"):
        rolling(tiny("bart"), [[3, 4]], prefix_id=1, pad_id=0)
    with pytest.raises(ModelError, match="give a number"):
        rolling(tiny("mamba"), [[3, 4]], prefix_id=1, pad_id=0)


def test_target_nll_equals_cross_entropy(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "LOGITS", 97 * 5)
    model = tiny("llama")
    torch.manual_seed(1)
    ids_BT, labels_BT = torch.randint(3, 97, (4, 9)), torch.randint(3, 97, (4, 9))
    attention_BT = torch.ones_like(ids_BT)
    attention_BT[1, 6:] = 0
    labels_BT[1, 6:], labels_BT[0, :4], labels_BT[2] = -100, -100, -100
    with torch.no_grad():
        logits_BTV = model(input_ids=ids_BT, attention_mask=attention_BT).logits
    nll_BT = nn.functional.cross_entropy(
        logits_BTV[:, :-1].transpose(1, 2), labels_BT[:, 1:], ignore_index=-100, reduction="none"
    )
    watch = Watch(model)
    found = target_nll(model, ids_BT, attention_BT, labels_BT)
    assert max(watch.projected) == 5
    torch.testing.assert_close(found, nll_BT.sum(1), atol=1e-5, rtol=1e-5)
    assert not target_nll(model, ids_BT, attention_BT, torch.full_like(ids_BT, -100)).any()


def test_batches_hold_their_budget_whatever_comes_in() -> None:
    sizes, extra = [5, 9, 1, 9, 30], [3, 1, 8, 2, 0]
    found = list(sequences.batches(sizes, extra, 40))
    assert found == [[4], [3, 1, 0], [2]]
