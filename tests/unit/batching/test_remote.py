"""A model behind an endpoint answers batches: rows become requests, refusals errors without the server's words."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fake_endpoint import FakeServer, Reply, error, text

from ingot.address import read_address
from ingot.batching.remote import Remote
from ingot.batching.rows import Entry, Failure
from ingot.errors import EndpointError, FieldError
from ingot.evaluation.api import Api, Limits

CHAT = {"messages": '[{"role": "user", "content": "c"}]'}


@pytest.fixture
def opened() -> Iterator[Callable[..., Remote]]:
    with ExitStack() as stack:

        def make(server: FakeServer, requests: bool = False, at_once: int = 8, **params: Any) -> Remote:
            limits = Limits(tries=3, backoff_s=0.001, at_once=at_once)
            remote = Remote(Api(read_address(server.url, "MODEL"), None, limits), "tiny", params, requests)
            stack.callback(remote.close)
            return remote

        yield make


def entries(*columns: dict[str, Any]) -> list[Entry]:
    return [Entry(place, f"r{place}", f"a:{place}", one) for place, one in enumerate(columns)]


def test_rows_become_chats_and_completions(opened: Any) -> None:
    with FakeServer(lambda path, body: text(f"to {body.get('prompt') or body['messages'][-1]['content']}")) as server:
        remote = opened(server, max_tokens=4)
        rows = entries({"input_string": "a"}, {"prompt": "b"}, {"messages": '[{"role": "user", "content": "c"}]'})
        assert remote.answer(rows) == [{"output_string": f"to {name}"} for name in "abc"]
        assert all(body["max_tokens"] == 4 and body["model"] == "tiny" for _, body in server.asked)
        assert remote.tokens() == {"input": 21, "output": 6}
        assert remote.tokens() == {}


def test_what_fails_for_a_moment_is_asked_again(opened: Any) -> None:
    with FakeServer(first=[error(503), error(429)]) as server:
        assert opened(server).answer(entries({"prompt": "a"})) == [{"output_string": "yes"}]


def test_a_refused_row_is_an_error_without_the_servers_words(opened: Any) -> None:
    def answer(path: str, body: dict[str, Any]) -> Any:
        return error(400, f"cannot read {body['prompt']}") if body["prompt"] == "secret" else text("yes")

    with FakeServer(answer) as server:
        found = opened(server).answer(entries({"prompt": "a"}, {"prompt": "secret"}, {"messages": "[broken"}))
    assert found[0] == {"output_string": "yes"}
    assert isinstance(found[1], Failure)
    assert found[1].message == "the endpoint answered 400"
    assert isinstance(found[2], Failure)
    assert found[2].field == "messages"
    assert "secret" not in str(found)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "overloaded"}},
        {"choices": []},
        {"choices": {}},
        {"choices": [None]},
        {"choices": [{}]},
        {"choices": ["secret"]},
        {"choices": [{"text": 5, "message": "secret"}]},
        {"choices": [{"text": ["secret"], "message": {"content": ["secret"]}}]},
    ],
)
@pytest.mark.parametrize("row", [{"prompt": "b"}, CHAT])
def test_an_answer_without_choices_is_no_empty_answer(opened: Any, body: dict[str, Any], row: dict[str, Any]) -> None:
    with FakeServer(first=[Reply(body=text("yes")), Reply(body=body)]) as server:
        remote = opened(server, at_once=1)
        found = remote.answer(entries(row, row))
    assert found == [
        {"output_string": "yes"},
        Failure("body", "the endpoint answered without choices", unexpected=True),
    ]


def test_an_answer_that_holds_no_word_is_empty(opened: Any) -> None:
    choice = {"text": "", "message": {"content": None}, "finish_reason": "stop"}
    with FakeServer(lambda path, body: {"choices": [choice], "usage": "none"}) as server:
        remote = opened(server)
        assert remote.answer(entries({"prompt": "a"}, CHAT)) == [{"output_string": ""}] * 2
        assert remote.tokens() == {}


def test_threads_that_count_at_once_lose_no_token(opened: Any) -> None:
    class Slow(dict[str, int]):
        def get(self, *wanted: Any) -> Any:
            found = super().get(*wanted)
            time.sleep(0.002)
            return found

    with FakeServer() as server:
        remote = opened(server)
        remote._counts = Slow()
        remote.answer(entries(*[{"prompt": "a"}] * 16))
        assert remote.tokens() == {"input": 7 * 16, "output": 16}


def test_a_line_for_another_model_costs_itself_only(opened: Any) -> None:
    def answer(path: str, body: dict[str, Any]) -> Any:
        return text("yes") if body["model"] == "tiny" else error(404, "no such model")

    lines = [{"url": "/v1/completions", "body": {"model": name, "prompt": "a"}} for name in ("tiny", "huge", "tiny")]
    with FakeServer(answer) as server:
        found = opened(server, requests=True).answer(entries(*lines))
    assert [isinstance(one, Failure) for one in found] == [False, True, False]
    assert found[1].response["status_code"] == 404


@pytest.mark.parametrize("reply", [error(401, "no key"), error(404, "no such model"), error(500)])
def test_an_endpoint_that_answers_nobody_ends_it(opened: Any, reply: Any) -> None:
    with FakeServer(lambda path, body: reply) as server, pytest.raises(EndpointError):
        opened(server).answer(entries({"prompt": "a"}, {"prompt": "b"}))


def test_lines_of_a_batch_file_go_to_their_routes(opened: Any) -> None:
    def answer(path: str, body: dict[str, Any]) -> Any:
        return {"data": [], "usage": {"prompt_tokens": 3}} if path == "/embeddings" else error(422)

    lines = entries({"url": "/v1/embeddings", "body": {"input": "a"}}, {"url": "/v1/rerank", "body": {}})
    with FakeServer(answer) as server:
        remote = opened(server, requests=True)
        found = remote.answer(lines)
        assert server.said("/embeddings") == [{"input": "a"}]
    assert found[0]["custom_id"] == "r0"
    assert found[0]["response"]["body"]["data"] == []
    assert found[1].response["status_code"] == 422
    assert remote.tokens() == {"input": 3}


def test_parameters_that_the_batch_decides_are_refused(opened: Any) -> None:
    with FakeServer() as server:
        opened(server, temperature=1).check()
        with pytest.raises(FieldError, match="--param = 'stream=True'"):
            opened(server, stream=True).check()
