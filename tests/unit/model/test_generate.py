"""Greedy answers are transformers' own; samples do not depend on the batch; stops, limits and streams are exact."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from ingot.data.conversation import Conversation, Message, PromptCompletion
from ingot.data.template import prompt_ids
from ingot.model.generate import end_ids, generate, plain_prompt_ids, stream
from ingot.model.runtime import Runtime
from ingot.model.sampling import Generation, InputError, Row, Sampling, choose
from ingot.recipe import Data, Objective

WORDS = ["Hello!", "The quick brown fox jumps over the lazy dog.", "What is", "I would like to book a table for two."]
NO_END = 10**6  # an id outside the vocabulary: nothing ends early


@pytest.fixture
def endless(tiny_llama: Callable[..., Any]) -> Any:
    """Model and tokenizer that never end of their own accord, and prompts of different lengths."""
    model, tokenizer = tiny_llama(None)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokenizer.eos_token = None
    return model, tokenizer, [tokenizer(text)["input_ids"] for text in WORDS]


def _reference(model: Any, prompt: list[int], n: int) -> list[int]:
    config = GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()


def _force(model: Any, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `model` write `ids`, whatever it is asked."""
    script, forward = iter(ids), model.forward

    def forced(input_ids: torch.Tensor, **options: Any) -> Any:
        output = forward(input_ids=input_ids, **options)
        output.logits = torch.nn.functional.one_hot(torch.tensor([[next(script)]]), output.logits.shape[-1]).float()
        return output

    monkeypatch.setattr(model, "forward", forced)


def test_greedy_ids_are_those_of_transformers(endless: Any) -> None:
    model, tokenizer, prompts = endless
    answers = generate(model, tokenizer, prompts, max_new_tokens=20)
    assert [answer.ids for answer in answers] == [_reference(model, prompt, 20) for prompt in prompts]
    assert [answer.n_prompt for answer in answers] == [len(prompt) for prompt in prompts]
    assert {answer.finish_reason for answer in answers} == {"length"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_batch(endless: Any, temperature: float) -> None:
    model, tokenizer, prompts = endless
    options: dict[str, Any] = {"max_new_tokens": 15, "temperature": temperature, "top_p": 0.9, "seed": 5}
    together = generate(model, tokenizer, prompts, tokens_per_batch=10_000, **options)
    alone = generate(model, tokenizer, prompts, tokens_per_batch=1, **options)
    assert together == alone


def test_left_padding_keeps_absolute_positions(endless: Any) -> None:
    """Llama's rotary positions are relative and would hide a shift; GPT-2's are learned one by one."""
    _, tokenizer, prompts = endless
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), eos_token_id=None, bos_token_id=None, **sizes)).eval()
    answers = generate(model, tokenizer, prompts, max_new_tokens=20)
    assert [answer.ids for answer in answers] == [_reference(model, prompt, 20) for prompt in prompts]


def test_rows_that_end_leave_the_others_as_they_were(endless: Any) -> None:
    model, tokenizer, prompts = endless
    free = generate(model, tokenizer, prompts, max_new_tokens=20)
    # Row 0 shall end at its fourth token; the others end wherever they write the same one.
    end = free[0].ids[3]
    model.generation_config.eos_token_id = [NO_END, end]
    for answer, whole in zip(generate(model, tokenizer, prompts, max_new_tokens=20), free, strict=True):
        cut = whole.ids[: whole.ids.index(end) + 1] if end in whole.ids else whole.ids
        assert answer.ids == cut
        assert answer.finish_reason == ("stop" if end in whole.ids else "length")


def test_the_end_token_is_counted_but_not_shown(endless: Any) -> None:
    model, tokenizer, prompts = endless
    [free] = generate(model, tokenizer, prompts[:1], max_new_tokens=6)
    end = free.ids[4]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    [answer] = generate(model, tokenizer, prompts[:1], max_new_tokens=6)
    first = free.ids.index(end)
    assert answer.ids == free.ids[: first + 1]
    assert answer.text == tokenizer.decode(free.ids[:first], skip_special_tokens=True)


