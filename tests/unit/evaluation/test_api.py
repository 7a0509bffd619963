"""What is asked again and how long after, what ends at once, and that no key goes where others could read it."""

import email.utils
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import FakeServer, Reply, error, text

from ingot.address import Address, key_for, read_address
from ingot.errors import EndpointError, RecipeError
from ingot.evaluation.api import Api, Limits, Refused
from ingot.evaluation.kept import Kept

BODY = {"prompt": "a secret question"}


class Watch:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def clock(self) -> float:
        return sum(self.slept)


def api(server: FakeServer, watch: Watch, key: str | None = None, **limits: Any) -> Api:
    return Api(
        read_address(server.url, "target"),
        key,
        Limits(**limits),
        sleep=watch.sleep,
        clock=watch.clock,
        now=lambda: 1_000_000.0,
        draw=lambda: 0.5,
    )


def refusal(asked: Api, match: str, kind: type[EndpointError] = EndpointError) -> str:
    with pytest.raises(kind, match=match) as refused:
        asked.post("/completions", BODY)
    return str(refused.value)


@pytest.mark.parametrize(
    "failure",
    [
        *(error(status) for status in (408, 409, 429, 500, 502, 503, 529)),
        Reply(raw=b"<html>busy</html>"),
        Reply(body=text("yes"), cut=True),
    ],
    ids=["408", "409", "429", "500", "502", "503", "529", "no json", "drop"],
)
def test_what_may_go_well_later_is_tried_again(failure: Reply) -> None:
    with FakeServer(first=[failure, failure]) as server, api(server, watch := Watch()) as asked:
        assert asked.post("/completions", BODY)["choices"][0]["text"] == "yes"
    assert watch.slept == [0.25, 0.5]  # half of 0.5 s, of 1 s
    assert len(server.asked) == 3


def test_waits_grow_to_a_limit_and_tries_end() -> None:
    with (
        FakeServer(lambda path, body: error(500, "on fire")) as server,
        api(server, watch := Watch(), tries=9) as asked,
    ):
        refusal(asked, r"POST http://127.*/v1/completions answered 500: on fire, 9 times")
    assert watch.slept == [0.25, 0.5, 1, 2, 4, 8, 15, 15]
    assert len(server.asked) == 9


@pytest.mark.parametrize(
    ("header", "wanted"),
    [("7", 7.0), ("0.5", 0.5), (email.utils.formatdate(1_000_012.0, usegmt=True), 12.0), ("soon", 0.25), ("-3", 0.0)],
)
def test_retry_after_is_honoured(header: str, wanted: float) -> None:
    with FakeServer(first=[error(429, Retry_After=header)]) as server, api(server, watch := Watch()) as asked:
        asked.post("/completions", BODY)
    assert watch.slept == [wanted]


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    slow = error(429, "slow down", Retry_After="3600")
    with FakeServer(first=[slow]) as server, api(server, watch := Watch()) as asked:
        refusal(asked, "slow down within 600 s; it asks to wait 3600 s")
    assert watch.slept == []


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (error(400, "bad\nrequest"), "answered 400: bad request"),
        (error(401, "wrong key sk-secret"), r"answered 401: wrong key \*\*\*; put a valid key"),
        (error(403), "answered 403"),
        (error(404, "no such model"), "answered 404: no such model"),
        (error(429, "pay first", "insufficient_quota"), "answered 429: pay first"),
        (Reply(302, {}, {"Location": "http://127.0.0.1:9/v1"}), "points to another address"),
        (error(501), "answered 501"),
    ],
    ids=["400", "401", "403", "404", "quota", "redirect", "501"],
)
def test_what_waiting_does_not_mend_ends_at_once(reply: Reply, words: str) -> None:
    with FakeServer(first=[reply]) as server, api(server, watch := Watch(), "sk-secret") as asked:
        message = refusal(asked, words, Refused)
    assert len(server.asked) == 1
    assert watch.slept == []
    assert "sk-secret" not in message
    assert "\n" not in message
    assert "secret question" not in message


def test_nobody_there() -> None:
    with FakeServer() as server:
        pass
    with api(server, Watch(), tries=2) as asked, pytest.raises(EndpointError, match=r"failed \(ConnectError.*2 times"):
        asked.get("/models")


