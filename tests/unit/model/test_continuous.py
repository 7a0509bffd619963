"""Continuous batching writes what static batches write, leaves the model as it was, and says what it cannot do."""

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from ingot.errors import ModelError
from ingot.model import continuous
from ingot.model.continuous import generate_continuously, supports
from ingot.model.generate import generate
from ingot.model.sampling import InputError

TEXTS = [
    "Once upon a time",
    "One day, a little boy named Tim went to the park with his mom and his big dog. He saw",
    "The cat",
    "Lily and Ben",
    "She was very happy because",
    "There was a big red ball. " * 8 + "The ball",
]


@pytest.fixture(scope="module")
def stories(request: pytest.FixtureRequest) -> Any:
    """A small trained Llama, its tokenizer, prompts of different lengths."""
    folder = request.getfixturevalue("shared_dir") / "models" / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer, [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    def lasting() -> int:
        return sum(not thread.daemon for thread in threading.enumerate())

    before = lasting()
    yield
    assert lasting() <= before
    gc.collect()
    # By type: `isinstance` wakes deprecated objects of torch.
    assert not any(type(it) is PagedAttentionCache for it in gc.get_objects())


def test_answers_are_those_of_static_batches(stories: Any) -> None:
    model, tokenizer, prompts = stories
    heard: list[int] = []
    for tokens in (10_000, 330):  # all at once; three at a time
        found = generate_continuously(
            model, tokenizer, prompts, max_new_tokens=24, tokens_per_batch=tokens, progress=heard.append
        )
        assert found == generate(model, tokenizer, prompts, max_new_tokens=24)
    assert sum(heard) == 2 * len(prompts)
    assert generate_continuously(model, tokenizer, [], max_new_tokens=4) == []


def test_each_prompt_has_its_own_limit(stories: Any) -> None:
    model, tokenizer, prompts = stories
    limits = [1, 20, 7, 2, 33, 16]
    found = generate_continuously(model, tokenizer, prompts, max_new_tokens=limits)
    for answer, prompt, limit in zip(found, prompts, limits, strict=True):
        assert answer == generate(model, tokenizer, [prompt], max_new_tokens=limit)[0]
    with pytest.raises(InputError, match="2 limits of 6 prompts"):
        generate_continuously(model, tokenizer, prompts, max_new_tokens=[1, 2])
    with pytest.raises(InputError, match="the model reaches"):
        generate_continuously(model, tokenizer, prompts, max_new_tokens=100_000)


def test_a_stop_string_ends_the_answer_and_frees_its_place(stories: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, prompts = stories
    cancelled: list[str] = []
    manager = continuous._Manager.__enter__

    def spy(self: Any) -> Any:
        found = manager(self)
        cancel = found.cancel_request
        found.cancel_request = lambda name: (cancelled.append(name), cancel(name))
        return found

    monkeypatch.setattr(continuous._Manager, "__enter__", spy)
    stop = ["never written", ". ", "Tim"]
    found = generate_continuously(model, tokenizer, prompts, max_new_tokens=60, stop=stop, tokens_per_batch=500)
    assert found == generate(model, tokenizer, prompts, max_new_tokens=60, stop=stop)
    stopped = [place for place, answer in enumerate(found) if answer.finish_reason == "stop"]
    assert len(stopped) > 2
    assert all(str(place) in cancelled for place in stopped if found[place].ids[-1] != tokenizer.eos_token_id)


def test_end_tokens_are_those_of_static_batches(stories: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, prompts = stories
    dot = generate(model, tokenizer, prompts[:1], max_new_tokens=40)[0].ids[12]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [dot, 10**6])
    found = generate_continuously(model, tokenizer, prompts, max_new_tokens=40)
    assert found == generate(model, tokenizer, prompts, max_new_tokens=40)
    assert len({len(answer.ids) for answer in found}) > 2


def test_a_live_adapter_answers(stories: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer, prompts = stories
    torch.manual_seed(0)
    lora: Any = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, r=4)
    adapted: Any = get_peft_model(model, lora).eval()
    try:
        found = generate_continuously(adapted, tokenizer, prompts, max_new_tokens=12)
        assert found == generate(adapted, tokenizer, prompts, max_new_tokens=12)
        with adapted.disable_adapter():
            assert found != generate_continuously(adapted, tokenizer, prompts, max_new_tokens=12)
    finally:
        adapted.unload()


def test_the_embedded_model_answers() -> None:
    from ingot.model.load import load_model, load_tokenizer
    from ingot.recipe import Model

    source = Model(source="ingot://nano")
    model: Any = load_model(source, Path.cwd(), "text-generation", (), dtype=torch.float32).eval()
    tokenizer = load_tokenizer(source, Path.cwd())
    prompts = [list(tokenizer(text)["input_ids"]) for text in TEXTS[:4]]
    found = generate_continuously(model, tokenizer, prompts, max_new_tokens=24)
    assert found == generate(model, tokenizer, prompts, max_new_tokens=24)
    assert model.config._attn_implementation == "ingot"


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("llama", "eager"), ("mistral", "sdpa"), ("gemma3_text", "sdpa"), ("gpt_oss", "eager")],
)
def test_what_is_supported_is_exact(small_config: Callable[..., Any], kind: str, attention: str) -> None:
    """Sliding windows, sinks."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        small_config(kind, eos_token_id=None), attn_implementation=attention
    ).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    assert supports(model) is None
    prompts = [[5, 9, 33, 80, 12, 44, 7, 61, 23, 90, 5], [7, 70], [3, 4, 5, 6]]
    tokenizer: Any = Characters()
    found = generate_continuously(model, tokenizer, prompts, max_new_tokens=20)
    assert [one.ids for one in found] == [
        generate(model, tokenizer, [prompt], max_new_tokens=20)[0].ids for prompt in prompts
    ]
    assert model.config._attn_implementation == attention


class Characters:
    """What `generate` needs of a tokenizer."""

    chat_template = pad_token_id = eos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(33 + i) for i in ids)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("falcon_h1", "states other than keys and values|layers of"),
        ("mamba", "states other than keys and values|layers of"),
        ("llama4_text", "chunked_attention"),
        ("gemma2", "caps the logits"),
        ("gptj", "its attention is its own"),
        ("bert", "writes|its own"),
    ],
)
def test_what_is_not_supported_is_said_before(small_config: Callable[..., Any], kind: str, reason: str) -> None:
    from transformers import AutoModel, AutoModelForSeq2SeqLM

    auto: Any = {"t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM, "bert": AutoModel}
    model = auto.get(kind, AutoModelForCausalLM).from_config(small_config(kind))
    found = supports(model)
    assert found is not None
    with pytest.raises(ModelError, match=reason) as caught:
        generate_continuously(model, Characters(), [[1, 2]], max_new_tokens=2)  # type: ignore[arg-type]
    assert caught.value.field == "evaluate.engine"
    assert "use static" in str(caught.value)


def test_an_older_transformers_is_named(stories: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, "transformers", SimpleNamespace(__version__="5.2.0"))
    assert "5.17" in str(supports(stories[0]))


def test_a_configuration_that_wants_beams_is_refused(stories: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, prompts = stories
    monkeypatch.setattr(model.generation_config, "num_beams", 4)
    with pytest.raises(ModelError, match="num_beams = 4"):
        generate_continuously(model, tokenizer, prompts, max_new_tokens=4)


@pytest.mark.parametrize(("attention", "error"), [("eager", None), ("eager", KeyboardInterrupt), ("sdpa", ValueError)])
def test_the_model_is_left_as_it_was(stories: Any, attention: str, error: type[BaseException] | None) -> None:
    model, tokenizer, prompts = stories
    model.set_attn_implementation(attention)
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    settings = model.generation_config.to_dict()

    def interrupt(_count: int) -> None:
        if error is not None:
            raise error

    try:
        if error is None:
            generate_continuously(model, tokenizer, prompts, max_new_tokens=6, progress=interrupt)
        else:
            with pytest.raises(error):
                generate_continuously(model, tokenizer, prompts, max_new_tokens=60, progress=interrupt)
        assert model.config._attn_implementation == attention
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert model.generation_config.to_dict() == settings
        assert not hasattr(model, "_cached_continuous_batching_manager")
    finally:
        model.set_attn_implementation("sdpa")
        model.eval()


def test_a_loop_that_fails_is_an_error(
    stories: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, prompts = stories

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(model.model, "forward", broken)
    with pytest.raises(ModelError, match=r"no memory left.*use static"):
        generate_continuously(model, tokenizer, prompts, max_new_tokens=4)
    assert "Traceback" not in capfd.readouterr().err