def test_a_padding_id_ends_nothing(endless: Any) -> None:
    model, tokenizer, prompts = endless
    [free] = generate(model, tokenizer, prompts[:1], max_new_tokens=6)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free.ids[2])
    model.generation_config.pad_token_id = model.config.pad_token_id = free.ids[2]
    assert generate(model, tokenizer, prompts[:1], max_new_tokens=6)[0].ids == free.ids


def test_end_ids_of_every_owner_and_of_the_chat_template(tiny_llama: Callable[..., Any]) -> None:
    model, tokenizer = tiny_llama()
    model.generation_config.eos_token_id = [7, 8]
    model.config.eos_token_id = 9
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_ids(model, tokenizer) == {7, 8, 9, tokenizer.eos_token_id, end_of_turn}
    tokenizer.chat_template = None
    assert end_of_turn not in end_ids(model, tokenizer)


def test_results_come_in_input_order_and_progress_counts_them(endless: Any) -> None:
    model, tokenizer, prompts = endless
    counted: list[int] = []
    answers = generate(model, tokenizer, prompts, max_new_tokens=3, tokens_per_batch=1, progress=counted.append)
    assert [a.n_prompt for a in answers] == [len(p) for p in prompts]
    assert counted == [1] * len(prompts)
    assert generate(model, tokenizer, [], max_new_tokens=3) == []


