"""What every request passes: ids and log lines, keys and limits, deadlines, an end when its client leaves, metrics."""

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from ingot.model.runtime import Runtime
from ingot.serving import gate, keys, quota
from ingot.serving.app import create_app
from ingot.serving.deployments import Deployed, Deployments
from ingot.serving.engine import Limits
from ingot.serving.engines import start_engine
from ingot.serving.gate import Rules
from ingot.serving.keys import Keyring, add_key
from ingot.serving.logs import _Lines
from ingot.serving.metrics import Metrics

TEXT = "/v1/completions"
SECRET = "the-secret-of-the-prompt"


class Served:
    """An application over the little text model, and how often the model was run."""

    def __init__(self, folder: Path, rules: Rules | None = None, **limits: int) -> None:
        metrics = Metrics()
        self.runtime = Runtime.load(folder)
        self.engine = start_engine(self.runtime, Limits(**limits), metrics.of("tiny"))
        assert self.engine.wait_ready(60)
        self.app = create_app(Deployments(Deployed("tiny", self.engine)), rules=rules, metrics=metrics)
        self.passes, self.pause_s = 0, 0.0
        model: Any = self.runtime.model
        forward = model.forward

        def counted(*args: Any, **inputs: Any) -> Any:
            self.passes += 1
            time.sleep(self.pause_s)
            return forward(*args, **inputs)

        model.forward = counted

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url="http://test")

    async def leave(self, body: dict[str, Any], after: int) -> None:
        """Send a request, and disconnect once the model was run so often."""
        sent = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": TEXT, "headers": headers, "query_string": b""}

        async def receive() -> dict[str, Any]:
            if sent:
                return sent.pop()
            while self.passes < after:
                await asyncio.sleep(0.002)
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            return

        await self.app(scope | {"asgi": {"spec_version": "2.3"}, "http_version": "1.1"}, receive, send)


@pytest.fixture
def served(text_folder: Path) -> Iterator[Served]:
    served = Served(text_folder)
    yield served
    served.engine.close()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """Fields of the log lines, as they come."""
    found: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(_Lines("json").format(record)))

    logger, handler = logging.getLogger("ingot.serve"), Keep()
    caplog.set_level(logging.INFO, "ingot.serve")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def _samples(text: str, name: str) -> dict[str, float]:
    """Label text -> value of the samples of a metric."""
    rows = [line.rpartition(" ") for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return {labels.removeprefix(name): float(value) for labels, _, value in rows}


def test_a_line_for_each_request_and_nothing_of_it(served: Served, lines: list[dict[str, Any]]) -> None:
    with TestClient(served.app) as client:
        answer = client.post(TEXT, json={"prompt": SECRET, "max_tokens": 5})
        refused = client.post(TEXT, json={"prompt": SECRET, SECRET: 5})
        client.get("/ready")
        client.get(f"/{SECRET}")
        client.post(TEXT, json={"prompt": SECRET * 400_000})
    used = answer.json()["usage"]
    first, second, third, long = lines
    assert {name: first[name] for name in ("route", "model", "status", "prompt_tokens", "new_tokens", "cause")} == {
        "route": TEXT,
        "model": "tiny",
        "status": 200,
        "prompt_tokens": used["prompt_tokens"],
        "new_tokens": used["completion_tokens"],
        "cause": "",
    }
    assert first["seconds"] > 0
    assert first["id"] == answer.headers["x-request-id"] != refused.headers["x-request-id"]
    assert second["status"] == 400
    assert (third["route"], third["status"]) == ("none", 404)
    assert (long["route"], long["cause"], long["status"]) == (TEXT, "body", 413)
    assert SECRET not in json.dumps(lines)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("header", "value", "kept"),
    [
        ("x-request-id", "a" * 100, True),
        ("x-ms-client-request-id", "6f1d-77", True),
        ("x-request-id", "a" * 101, False),
        ("x-request-id", 'a"b c', False),
    ],
)
def test_an_id_is_taken_where_it_is_one(served: Served, header: str, value: str, kept: bool) -> None:
    with TestClient(served.app) as client:
        given = client.get("/v1/models", headers={header: value}).headers["x-request-id"]
    assert (given == value) is kept
    assert len(given) <= 100


