"""What OpenAI's own client sends and understands: answers, streams, numbers, calls, schemas, errors."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from ingot.serving.openai_answers import token_bytes
from ingot.serving.server import Endpoint

TALK: Any = [{"role": "user", "content": "Hello!"}]
BOOK: Any = {
    "type": "function",
    "function": {
        "name": "book",
        "parameters": {
            "type": "object",
            "properties": {"table": {"enum": ["small", "big"]}},
            "required": ["table"],
            "additionalProperties": False,
        },
    },
}


def _client(endpoint: Endpoint, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def served(folder_of: Callable[[str], Path]) -> Iterator[tuple[Endpoint, openai.OpenAI]]:
    with Endpoint(folder_of("chat-completion")) as endpoint, _client(endpoint) as client:
        yield endpoint, client


@pytest.fixture(scope="module")
def client(served: tuple[Endpoint, openai.OpenAI]) -> openai.OpenAI:
    return served[1]


@pytest.fixture(scope="module")
def name(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


@pytest.fixture(scope="module")
def runtime(client_of: Callable[[str], Any]) -> Any:
    """The same model, asked without a server."""
    return client_of("chat-completion").app.state.deployments.choose().engine.runtime


def test_models(client: openai.OpenAI, name: str) -> None:
    assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt")
    assert caught.value.param == "model"


def test_chat(client: openai.OpenAI, name: str, runtime: Any) -> None:
    wanted = runtime.chat(TALK, max_new_tokens=9)
    told = client.chat.completions.create(model=name, messages=TALK, max_completion_tokens=9)
    assert told.choices[0].message.content == wanted.text
    assert told.choices[0].finish_reason == wanted.finish_reason
    assert told.usage is not None and told.usage.completion_tokens == len(wanted.ids)
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]}]
    again = client.chat.completions.create(model=name, messages=parts, max_tokens=9)
    assert again.choices[0].message.content == wanted.text
    # An answer goes back as the client holds it.
    back = [*TALK, told.choices[0].message.model_dump(), TALK[0]]
    assert client.chat.completions.create(model=name, messages=back, max_tokens=3).choices


def test_n_answers(client: openai.OpenAI, name: str, runtime: Any) -> None:
    told = client.chat.completions.create(model=name, messages=TALK, n=3, temperature=1.0, seed=3, max_tokens=8)
    prompts = [runtime.chat_ids(TALK)] * 3
    wanted = [answer.text for answer in runtime.generate(prompts, temperature=1.0, seed=3, max_new_tokens=8)]
    assert [choice.message.content for choice in told.choices] == wanted
    assert len(set(wanted)) == 3
    assert told.usage is not None and told.usage.prompt_tokens == len(prompts[0])
    texts = client.completions.create(model=name, prompt=["a", "b"], n=2, temperature=1.0, seed=3, max_tokens=4)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("field", "value", "own"),
    [
        ("presence_penalty", 2.0, {"presence_penalty": 2.0}),
        ("frequency_penalty", 2.0, {"frequency_penalty": 2.0}),
        ("logit_bias", {"40": 100}, {"logit_bias": ((40, 100.0),)}),
        ("top_k", 1, {"top_k": 1}),
        ("min_p", 1.0, {"min_p": 1.0}),
        ("repetition_penalty", 9.0, {"repetition_penalty": 9.0}),
    ],
)
def test_fields_change_the_answer(
    client: openai.OpenAI, name: str, runtime: Any, field: str, value: Any, own: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"temperature": 2.0, "seed": 2}
    free = runtime.chat(TALK, max_new_tokens=20, **common).text
    wanted = runtime.chat(TALK, max_new_tokens=20, **common, **own).text
    told = client.chat.completions.create(model=name, messages=TALK, max_tokens=20, **common, extra_body={field: value})
    assert told.choices[0].message.content == wanted != free


def test_chat_logprobs(client: openai.OpenAI, name: str, runtime: Any) -> None:
    told = client.chat.completions.create(model=name, messages=TALK, logprobs=True, top_logprobs=2, max_tokens=6)
    wanted = runtime.chat(TALK, max_new_tokens=6, top_logprobs=2)
    assert told.choices[0].logprobs is not None and told.choices[0].logprobs.content is not None
    content = told.choices[0].logprobs.content
    assert [one.logprob for one in content] == pytest.approx([one.logprob for one in wanted.told], abs=1e-4)
    assert b"".join(bytes(one.bytes or []) for one in content).decode("utf-8", "replace") == wanted.text
    for one in content:
        assert [top.logprob for top in one.top_logprobs] == sorted([t.logprob for t in one.top_logprobs], reverse=True)
        assert one.top_logprobs[0].token == one.token  # greedy
    none = client.chat.completions.create(model=name, messages=TALK, logprobs=True, max_tokens=2)
    assert none.choices[0].logprobs and none.choices[0].logprobs.content
    assert none.choices[0].logprobs.content[0].top_logprobs == []


def test_text_logprobs(client: openai.OpenAI, name: str, runtime: Any) -> None:
    told = client.completions.create(model=name, prompt="What is", logprobs=3, max_tokens=6).choices[0]
    ids = runtime.prompt_ids("What is")
    assert client.completions.create(model=name, prompt=ids, max_tokens=6).choices[0].text == told.text
    assert told.logprobs is not None and told.logprobs.tokens and told.logprobs.top_logprobs
    assert told.logprobs.text_offset == [sum(map(len, told.logprobs.tokens[:i])) for i in range(6)]
    for token, value, top in zip(
        told.logprobs.tokens, told.logprobs.token_logprobs or [], told.logprobs.top_logprobs, strict=True
    ):
        assert value == max(top.values()) and top[token] == value and len(top) <= 3


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, name: str, n: int) -> None:
    asked: dict[str, Any] = {"model": name, "messages": TALK, "n": n, "temperature": 1.0, "seed": 4, "max_tokens": 12}
    asked |= {"logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index, choice in enumerate(whole.choices):
        own = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]
        told = [one for c in own if c.logprobs for one in c.logprobs.content or []]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert [one.token for one in told] == [one.token for one in choice.logprobs.content]
    texts: dict[str, Any] = {"model": name, "prompt": ["a", "b"], "n": n, "temperature": 1.0, "seed": 4}
    texts |= {"max_tokens": 8, "logprobs": 1}
    whole_texts = client.completions.create(**texts).choices
    pieces = [choice for chunk in client.completions.create(**texts, stream=True) for choice in chunk.choices]
    for choice_ in whole_texts:
        mine = [piece for piece in pieces if piece.index == choice_.index]
        assert "".join(piece.text for piece in mine) == choice_.text
        offsets = [offset for piece in mine if piece.logprobs for offset in piece.logprobs.text_offset or []]
        assert choice_.logprobs is not None and offsets == choice_.logprobs.text_offset


class Trip(BaseModel):
    """Where to."""

    city: Literal["Paris", "Rome"]
    by_train: bool


def test_schemas(client: openai.OpenAI, name: str) -> None:
    parsed = client.chat.completions.parse(model=name, messages=TALK, response_format=Trip, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, Trip)
    assert parsed.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model=name, messages=TALK, response_format=Trip, max_tokens=60) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=name, messages=TALK, response_format=bad)
    assert caught.value.param == "response_format"
    text: Any = {"type": "text"}
    assert client.chat.completions.create(model=name, messages=TALK, response_format=text, max_tokens=2).choices


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}])
def test_forced_calls(client: openai.OpenAI, name: str, choice: Any) -> None:
    asked: dict[str, Any] = {"model": name, "messages": TALK, "tools": [BOOK], "tool_choice": choice, "max_tokens": 60}
    told = client.chat.completions.create(**asked).choices[0]
    assert told.finish_reason == "tool_calls" and told.message.content is None
    [call] = told.message.tool_calls or []
    assert call.type == "function" and call.function.name == "book"
    assert json.loads(call.function.arguments)["table"] in ("small", "big")
    choices = [one for chunk in client.chat.completions.create(**asked, stream=True) for one in chunk.choices]
    [first, *pieces] = [one for choice in choices for one in choice.delta.tool_calls or []]
    assert first.function is not None and (first.function.name, first.function.arguments) == ("book", "")
    assert len(pieces) > 1 and not any(one.id or one.index for one in pieces)  # as they were written
    assert "".join(it.function.arguments or "" for it in pieces if it.function) == call.function.arguments
    assert not any(choice.delta.content for choice in choices) and choices[-1].finish_reason == "tool_calls"
    with client.chat.completions.stream(**asked) as stream:  # the client puts them together itself
        [put] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert put.function.arguments == call.function.arguments
    # The call and what came of it go back to the model.
    turns = [
        *TALK,
        told.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    assert client.chat.completions.create(model=name, messages=turns, tools=[BOOK], max_tokens=3).choices


def test_tools_are_the_models_to_choose(client: openai.OpenAI, name: str) -> None:
    for more in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": False}, {"tool_choice": "none"}):
        asked: dict[str, Any] = {"model": name, "messages": TALK, "tools": [BOOK], "max_tokens": 4} | more
        told = client.chat.completions.create(**asked)
        assert told.choices[0].message.tool_calls is None
    plain = client.chat.completions.create(model=name, messages=TALK, max_tokens=4)
    assert told.usage == plain.usage  # with "none" the model does not see them


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"user": "x"}, "user"),
        ({"tools": [BOOK], "tool_choice": {"type": "function", "function": {"name": "rob"}}}, "tool_choice"),
        ({"tools": [BOOK], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": BOOK["function"] | {"strict": True}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"max_tokens": 10_000}, "max_tokens"),
    ],
)
def test_errors_are_the_clients_own(client: openai.OpenAI, name: str, more: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": name, "messages": TALK, "stream": stream} | more)
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"


def test_embeddings(folder_of: Callable[[str], Path], client_of: Callable[[str], Any]) -> None:
    own = client_of("embeddings").app.state.deployments.choose().engine.runtime
    wanted = [row["embedding"] for row in own.answer([{"text": "one"}, {"text": "another one"}], {})]
    with Endpoint(folder_of("embeddings")) as endpoint, _client(endpoint) as client:
        name = client.models.list().data[0].id
        # Without a form the client asks for base64 and decodes it.
        for more in ({}, {"encoding_format": "float"}):
            told = client.embeddings.create(model=name, input=["one", "another one"], **more)  # type: ignore[arg-type]
            for found, vector in zip(told.data, wanted, strict=True):
                assert found.embedding == pytest.approx(vector, abs=1e-5)
            assert told.usage.prompt_tokens > 2
        assert len(client.embeddings.create(model=name, input="one").data) == 1
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model=name, input="one", dimensions=3)
        assert caught.value.param == "dimensions"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=name, messages=TALK)
        assert caught.value.param == "model"


def test_a_key_that_is_wrong(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_API_KEY", "right")
    with Endpoint(folder_of("chat-completion")) as endpoint:
        for key, wrong in (("right", False), ("wrong", True)):
            with _client(endpoint, key) as client:
                if wrong:
                    with pytest.raises(openai.AuthenticationError):
                        client.models.list()
                else:
                    assert client.models.list().data


def test_mlflows_client(served: tuple[Endpoint, openai.OpenAI], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.deployments import get_deploy_client

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_API_BASE", f"{served[0].url}/v1")
    client = get_deploy_client("openai")
    assert client is not None
    told = client.predict(endpoint=name, inputs={"messages": TALK})
    wanted = served[1].chat.completions.create(model=name, messages=TALK)
    assert told["choices"][0]["message"]["content"] == wanted.choices[0].message.content


def test_bytes_of_tokens(runtime: Any) -> None:
    text = "né 猫😀 <|im_end|>x"
    ids = runtime.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(runtime.tokenizer, i) for i in ids).decode() == text


def test_bytes_of_tokens_of_sentencepiece(shared_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260k", local_files_only=True)
    text = "Once upon 猫"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tokenizer, i) for i in ids).decode() == f" {text}"
