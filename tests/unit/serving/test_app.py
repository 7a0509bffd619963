"""The routes: OpenAI's and MLflow's forms, every field honoured or refused by name, nothing of the input in errors."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from ingot.model.runtime import Runtime
from ingot.serving.app import create_app
from ingot.serving.deployments import Deployed, Deployments
from ingot.serving.engine import Limits
from ingot.serving.engines import start_engine
from ingot.serving.gate import Rules
from ingot.serving.keys import Keyring

CHAT, TEXT, MLFLOW = "/v1/chat/completions", "/v1/completions", "/invocations"
ASKED = [{"role": "user", "content": "Hello!"}]
SECRET = "the-secret-of-the-prompt"


def _served(runtime: Runtime, **limits: int) -> Deployments:
    return Deployments(Deployed("tiny", start_engine(runtime, Limits(**limits))))


def _client(folder: Path, **rules: Any) -> TestClient:
    app = create_app(_served(Runtime.load(folder)), rules=Rules(**rules))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def chat(chat_folder: Path) -> Iterator[TestClient]:
    with _client(chat_folder) as client:
        yield client


@pytest.fixture
def text(text_folder: Path) -> Iterator[TestClient]:
    with _client(text_folder) as client:
        yield client


def _runtime(client: TestClient) -> Runtime:
    return client.app.state.deployments.choose().engine.runtime  # type: ignore[attr-defined, no-any-return]


def _refused(response: httpx.Response, status: int, param: str | None, *words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param"}
    assert error["param"] == param
    for word in words:
        assert word in error["message"]
    assert SECRET not in response.text
    assert "Traceback" not in response.text


# --- answers ---------------------------------------------------------------------------------------------------------


def test_chat_answers_as_the_runtime(chat: TestClient) -> None:
    wanted = _runtime(chat).chat(ASKED)
    body = chat.post(CHAT, json={"model": "tiny", "messages": ASKED}).json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": wanted.text}
    assert choice["finish_reason"] == wanted.finish_reason
    used = {"prompt_tokens": wanted.n_prompt, "completion_tokens": len(wanted.ids)}
    assert body["usage"] == used | {"total_tokens": wanted.n_prompt + len(wanted.ids)}


def test_tools_reach_the_model(chat: TestClient) -> None:
    tools = [{"type": "function", "function": {"name": "book", "parameters": {}}}]
    with_tools = chat.post(CHAT, json={"messages": ASKED, "tools": tools}).json()["usage"]["prompt_tokens"]
    assert with_tools == len(_runtime(chat).chat_ids(ASKED, tools))


def test_sampling_fields_are_honoured(text: TestClient) -> None:
    sent = {"max_tokens": 9, "temperature": 1.0, "top_p": 0.8, "seed": 4}
    wanted = _runtime(text).complete("Hello!", max_new_tokens=9, temperature=1.0, top_p=0.8, seed=4)
    assert wanted.text != _runtime(text).complete("Hello!", max_new_tokens=9).text
    assert text.post(TEXT, json={"prompt": "Hello!", **sent}).json()["choices"][0]["text"] == wanted.text


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_is_honoured(text: TestClient, as_list: bool) -> None:
    free = _runtime(text).complete("Hello!").text
    stop = free[4:6]
    body = {"prompt": "Hello!", "stop": [stop] if as_list else stop}
    [choice] = text.post(TEXT, json=body).json()["choices"]
    assert choice["text"] == free[: free.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_max_completion_tokens_is_max_tokens(chat: TestClient) -> None:
    sent = {"messages": ASKED, "max_completion_tokens": 3}
    assert chat.post(CHAT, json=sent).json()["usage"]["completion_tokens"] <= 3


def test_several_prompts_are_several_choices(text: TestClient) -> None:
    prompts = ["Hello!", "What is the capital of France?"]
    body = text.post(TEXT, json={"prompt": prompts}).json()
    wanted = [_runtime(text).complete(prompt) for prompt in prompts]
    assert [(c["index"], c["text"]) for c in body["choices"]] == list(enumerate(answer.text for answer in wanted))
    assert body["usage"]["prompt_tokens"] == sum(answer.n_prompt for answer in wanted)


def test_a_prompts_own_likelihoods(text: TestClient) -> None:
    import torch

    prompts = ["Hello there, né 猫!", "a"]
    body = text.post(TEXT, json={"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 1}).json()
    assert [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]] == [
        (0, prompts[0], "length"),
        (1, prompts[1], "length"),
    ]
    runtime = _runtime(text)
    for choice, prompt in zip(body["choices"], prompts, strict=True):
        told, ids = choice["logprobs"], runtime.tokenizer(prompt)["input_ids"]
        with torch.inference_mode():
            right = runtime.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(ids)
        assert told["token_logprobs"][0] is None
        for place, token in enumerate(ids[1:]):
            assert told["token_logprobs"][place + 1] == pytest.approx(float(right[place, token]), abs=1e-5)
            assert max(told["top_logprobs"][place + 1].values()) == pytest.approx(float(right[place].max()), abs=1e-5)
        assert prompt.startswith(told["tokens"][0])
    assert body["usage"] == {
        "prompt_tokens": sum(len(runtime.tokenizer(prompt)["input_ids"]) for prompt in prompts),
        "completion_tokens": 0,
        "total_tokens": body["usage"]["prompt_tokens"],
    }


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"echo": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
        ({"echo": True, "logprobs": 1, "max_tokens": 4}, "echo"),
        ({"echo": True, "logprobs": 2, "max_tokens": 0}, "echo"),
        ({"echo": True, "logprobs": 1, "max_tokens": 0, "stream": True}, "echo"),
        ({"echo": True, "logprobs": 1, "max_tokens": 0, "n": 2}, "echo"),
    ],
)
def test_likelihoods_are_of_prompts_alone(text: TestClient, sent: dict[str, Any], param: str) -> None:
    _refused(text.post(TEXT, json={"prompt": SECRET, **sent}), 400, param, "go together")


def test_likelihoods_of_what_has_none(text: TestClient, head_folder: Path) -> None:
    sent = {"max_tokens": 0, "echo": True, "logprobs": 1}
    _refused(text.post(TEXT, json={"prompt": "", **sent}), 400, "prompt", "no token")
    _refused(text.post(TEXT, json={"prompt": SECRET * 99, **sent}), 400, "prompt", "the model reaches 128")
    with _client(head_folder) as head:
        _refused(head.post(TEXT, json={"prompt": SECRET, **sent}), 400, "model", "does not write text")


def test_models_health_and_ready(chat: TestClient) -> None:
    assert [(m["id"], m["task"]) for m in chat.get("/v1/models").json()["data"]] == [("tiny", "chat-completion")]
    assert chat.get("/health").json() == {"status": "alive"}
    assert chat.get("/ready").json() == {"status": "ready"}


def test_not_ready_while_stopping(chat: TestClient) -> None:
    chat.app.state.deployments.close()  # type: ignore[attr-defined]
    assert chat.get("/health").status_code == 200
    response = chat.get("/ready")
    _refused(response, 503, None, "stopping")
    assert response.headers["retry-after"]
    _refused(chat.post(CHAT, json={"messages": ASKED}), 503, None, "stopping")


# --- streams ---------------------------------------------------------------------------------------------------------


def _events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_chat_stream_is_the_answer_in_pieces(chat: TestClient) -> None:
    wanted = _runtime(chat).chat(ASKED)
    events = _events(chat.post(CHAT, json={"messages": ASKED, "stream": True}))
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    deltas = [event["choices"][0] for event in events]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in deltas) == wanted.text
    assert len(deltas) > 3
    assert [choice["finish_reason"] for choice in deltas] == [None] * (len(deltas) - 1) + [wanted.finish_reason]


def test_a_text_stream_can_end_with_its_usage(text: TestClient) -> None:
    wanted = _runtime(text).complete("Hello!")
    body = {"prompt": "Hello!", "stream": True, "stream_options": {"include_usage": True}}
    *events, last = _events(text.post(TEXT, json=body))
    assert "".join(event["choices"][0]["text"] for event in events) == wanted.text
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(wanted.ids)


def test_an_impossible_stream_is_an_ordinary_error(text: TestClient) -> None:
    _refused(text.post(TEXT, json={"prompt": SECRET, "stream": True, "max_tokens": 500}), 400, "max_tokens", "128")


# --- /invocations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": {"columns": ["input_string"], "data": [["Hello!"]]}},
        {"dataframe_split": {"index": [0], "columns": ["input_string"], "data": [["Hello!"]]}},
        {"dataframe_records": [{"input_string": "Hello!"}]},
        {"inputs": ["Hello!"]},
        {"inputs": "Hello!"},
        {"inputs": {"input_string": ["Hello!"]}},
        {"inputs": {"input_string": "Hello!"}},
        {"instances": [{"input_string": "Hello!"}]},
        {"input_string": "Hello!"},
    ],
)
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_every_form_of_a_row(kind: str, body: dict[str, Any], request: pytest.FixtureRequest) -> None:
    client = request.getfixturevalue(kind)
    runtime = _runtime(client)
    wanted = runtime.chat(ASKED) if kind == "chat" else runtime.complete("Hello!")
    assert client.post(MLFLOW, json=body).json() == {"predictions": [{"output_string": wanted.text}]}


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": {"messages": ASKED}},
        {"dataframe_records": [{"messages": ASKED}]},
        {"dataframe_records": [{"messages": json.dumps(ASKED)}]},
    ],
)
def test_every_form_of_a_conversation(chat: TestClient, body: dict[str, Any]) -> None:
    wanted = _runtime(chat).chat(ASKED)
    assert chat.post(MLFLOW, json=body).json() == {"predictions": [{"output_string": wanted.text}]}


@pytest.mark.parametrize("body", [{"messages": ASKED}, {"prompt": "Hello!"}])
def test_an_unwrapped_body_has_an_unwrapped_answer(chat: TestClient, body: dict[str, Any]) -> None:
    wanted = _runtime(chat).chat(ASKED)
    assert chat.post(MLFLOW, json=body).json() == [{"output_string": wanted.text}]


@pytest.mark.parametrize("bare", [False, True])
def test_params_of_invocations(text: TestClient, bare: bool) -> None:
    params = {"max_tokens": 5, "temperature": 1.0, "top_p": 0.9, "stop": ["zzz"], "seed": 2}
    wanted = _runtime(text).complete("Hello!", max_new_tokens=5, temperature=1.0, top_p=0.9, seed=2)
    body = {"text": "Hello!", **params} if bare else {"inputs": ["Hello!"], "params": params}
    assert text.post(MLFLOW, json=body).json()["predictions"][0]["output_string"] == wanted.text


def test_defaults_of_the_packaged_signature_mean_not_given(text: TestClient) -> None:
    wanted = _runtime(text).complete("Hello!").text
    params = {"max_tokens": 0, "temperature": 0.0, "top_p": 1.0, "stop": [], "seed": -1}
    body = {"inputs": ["Hello!"], "params": params}
    assert text.post(MLFLOW, json=body).json() == {"predictions": [{"output_string": wanted}]}
    unseeded = {"inputs": ["Hello!"], "params": params | {"temperature": 1.0}}
    assert text.post(MLFLOW, json=unseeded).json() != text.post(MLFLOW, json=unseeded).json()


def test_labels(mean_folder: Path) -> None:
    words = ["Hello!", "Thank you very much"]
    with _client(mean_folder) as client:

        def wanted(texts: list[str]) -> list[dict[str, Any]]:
            # The endpoint may run them side by side: another batch may differ in the last bits.
            found = _runtime(client).classify(texts)
            return [{"label": label, "probability": pytest.approx(p[label], abs=1e-6)} for label, p in found]

        assert client.post(MLFLOW, json={"inputs": {"text": words}}).json() == {"predictions": wanted(words)}
        assert client.post(MLFLOW, json={"text": words[0]}).json() == {"predictions": wanted(words[:1])}
        _refused(client.post(MLFLOW, json={"text": "x", "seed": 3}), 400, "seed", "unknown")
        _refused(client.post(TEXT, json={"prompt": "x"}), 400, "model", "classifies")
        _refused(client.post(MLFLOW, json={"text": "word " * 200}), 400, "text", "128")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("user", "x"),
        ("n", 0),
        ("n", 17),
        ("logprobs", "yes"),
        ("frequency_penalty", 2.5),
        ("presence_penalty", "1"),
        ("repetition_penalty", 0),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"99999": 1}),
        ("logit_bias", {SECRET: 1}),
        ("top_k", -1),
        ("min_p", 2),
        ("temperature", "0.5"),
        ("temperature", -1),
        ("temperature", 101),
        ("top_p", 0),
        ("top_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("stop", 3),
        ("stop", [""]),
        ("stop", [SECRET, 4]),
        ("stop", SECRET * 20),
        ("stop", [SECRET * 20]),
        ("seed", "x"),
        ("stream", "yes"),
        ("model", 3),
    ],
)
def test_a_field_is_honoured_or_refused_by_name(chat: TestClient, path: str, field: str, value: Any) -> None:
    body = {"messages": ASKED} if path == CHAT else {"prompt": SECRET}
    response = chat.post(path, json=body | {field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"].split(".")[0] == field
    assert SECRET not in response.text


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hello", "messages"),
        ([{"role": "boss", "content": SECRET}], "messages.0.role"),
        ([{"role": "user"}], "messages.0"),
        ([{"role": "user", "content": [SECRET]}], "messages.0.content"),
        ([{"role": "user", "content": "x", "weight": 1}], "messages.0.weight"),
    ],
)
def test_malformed_messages(chat: TestClient, messages: Any, param: str) -> None:
    _refused(chat.post(CHAT, json={"messages": messages}), 400, param)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {"messages": ASKED, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": ASKED, "tool_choice": "auto"}, "tool_choice"),
        (CHAT, {"messages": ASKED, "parallel_tool_calls": True}, "parallel_tool_calls"),
        (TEXT, {"prompt": "a", "stream_options": {}}, "stream_options"),
        (CHAT, {"messages": ASKED, "max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"),
        (MLFLOW, {}, "exactly one"),
        (MLFLOW, {"instances": ["a"], "inputs": ["b"]}, "inputs and instances"),
        (MLFLOW, {"prompt": "a", "stream": True}, "/v1/chat/completions"),
    ],
)
def test_contradictions(chat: TestClient, path: str, body: dict[str, Any], words: str) -> None:
    _refused(chat.post(path, json=body), 400, None, words)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"bogus": 1, "prompt": SECRET}, "bogus"),
        ({"inputs": [SECRET], "params": {"top_k": 3}}, "top_k"),
        ({"inputs": [SECRET], "seed": 3}, "seed"),
        ({"inputs": [SECRET], "prompt": SECRET}, "prompt"),
        ({"prompt": SECRET, "seed": 3, "params": {}}, "seed"),
        ({"prompt": SECRET, "temperature": -1}, "temperature"),
        ({"dataframe_records": [{"question": SECRET}]}, "question"),
        ({"dataframe_records": [{"input_string": SECRET, "more": SECRET}]}, "more"),
        ({"dataframe_records": [{"messages": SECRET}]}, "messages"),
        ({"dataframe_records": [{"messages": [{"role": SECRET}]}]}, "messages"),
        ({"inputs": [SECRET], "params": {"stop": [SECRET] * 65}}, "stop"),
        ({"dataframe_records": []}, "dataframe_records"),
        ({"inputs": {"input_string": ["a", "b"], "other": ["c"]}}, "inputs"),
        ({"dataframe_split": {"columns": ["input_string"], "data": [[SECRET, "b"]]}}, "dataframe_split"),
        ({"dataframe_split": {"columns": ["input_string"]}}, "dataframe_split.data"),
    ],
)
def test_malformed_invocations(chat: TestClient, body: dict[str, Any], param: str) -> None:
    _refused(chat.post(MLFLOW, json=body), 400, param)


@pytest.mark.parametrize("path", [CHAT, TEXT, MLFLOW])
def test_bodies_that_are_no_json_object(text: TestClient, path: str) -> None:
    headers = {"Content-Type": "application/json"}
    _refused(text.post(path, content=b'{"prompt": "' + SECRET.encode(), headers=headers), 400, None, "not valid JSON")
    _refused(text.post(path, content=b"[1]", headers=headers), 400, None, "JSON object")
    _refused(text.post(path, content=b"", headers=headers), 400, None, "JSON object")
    _refused(text.post(path, content=b"prompt=x"), 400, None, "Content-Type")


def test_an_unknown_model_is_404(chat: TestClient) -> None:
    _refused(chat.post(CHAT, json={"model": "gpt", "messages": ASKED}), 404, "model", "'tiny'")
    _refused(chat.get("/v2/nothing"), 404, None)
    _refused(chat.get(CHAT), 405, None)


def test_an_over_long_prompt_is_refused_with_counts(text: TestClient) -> None:
    n = len(_runtime(text).prompt_ids(SECRET * 30))
    _refused(text.post(TEXT, json={"prompt": SECRET * 30}), 400, "prompt", f"{n} prompt tokens", "128")
    _refused(text.post(TEXT, json={"prompt": "a", "max_tokens": 128}), 400, "max_tokens", "128 new tokens")


def test_a_body_over_the_limit_is_413(text_folder: Path) -> None:
    with _client(text_folder, max_body_bytes=400) as client:
        big = json.dumps({"prompt": "x" * 400}).encode()
        headers = {"Content-Type": "application/json"}
        _refused(client.post(TEXT, content=big, headers=headers), 413, None, "400 bytes")
        # Without a declared length (chunked) the bytes themselves are counted.
        _refused(client.post(TEXT, content=iter([big[:200], big[200:]]), headers=headers), 413, None, "400 bytes")
        assert client.post(TEXT, json={"prompt": "x"}).status_code == 200


def test_the_key_is_needed_on_every_route_but_the_probes(text_folder: Path) -> None:
    with _client(text_folder, keys=Keyring(key="right")) as client:
        for sent in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
            _refused(client.post(TEXT, json={"prompt": "x"}, headers=sent), 401, None, "API key")
            _refused(client.get("/v1/models", headers=sent), 401, None)
        for path in ("/", "/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready"):
            assert client.get(path).status_code == 200
        assert client.get("/v1/models", headers={"Authorization": "Bearer right"}).status_code == 200


def test_a_defect_is_500_without_detail(text: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(_runtime(text).model, "forward", broken)
    _refused(text.post(TEXT, json={"prompt": "x"}), 500, None, "failed")
    monkeypatch.undo()
    assert text.post(TEXT, json={"prompt": "x"}).status_code == 200


def test_a_full_queue_is_503_and_recovers(text_folder: Path) -> None:
    served = _served(Runtime.load(text_folder), waiting_requests=1, rows=1)
    app, engine = create_app(served), served.choose().engine
    running, go = threading.Event(), threading.Event()

    def slow(_: Runtime) -> None:
        running.set()
        assert go.wait(30)

    async def scene() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            first = asyncio.create_task(engine.run(slow))
            await asyncio.to_thread(running.wait, 30)
            second = asyncio.create_task(client.post(TEXT, json={"prompt": "b"}))
            while not engine.load().queue:
                await asyncio.sleep(0.01)
            third = await client.post(TEXT, json={"prompt": "c"})
            _refused(third, 503, None, "waiting")
            assert int(third.headers["retry-after"]) > 0
            assert (await client.get("/health")).status_code == 200  # the event loop is free meanwhile
            go.set()
            await first
            assert (await second).status_code == 200

    asyncio.run(scene())
    engine.close()