def test_a_defect_tells_where_and_not_what(
    served: Served, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(served.runtime.model, "forward", broken)
    with TestClient(served.app) as client:
        answer = client.post(TEXT, json={"prompt": SECRET})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"]
    assert "RuntimeError" in lines[0]["message"]
    assert "in broken" in lines[0]["message"]
    assert lines[1]["cause"] == "defect"
    assert SECRET not in json.dumps(lines).replace("raise RuntimeError(SECRET)", "")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(served: Served, stream: bool, lines: list[dict[str, Any]]) -> None:
    served.pause_s = 0.005

    async def scene() -> None:
        await served.leave({"prompt": "Hello!", "max_tokens": 110, "stream": stream}, 5)
        while served.engine.load().running:
            await asyncio.sleep(0.002)

    asyncio.run(asyncio.wait_for(scene(), 30))
    assert 5 <= served.passes < 60
    stopped = served.passes
    time.sleep(0.05)
    assert served.passes == stopped
    assert lines[-1]["cause"] == "left"


def test_who_leaves_pays_for_what_was_written(text_folder: Path, lines: list[dict[str, Any]]) -> None:
    served = Served(text_folder, Rules(tokens_per_minute=5))

    async def scene() -> int:
        await served.leave({"prompt": "Hello!", "max_tokens": 110, "stream": True}, 8)
        async with served.client() as client:
            return (await client.post(TEXT, json={"prompt": "a", "max_tokens": 1})).status_code

    assert asyncio.run(asyncio.wait_for(scene(), 30)) == 429
    assert lines[0]["cause"] == "left"
    assert lines[0]["prompt_tokens"] > 0 and lines[0]["new_tokens"] >= 7
    served.engine.close()


def test_likelihoods_are_paid_for_and_asked_one_by_one(served: Served, lines: list[dict[str, Any]]) -> None:
    served.pause_s = 0.1
    body = {"prompt": ["a b"] * 50, "max_tokens": 0, "echo": True, "logprobs": 1}

    async def scene() -> None:
        async with served.client() as client:
            few = await client.post(TEXT, json=body | {"prompt": ["a b"] * 2})
            late = await client.post(TEXT, json=body, headers={"x-request-timeout": "0.25"})
        assert late.status_code == 504
        assert lines[0]["prompt_tokens"] == few.json()["usage"]["prompt_tokens"]

    asyncio.run(asyncio.wait_for(scene(), 60))
    time.sleep(0.15)
    stopped = served.passes
    time.sleep(0.3)
    assert served.passes == stopped


def test_who_does_not_read_is_not_waited_for(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(gate, "GRACE_S", 0.1)
    served = Served(text_folder, Rules(deadline_s=0.5))
    body = json.dumps({"prompt": "Hello!", "max_tokens": 100, "stream": True}).encode()
    told: list[Any] = []

    async def receive() -> dict[str, Any]:
        if told:
            await asyncio.sleep(60)
        told.append("asked")
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        told.append(message)
        await asyncio.sleep(60 if message["type"] == "http.response.body" else 0)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": TEXT, "headers": headers, "query_string": b""}
    asyncio.run(asyncio.wait_for(served.app(scope | {"http_version": "1.1"}, receive, send), 20))
    assert [one if one == "asked" else one["type"] for one in told] == [
        "asked",
        "http.response.start",
        "http.response.body",
    ]
    assert (lines[-1]["cause"], lines[-1]["status"]) == ("deadline", 499)
    served.engine.close()


def test_a_body_that_does_not_arrive_is_not_waited_for(served: Served) -> None:
    answers: list[Any] = []

    async def receive() -> dict[str, Any]:
        if answers:
            return {"type": "http.disconnect"}
        await asyncio.sleep(30)
        raise AssertionError

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {"type": "http", "method": "POST", "path": TEXT, "headers": [(b"x-request-timeout", b"0.05")]}
    asyncio.run(asyncio.wait_for(served.app(scope, receive, send), 20))
    assert answers[0]["status"] == 408


@pytest.mark.parametrize("by", ["header", "server"])
def test_a_deadline_stops_the_row(text_folder: Path, by: str) -> None:
    served = Served(text_folder, Rules(deadline_s=0.2 if by == "server" else 600.0))
    served.pause_s = 0.01

    async def scene() -> httpx.Response:
        headers = {"x-request-timeout": "0.2"} if by == "header" else {}
        async with served.client() as client:
            answer = await client.post(TEXT, json={"prompt": "Hello!", "max_tokens": 110}, headers=headers)
            assert (await client.get("/v1/models", headers={"x-request-timeout": "0"})).status_code == 400
            page = (await client.get("/metrics")).text
        assert _samples(page, "ingot_rejects_total")['{cause="deadline",model="tiny"}'] == 1
        return answer

    answer = asyncio.run(asyncio.wait_for(scene(), 30))
    assert answer.status_code == 504
    time.sleep(0.05)
    stopped = served.passes
    time.sleep(0.05)
    assert served.passes == stopped < 60
    served.engine.close()


def test_each_key_has_its_own_minute(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(quota, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    path = tmp_path / "keys.json"
    ann, bob = add_key(path, "ann", requests_per_minute=2), add_key(path, "bob", tokens_per_minute=10)
    served = Served(text_folder, Rules(Keyring(path), requests_per_minute=100))

    def status(client: TestClient, key: str) -> httpx.Response:
        body = {"prompt": "a", "max_tokens": 12}
        return client.post(TEXT, json=body, headers={"authorization": f"Bearer {key}"})

    with TestClient(served.app) as client:
        assert [status(client, ann).status_code for _ in range(3)] == [200, 200, 429]
        refused = status(client, ann)
        assert refused.headers["retry-after"] == "30"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert status(client, bob).status_code == 200
        late = status(client, bob)  # 13 tokens were taken of 10: 4 are missing to the next one
        assert (late.status_code, late.headers["retry-after"]) == (429, "24")
        assert "tokens" in late.json()["error"]["message"]
        assert status(client, "wrong").status_code == 401
        assert client.post(TEXT, json={"prompt": "a"}, headers={"api-key": bob}).status_code == 429
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 401
        page = client.get("/metrics", headers={"authorization": f"bearer {ann}"}).text
        rejects = _samples(page, "ingot_rejects_total")
        assert rejects['{cause="key",model=""}'] == 2
        assert rejects['{cause="rate_requests",model=""}'] == 2
        clock[0] += 30
        assert [status(client, ann).status_code for _ in range(2)] == [200, 429]
        path.write_text(path.read_text().replace('"requests_per_minute": 2', '"requests_per_minute": 3'))
        monkeypatch.setattr(keys, "LOOK_S", 0)
        assert [status(client, ann).status_code for _ in range(4)] == [200, 200, 200, 429]


def test_who_reads_a_stream_to_its_end_has_not_left(text_folder: Path) -> None:
    with TestClient(Served(text_folder).app) as client:
        for more in ({}, {"n": 2, "temperature": 1.0}):
            told = client.post(TEXT, json={"prompt": "a", "max_tokens": 3, "stream": True} | more)
            assert told.text.endswith("data: [DONE]\n\n")
        page = client.get("/metrics").text
    assert 'cause="left"' not in page


def test_what_is_refused_is_told_by_its_route(text_folder: Path, tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    add_key(tmp_path / "keys.json", "ann")
    served = Served(text_folder, Rules(Keyring(tmp_path / "keys.json")))
    model = "/v2/models/{model}"
    asked = {("GET", f"/v2/models/{SECRET}"): model, ("PUT", TEXT): TEXT, ("POST", f"/{SECRET}"): "none"}
    with TestClient(served.app) as client:
        assert {client.request(*one).status_code for one in asked} == {401}
    told = [(line["route"], line["cause"]) for line in lines if "route" in line]
    assert told == [(route, "key") for route in asked.values()]


def test_rows_of_a_classifier_are_paid_for(mean_folder: Path, lines: list[dict[str, Any]]) -> None:
    engine = start_engine(Runtime.load(mean_folder))
    assert engine.wait_ready(60)
    app = create_app(Deployments(Deployed("tiny", engine)), rules=Rules(tokens_per_minute=5))
    with TestClient(app) as client:
        body = {"dataframe_records": [{"text": "Hello! " * 8}] * 2}
        assert [client.post("/invocations", json=body).status_code for _ in range(2)] == [200, 429]
    assert [line["prompt_tokens"] for line in lines if "prompt_tokens" in line] == [2 * (56 // 4 + 1), 0]


def test_who_is_throttled_can_still_roll_back(text_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    headers = {"authorization": f"Bearer {add_key(path, 'ann', requests_per_minute=1)}"}
    engine = start_engine(Runtime.load(text_folder))
    app = create_app(Deployments(Deployed("tiny", engine)), rules=Rules(Keyring(path)), admin_key="secret")
    with TestClient(app, client=("127.0.0.1", 5)) as client:
        admin = headers | {"x-ingot-admin-key": "secret"}
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/v1/models", headers=headers).status_code == 429
        assert client.get("/admin/endpoints", headers=admin).status_code == 200
        assert client.get("/admin/endpoints", headers={"x-ingot-admin-key": "secret"}).status_code == 401


def test_metrics_tell_what_happened(served: Served) -> None:
    async def scene() -> str:
        async with served.client() as client:
            wanted = [client.post(TEXT, json={"prompt": "Hello!", "max_tokens": 7}) for _ in range(3)]
            answers = await asyncio.gather(*wanted)
            used = [answer.json()["usage"] for answer in answers]
            page = (await client.get("/metrics")).text
        label = '{model="tiny"}'
        written = sum(one["completion_tokens"] for one in used)
        assert _samples(page, "ingot_generated_tokens_total")[label] == written
        assert _samples(page, "ingot_prompt_tokens_total")[label] == sum(one["prompt_tokens"] for one in used)
        assert _samples(page, "ingot_time_to_first_token_seconds_count")[label] == 3
        assert _samples(page, "ingot_inter_token_seconds_count")[label] == written - 3
        assert _samples(page, "ingot_requests_total")[f'{{route="{TEXT}",status="200"}}'] == 3
        return page

    page = asyncio.run(scene())
    for name in ("queue_requests", "queue_tokens", "running_rows", "cache_tokens"):
        assert _samples(page, f"ingot_{name}") == {'{model="tiny"}': 0}
    assert _samples(page, "ingot_cache_tokens_limit")['{model="tiny"}'] >= 4096


def test_load_is_seen_while_it_is_there(served: Served) -> None:
    served.pause_s = 0.01

    async def scene() -> str:
        async with served.client() as client:
            asked = asyncio.create_task(client.post(TEXT, json={"prompt": "Hello!", "max_tokens": 60}))
            while served.passes < 5:
                await asyncio.sleep(0.002)
            page = (await client.get("/metrics")).text
            await asked
        return page

    page = asyncio.run(scene())
    assert _samples(page, "ingot_running_rows")['{model="tiny"}'] == 1
    assert _samples(page, "ingot_cache_tokens")['{model="tiny"}'] > 1
