"""Where a text is cut into context and continuation, against lm-evaluation-harness's own encoding."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ingot.errors import DataError, ModelError
from ingot.model.continuations import encode_groups, encode_texts, prefix_id

ASKED = [
    ("What is the capital of France? ", ["Paris", " Paris", "the capital of France", " 12"]),
    ("What is the capital of France?", [" Paris", "\n\nParis", "?!"]),
    ("Hello!\n", ["book", " book a table"]),
    ("Grüße, 世界 \n ", ["你好 – ça va?", " 😀"]),
    ("", ["Hello", " you", "世界"]),
    ("What is the capital of France? ", ["Lyon"]),
]


@pytest.fixture(params=["plain", "begins with BOS", "BOS is written"])
def case(request: pytest.FixtureRequest, shared_dir: Path, tiny_tokenizer: Any) -> tuple[Any, list[Any]]:
    """A tokenizer and what is asked: one without special tokens, a Llama's that puts BOS in front, BOS in the text."""
    from transformers import AutoTokenizer

    if request.param == "plain":
        return tiny_tokenizer, ASKED
    llama = AutoTokenizer.from_pretrained(shared_dir / "models/stories260k")
    assert llama("a")["input_ids"][0] == llama.bos_token_id
    if request.param == "begins with BOS":
        return llama, ASKED
    return llama, [(llama.bos_token + context, ones) for context, ones in ASKED if context]


def test_pairs_are_those_of_the_harness(case: tuple[Any, list[Any]]) -> None:
    harness: Any = pytest.importorskip("lm_eval.models.huggingface").HFLM
    from lm_eval.api.model import TemplateLM

    tokenizer, asked = case
    backend = SimpleNamespace(tokenizer=tokenizer, add_bos_token=None, backend="causal")
    backend.prefix_token_id = prefix_id(tokenizer)
    backend.tok_encode = lambda text, **how: harness.tok_encode(backend, text, how.get("add_special_tokens"))
    backend._encode_pair = lambda context, one: harness._encode_pair(backend, context, one)
    seen: list[Any] = []
    backend._loglikelihood_tokens = lambda requests, **_how: seen.extend(requests)
    requests = [SimpleNamespace(args=(context, one)) for context, ones in asked for one in ones]
    TemplateLM.loglikelihood(backend, requests, disable_tqdm=True)
    groups = encode_groups(tokenizer, asked)
    ours = [(list(group.context), list(one)) for group in groups for one in group.continuations]
    assert ours == [(context, one) for _, context, one in seen]
    texts = [context + ones[0] for context, ones in asked]
    assert [encode_texts(tokenizer, texts)[text] for text in texts] == [backend.tok_encode(text) for text in texts]


def test_the_tokenizer_sees_each_text_once(tiny_tokenizer: Any) -> None:
    texts: list[str] = []

    def watched(part: list[str], **how: Any) -> Any:
        texts.extend(part)
        return tiny_tokenizer(part, **how)

    spy: Any = type(
        "Spy", (), {"__call__": staticmethod(watched), "__getattr__": lambda _s, n: getattr(tiny_tokenizer, n)}
    )()
    encode_groups(spy, ASKED)
    assert len(texts) == len(set(texts)) == 4 + 13  # contexts without the empty one and the repeated one; continuations


def test_a_blank_context_stands_for_none(tiny_tokenizer: Any) -> None:
    [blank] = encode_groups(tiny_tokenizer, [("  ", ["Hello"])])
    assert blank.context == [prefix_id(tiny_tokenizer)] and tiny_tokenizer.decode(blank.continuations[0]) == "  Hello"


def test_what_cannot_be_asked_is_named(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="adds no token"):
        encode_groups(tiny_tokenizer, [("Hello", [""])])
    bare: Any = SimpleNamespace(bos_token_id=None, eos_token_id=None, name_or_path="bare")
    with pytest.raises(ModelError, match="neither a BOS nor an EOS"):
        prefix_id(bare)