def test_batches_keep_to_the_token_budget(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, prompts = endless
    seen: list[tuple[int, int]] = []
    forward = model.forward

    def spy(input_ids: torch.Tensor, **options: Any) -> Any:
        seen.append(tuple(options["attention_mask"].shape))
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", spy)
    generate(model, tokenizer, prompts, max_new_tokens=16, tokens_per_batch=90)
    assert max(rows for rows, _ in seen) > 1
    assert max(rows * tokens for rows, tokens in seen) <= 90


def test_a_stop_string_ends_the_text_before_it(endless: Any) -> None:
    model, tokenizer, prompts = endless
    [free] = generate(model, tokenizer, prompts[1:2], max_new_tokens=20)
    stop = free.text[5:8]
    [answer] = generate(model, tokenizer, prompts[1:2], max_new_tokens=20, stop=["never written", stop])
    assert answer.text == free.text[: free.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert len(answer.ids) < 20


def test_a_prompt_that_does_not_fit_is_refused_with_counts(endless: Any) -> None:
    model, tokenizer, prompts = endless
    room = 128 - len(prompts[0])
    assert len(generate(model, tokenizer, prompts[:1], max_new_tokens=room)[0].ids) == room
    with pytest.raises(ValueError, match=rf"{len(prompts[0])} prompt tokens \+ {room + 1} new tokens = 129.* 128"):
        generate(model, tokenizer, prompts[:1], max_new_tokens=room + 1)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("max_tokens", {"max_new_tokens": 0}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": math.nan}),
        ("top_p", {"top_p": 0.0}),
        ("stop", {"stop": [""]}),
    ],
)
def test_impossible_settings_name_their_field(endless: Any, field: str, options: dict[str, Any]) -> None:
    model, tokenizer, prompts = endless
    with pytest.raises(InputError) as caught:
        generate(model, tokenizer, prompts, **({"max_new_tokens": 3} | options))
    assert caught.value.field == field


def test_an_empty_prompt_is_refused(endless: Any) -> None:
    model, tokenizer, _ = endless
    with pytest.raises(InputError, match="no token"):
        generate(model, tokenizer, [[]], max_new_tokens=3)


def test_the_model_is_left_in_its_mode(endless: Any) -> None:
    model, tokenizer, prompts = endless
    model.train()
    generate(model, tokenizer, prompts[:1], max_new_tokens=2)
    assert model.training


def test_sampling_follows_the_distribution_within_top_p() -> None:

    def drawn(sampling: Sampling) -> list[int]:
        return choose(logits_BV, [Row(i, [1], str, random.Random(f"3/{i}"), sampling) for i in range(4000)])

    logits_BV = torch.log(torch.tensor([0.2, 0.5, 0.3])).expand(4000, 3)
    picked = drawn(Sampling(1, temperature=1.0, top_p=0.7))
    assert 0 not in picked
    # 0.5 of 0.8 kept; four standard deviations of a share over 4000 draws are 0.031.
    assert picked.count(1) / 4000 == pytest.approx(0.625, abs=0.031)
    hot = drawn(Sampling(1, temperature=100.0))
    assert hot.count(0) / 4000 == pytest.approx(1 / 3, abs=0.031)


def test_seeds_repeat_and_differ(endless: Any) -> None:
    model, tokenizer, prompts = endless

    def draw(seed: int | None) -> list[list[int]]:
        return [a.ids for a in generate(model, tokenizer, prompts, max_new_tokens=12, temperature=1.0, seed=seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)
    twins = generate(model, tokenizer, prompts[:1] * 2, max_new_tokens=12, temperature=1.0, seed=1)
    assert twins[0].ids != twins[1].ids


@pytest.mark.parametrize("stop_at", [None, 6])
@pytest.mark.parametrize("which", range(len(WORDS)))
def test_stream_pieces_join_to_the_text(endless: Any, which: int, stop_at: int | None) -> None:
    model, tokenizer, prompts = endless
    [free] = generate(model, tokenizer, [prompts[which]], max_new_tokens=24)
    stop = () if stop_at is None else (free.text[stop_at : stop_at + 4],)
    [whole] = generate(model, tokenizer, [prompts[which]], max_new_tokens=24, stop=stop)
    *pieces, last = list(stream(model, tokenizer, prompts[which], Sampling(24, stop=stop)))
    assert last == whole
    assert "".join(str(piece) for piece in pieces) == whole.text
    assert len(pieces) > 1 or stop


def test_a_stream_holds_back_half_characters(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, prompts = endless
    wanted = tokenizer("a€b", add_special_tokens=False)["input_ids"]
    assert len(wanted) > 3  # the sign is several byte tokens
    _force(model, wanted, monkeypatch)
    pieces = [p for p in stream(model, tokenizer, prompts[0], Sampling(len(wanted))) if isinstance(p, str)]
    assert pieces == ["a", "€", "b"]


def test_a_stream_holds_back_what_may_become_a_stop(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, prompts = endless
    _force(model, tokenizer("xa€b", add_special_tokens=False)["input_ids"], monkeypatch)
    pieces = list(stream(model, tokenizer, prompts[0], Sampling(20, stop=("a€",))))
    assert pieces[:-1] == ["x"]


# --- the runtime -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("prompt", ["name: Paris", "ends with a space ", "<s>has its own", "breaks\n"])
def test_plain_prompts_are_encoded_as_in_training(
    make_tokenizer: Callable[..., Any], adds_bos: bool, prompt: str
) -> None:
    tokenizer = make_tokenizer(None, adds_bos=adds_bos)
    objective = Objective(task="text-generation")
    trained = prompt_ids(PromptCompletion(prompt, "x"), tokenizer, Data(train="rows.jsonl"), objective)
    assert plain_prompt_ids(tokenizer, prompt) == trained


@pytest.mark.parametrize("adds_bos", [False, True])
def test_chats_are_encoded_as_in_training(
    chat_folder: Path, make_tokenizer: Callable[..., Any], adds_bos: bool
) -> None:
    make_tokenizer(adds_bos=adds_bos).save_pretrained(chat_folder)
    runtime = Runtime.load(chat_folder)
    turns = (Message("system", "Be brief."), Message("user", "Hello!"), Message("assistant", "x"))
    example = Conversation(turns)
    trained = prompt_ids(example, runtime.tokenizer, Data(train="rows.jsonl"), Objective())
    asked = [{"role": turn.role, "content": turn.content} for turn in turns[:2]]
    assert runtime.chat_ids(asked) == trained
    assert trained.count(runtime.tokenizer.bos_token_id) == 1


def test_tools_reach_the_template(chat_folder: Path) -> None:
    runtime = Runtime.load(chat_folder)
    asked = [{"role": "user", "content": "Hello!"}]
    tools = [{"type": "function", "function": {"name": "book", "parameters": {}}}]
    assert "book" in runtime.tokenizer.decode(runtime.chat_ids(asked, tools))
    assert "book" not in runtime.tokenizer.decode(runtime.chat_ids(asked))


def test_defaults_come_from_the_folder_and_shrink_to_the_context(text_folder: Path) -> None:
    runtime = Runtime.load(text_folder)
    runtime.model.generation_config.eos_token_id = None
    assert len(runtime.complete("Hello!").ids) <= 12
    long = [5] * 120
    assert runtime.sampling([long], {"max_new_tokens": None}).max_new_tokens == 8
    with pytest.raises(InputError, match=r"128 prompt tokens leave no room.* 128"):
        runtime.sampling([[5] * 128], {})
    with pytest.raises(InputError, match="new tokens"):
        runtime.generate([long], max_new_tokens=9)


def test_a_template_that_refuses_is_an_input_error(chat_folder: Path) -> None:
    (chat_folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}", encoding="utf-8")
    with pytest.raises(InputError, match="roles must alternate") as caught:
        Runtime.load(chat_folder).chat_ids([{"role": "user", "content": "a secret"}])
    assert caught.value.field == "messages"
    assert "secret" not in str(caught.value)


def test_a_folder_without_ingot_json_is_understood(
    chat_folder: Path, text_folder: Path, head_folder: Path, mean_folder: Path
) -> None:
    found = []
    for folder in (chat_folder, text_folder, head_folder, mean_folder):
        (folder / "ingot.json").unlink()
        found.append(Runtime.load(folder).task)
    assert found == ["chat-completion", "text-generation", "text-classification", "text-classification"]


def test_weights_that_are_not_safetensors_are_refused(text_folder: Path) -> None:
    runtime = Runtime.load(text_folder)
    torch.save(runtime.model.state_dict(), text_folder / "pytorch_model.bin")
    (text_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        Runtime.load(text_folder)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Runtime.load(tmp_path)


@pytest.mark.parametrize("kind", ["head_folder", "mean_folder"])
def test_classification_matches_single_forward_passes(kind: str, request: pytest.FixtureRequest) -> None:
    runtime = Runtime.load(request.getfixturevalue(kind))
    answers = runtime.classify(WORDS)
    for text, (label, probs) in zip(WORDS, answers, strict=True):
        ids = torch.tensor([runtime.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            output = runtime.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        single = torch.softmax(output if isinstance(output, torch.Tensor) else output.logits, -1)[0]
        assert list(probs.values()) == pytest.approx(single.tolist(), abs=1e-5)
        assert label == ["bad", "fair", "good"][int(single.argmax())]
    assert len({tuple(probs.values()) for _, probs in answers}) == len(WORDS)


def test_a_decoder_without_padding_id_classifies_row_by_row(head_folder: Path) -> None:
    wanted = Runtime.load(head_folder).classify(WORDS)
    runtime = Runtime.load(head_folder)
    runtime.model.config.pad_token_id = None
    for (_, probs), (_, expected) in zip(runtime.classify(WORDS), wanted, strict=True):
        assert list(probs.values()) == pytest.approx(list(expected.values()), abs=1e-5)


def test_long_texts_are_cut_as_in_training_or_refused(mean_folder: Path) -> None:
    text = " ".join(WORDS * 10)
    with pytest.raises(InputError, match="the model reaches 128"):
        Runtime.load(mean_folder).classify([text])
    about = json.loads((mean_folder / "ingot.json").read_text())
    (mean_folder / "ingot.json").write_text(json.dumps(about | {"max_tokens": 16}))
    runtime = Runtime.load(mean_folder)
    cut = runtime.tokenizer.decode(runtime.tokenizer(text)["input_ids"][:16])
    assert runtime.classify([text])[0][1] == pytest.approx(runtime.classify([cut])[0][1])


def test_a_runtime_does_only_its_task(head_folder: Path, text_folder: Path) -> None:
    with pytest.raises(InputError, match="classifies"):
        Runtime.load(head_folder).complete("x")
    with pytest.raises(InputError, match="does not classify"):
        Runtime.load(text_folder).classify(["x"])
    with pytest.raises(InputError, match="no chat template"):
        Runtime.load(text_folder).chat([{"role": "user", "content": "x"}])


def test_a_real_model_tells_its_story(shared_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stories"
    shutil.copytree(shared_dir / "models" / "stories260k", folder)
    answer = Runtime.load(folder).complete("Once upon a time", max_new_tokens=60)
    assert answer.text.startswith(", there was a little girl named Lily. She loved to play outside in the park.")
    assert "a big, red ball" in answer.text
    assert isinstance(answer, Generation)