def test_slow_answers_are_given_up() -> None:
    held = threading.Event()

    def slow(path: str, body: dict[str, Any]) -> Any:
        held.wait(5)
        return text("late")

    with FakeServer(slow) as server:
        with api(server, Watch(), tries=1, read_s=0.05) as asked, pytest.raises(EndpointError, match="in time"):
            asked.post("/completions", BODY)
        held.set()
        server.answer = lambda path, body: Reply(body=text("drop by drop"), trickle_s=0.02)
        # Every byte is in time, the whole is not.
        address = read_address(server.url, "target")
        with Api(address, None, Limits(tries=1, read_s=5, deadline_s=0.1)) as asked:
            refusal(asked, "did not finish")


def test_many_are_asked_at_once_and_answers_keep_their_order() -> None:
    barrier = threading.Barrier(4)

    def together(path: str, body: dict[str, Any]) -> Any:
        barrier.wait(5)
        return text(body["prompt"])

    with FakeServer(together) as server, api(server, Watch(), at_once=4) as asked:
        found = asked.each(lambda it: asked.post("/completions", {"prompt": it}), [str(n) for n in range(12)])
    assert [it["choices"][0]["text"] for it in found] == [str(n) for n in range(12)]
    assert server.most_at_once == 4


def test_after_an_error_nothing_is_begun() -> None:
    with FakeServer(lambda path, body: error(400)) as server, api(server, Watch(), at_once=2) as asked:
        message = ""
        try:
            asked.each(lambda it: asked.post("/completions", {}), range(50))
        except Refused as refused:
            message = str(refused)
    assert "answered 400" in message
    assert len(server.asked) <= 2


def test_keys_go_in_the_header_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-usual")
    monkeypatch.setenv("MINE", "sk-mine")
    safe, near, far = (
        read_address(it, "target") for it in ("https://a.test/v1", "http://[::1]:8/v1", "http://a.test/v1")
    )
    assert key_for(safe, None, False, "target") == "sk-usual"
    assert key_for(near, "MINE", False, "target") == "sk-mine"
    with pytest.raises(RecipeError, match=r"target = 'http://a\.test/v1': plain http to another machine"):
        key_for(far, None, False, "target")
    assert key_for(far, None, True, "target") is None
    with pytest.raises(RecipeError, match="never sent over plain http"):
        key_for(far, "MINE", True, "target")
    with pytest.raises(RecipeError, match="key_env = 'NONE': this environment variable is not set"):
        key_for(safe, "NONE", False, "target")
    with FakeServer() as server, api(server, Watch(), "sk-mine") as asked:
        asked.post("/completions", BODY)
    assert server.headers[0]["Authorization"] == "Bearer sk-mine"


def test_addresses() -> None:
    read = read_address("HTTPS://Host.test:8443/openai/v1/?api-version=1&secret=s#org/model-7b", "target")
    assert read == Address("https://Host.test:8443/openai/v1", "org/model-7b", "api-version=1&secret=s")
    assert str(read) == "https://Host.test:8443/openai/v1#org/model-7b"
    assert read_address("http://127.0.0.1:1/v1/chat/completions", "target").url == "http://127.0.0.1:1/v1"
    for wrong in ("openai://gpt", "http://", "http://a:b/v1", "http://[::1/v1", "folder"):
        with pytest.raises(RecipeError, match=r"target = .*no address"):
            read_address(wrong, "target")
    with pytest.raises(RecipeError, match="stored with the results") as refused:
        read_address("https://me:sesame@host.test/v1", "target")
    assert "sesame" not in str(refused.value)


def test_a_query_is_sent_and_not_shown() -> None:
    with FakeServer(lambda path, body: error(400, f"bad {path}")) as server:
        address = read_address(f"{server.url}?key=sesame", "target")
        with Api(address) as asked, pytest.raises(Refused) as refused:
            asked.post("/completions", BODY)
    assert server.asked[0][0] == "/completions?key=sesame"
    assert "sesame" not in str(refused.value)


def test_kept_answers_survive_a_torn_line(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "a" / "kept.jsonl", {"of": 1})
    kept.put("x", [1])
    kept.put("y", {"it": "ü\ud83d"})
    with kept.path.open("a") as file:
        file.write('["z", [3')
    again = Kept(kept.path, {"of": 1})
    assert (again.get("x"), again.get("y"), again.get("z"), again.stale) == ([1], {"it": "ü\ud83d"}, None, None)
    again.put("w", 4)
    assert [Kept(kept.path, {"of": 1}).get(name) for name in "xw"] == [[1], 4]
    other = Kept(tmp_path / "other.jsonl", {"of": 1}, [kept.path])
    assert other.get("x") == [1]
    changed = Kept(kept.path, {"of": 2})
    assert (changed.get("x"), changed.stale) == (None, {"of": 1})
    changed.put("x", 5)
    assert len(Kept(kept.path, {"of": 2})) == 1
