"""Versions behind one name: shares, mirroring, when a version loses its requests, and what a restart remembers."""

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from ingot.errors import ServeError
from ingot.model.sampling import InputError
from ingot.serving import record
from ingot.serving.app import create_app
from ingot.serving.deployments import Deployed, Deployments
from ingot.serving.endpoint_file import EndpointSection, endpoint_of_flags, named, read_endpoint
from ingot.serving.engine import DeadlineError, Load, QueueFullError
from ingot.serving.faults import ApiError
from ingot.serving.replay import Stored, difference
from ingot.serving.routing import _repeatable, answer_of
from ingot.serving.versions import Versioned
from ingot.serving.weights import Weights

KEY = {"x-ingot-admin-key": "secret"}
SECRET = "the words of a row"
ROW = {"dataframe_records": [{"prompt": "x"}]}


class Fake:
    """An engine without a model: answers every row with its name, or fails."""

    def __init__(self, name: str) -> None:
        self.name, self.fails, self.ready, self.asked = name, False, True, 0
        self.wait_s, self.late, self.full = 0.0, False, False
        self.runtime = SimpleNamespace(task="text-generation")

    async def answer(self, rows: Sequence[dict[str, Any]], params: dict[str, Any], **_: Any) -> list[dict[str, Any]]:
        if params.get("temperature", 0) < 0:
            raise InputError("temperature", "temperature must not be negative")
        self.asked += 1
        time.sleep(self.wait_s)
        if self.full:
            raise QueueFullError("requests", 1)
        if self.late:
            record.current().cause = "deadline"
            raise DeadlineError
        if self.fails:
            raise RuntimeError(SECRET)
        return [{"output_string": self.name, "score": 0.5} for _ in rows]

    def wait_ready(self, timeout_s: float) -> bool:
        return True

    def load(self) -> Load:
        return Load(0, 0, 0)

    def close(self, *_: Any, **__: Any) -> None: ...


def section(weights: dict[str, float], **more: Any) -> EndpointSection:
    versions = {name: {"target": f"runs/{name}", "weight": weight} for name, weight in weights.items()}
    return EndpointSection.model_validate({"name": "chat", "versions": versions, **more})


class Served:
    """An application over fake versions."""

    def __init__(self, weights: dict[str, float], kept: Path | None = None, stored: Any = None, **more: Any) -> None:
        self.fakes: dict[str, Any] = {name: Fake(name) for name in weights}
        self.of = {name: Deployed("chat", fake) for name, fake in self.fakes.items()}
        self.endpoint = Versioned(section(weights, **more), self.of, None if kept is None else Weights(kept))
        rows = {self.of[name]: rows for name, rows in (stored or {}).items()}
        self.app = create_app(Deployments(self.endpoint), admin_key="secret", stored=rows)
        self.client = TestClient(self.app, raise_server_exceptions=False, client=("127.0.0.1", 5))

    def __enter__(self) -> "Served":
        self.client.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self.client.__exit__()

    def ask(self, number: int = 0, forced: str | None = None, timeout_s: float = 0, **body: Any) -> httpx.Response:
        headers = {"x-request-id": str(number)} | ({"x-ingot-version": forced} if forced else {})
        headers |= {"x-request-timeout": str(timeout_s)} if timeout_s else {}
        return self.client.post("/invocations", json=ROW | ({"params": body} if body else {}), headers=headers)

    def admin(self, method: str, path: str = "", **options: Any) -> httpx.Response:
        return self.client.request(method, f"/admin/endpoints/chat{path}", headers=KEY, **options)


# --- shares ----------------------------------------------------------------------------------------------------------


def test_requests_are_shared_by_weight_and_one_id_stays() -> None:
    with Served({"blue": 90, "green": 10}) as served:
        found = [served.ask(number).headers["x-ingot-version"] for number in range(400)]
        assert [served.ask(number).json()["predictions"][0]["output_string"] for number in range(50)] == found[:50]
        assert 15 <= Counter(found)["green"] <= 70  # 40 expected; six standard deviations are 36
        state = served.admin("GET").json()["versions"]
        assert state["green"]["answered"]["requests"] == found.count("green") + found[:50].count("green")
        # Without an id of the caller's: drawn.
        drawn = {served.client.post("/invocations", json=ROW).headers["x-ingot-version"] for _ in range(90)}
        assert drawn == {"blue", "green"}


def test_the_header_forces_a_version_also_one_without_weight() -> None:
    with Served({"blue": 1, "green": 0}) as served:
        assert {served.ask(n).headers["x-ingot-version"] for n in range(30)} == {"blue"}
        assert served.ask(forced="green").json()["predictions"][0]["output_string"] == "green"
        refused = served.ask(forced="red")
        assert refused.status_code == 400
        assert "blue, green" in refused.json()["error"]["message"]


def test_callers_see_one_model() -> None:
    with Served({"blue": 1, "green": 1}) as served:
        assert [one["id"] for one in served.client.get("/v1/models").json()["data"]] == ["chat"]


# --- rollback --------------------------------------------------------------------------------------------------------


def test_a_failing_version_is_rolled_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ingot.serve")
    kept, rule = tmp_path / "chat.state.json", {"min_requests": 10, "error_rate": 0.2}
    with Served({"blue": 50, "green": 50}, kept, rollback=rule) as served:
        served.fakes["green"].fails = True
        statuses = [(answer.headers["x-ingot-version"], answer.status_code) for answer in map(served.ask, range(60))]
        assert statuses.count(("green", 500)) == 10
        assert {status for name, status in statuses if name == "blue"} == {200}
        state = served.admin("GET").json()
        assert state["versions"]["green"]["weight"] == 0
        assert "10 of its last 10 requests failed" in state["versions"]["green"]["rolled_back"]
        [change] = state["changes"]
        assert (change["what"], change["version"], change["by"]) == ("rolled back", "green", "itself")
        assert change["weights"] == {"blue": 50, "green": 0}
        assert "rolled back green by itself" in caplog.text
        assert SECRET not in kept.read_text() + caplog.text + json.dumps(state)
        page = served.client.get("/metrics").text
        assert 'ingot_version_rolled_back{endpoint="chat",version="green"} 1.0' in page
        assert 'ingot_version_errors_total{endpoint="chat",version="green"} 10.0' in page
        assert 'ingot_queue_requests{model="chat@blue"}' in page
        # It still answers who asks for it by name, and may come back by hand.
        assert served.ask(forced="green").status_code == 500
        served.fakes["green"].fails = False
        assert served.admin("PUT", json={"weights": {"green": 50}}).status_code == 200
        assert {served.ask(n).status_code for n in range(60)} == {200}
        served.admin("POST", "/rollback", json={"version": "green", "reason": "ticket 7"})
    with Served({"blue": 50, "green": 50}, kept, rollback=rule) as restarted:
        assert {restarted.ask(n).headers["x-ingot-version"] for n in range(30)} == {"blue"}
        assert [it["why"] for it in restarted.admin("GET").json()["changes"]][-1] == "ticket 7"
    # Who changes the configuration says something newer than that.
    with Served({"blue": 60, "green": 40}, kept, rollback=rule) as changed:
        assert changed.admin("GET").json()["versions"]["green"]["weight"] == 40
    kept.write_text("{")
    with Served({"blue": 50, "green": 50}, kept, rollback=rule) as damaged:
        assert damaged.admin("GET").json()["versions"]["green"]["weight"] == 50


def test_callers_mistakes_and_shared_trouble_roll_nothing_back() -> None:
    with Served({"blue": 50, "green": 50}, rollback={"min_requests": 5}) as served:
        assert {served.ask(n, temperature=-1).status_code for n in range(40)} == {400}
        for fake in served.fakes.values():
            fake.fails = True
        assert {served.ask(n).status_code for n in range(40)} == {500}
        assert served.admin("GET").json()["changes"] == []


def test_callers_cannot_have_a_version_rolled_back() -> None:
    with Served({"blue": 50, "green": 50}, rollback={"min_requests": 5}) as served:
        served.fakes["green"].fails = True
        assert {served.ask(n, forced="green").status_code for n in range(20)} == {500}
        served.fakes["green"].full = True  # by callers whose ids all choose this version
        assert {served.ask(n).status_code for n in range(60)} == {200, 503}
        served.fakes["green"].full, served.fakes["green"].late = False, True
        answers = [served.ask(n, timeout_s=5) for n in range(60)]
        assert {answer.status_code for answer in answers} == {200, 504}
        state = served.admin("GET").json()
        assert state["changes"] == []
        assert state["versions"]["green"]["answered"]["errors"] > 60
        # A deadline of the server's own that only this version misses is its fault.
        for number in range(60):
            served.ask(number)
        assert served.admin("GET").json()["changes"][0]["version"] == "green"


def test_a_slow_version_is_rolled_back() -> None:
    rule = {"min_requests": 5, "latency_ratio": 3.0}
    with Served({"blue": 50, "green": 50}, rollback=rule) as served:
        served.fakes["green"].wait_s = 0.05
        for number in range(60):
            served.ask(number)
        [change] = served.admin("GET").json()["changes"]
        assert change["version"] == "green"
        assert "median latency" in change["why"]


def test_old_requests_do_not_count() -> None:
    at = [0.0]
    fakes: dict[str, Any] = {name: Deployed("chat", Fake(name)) for name in ("blue", "green")}  # type: ignore[arg-type]
    rule = {"min_requests": 4, "error_rate": 0.5, "window_s": 10}
    endpoint = Versioned(section({"blue": 1, "green": 1}, rollback=rule), fakes, clock=lambda: at[0])
    for version in endpoint.versions.values():
        version.held = ""
    green = endpoint.versions["green"]
    for _ in range(3):
        endpoint.answered(green, 0.1, True)
    at[0] = 11.0
    endpoint.answered(green, 0.1, True)
    assert not endpoint.changes
    for _ in range(3):
        endpoint.answered(green, 0.1, True)
    assert endpoint.changes


def test_shared_trouble_after_good_times_rolls_nothing_back() -> None:
    fakes: dict[str, Any] = {name: Deployed("chat", Fake(name)) for name in ("blue", "green")}  # type: ignore[arg-type]
    endpoint = Versioned(section({"blue": 9, "green": 1}, rollback={"min_requests": 10}), fakes)
    for version in endpoint.versions.values():
        version.held = ""
    for number in range(400):
        endpoint.answered(endpoint.choose(str(number)), 0.1, failed=number > 150 and number % 3 == 0)
    assert not endpoint.changes
    # And one that alone fails as often is found.
    for number in range(400):
        version = endpoint.choose(str(number))
        endpoint.answered(version, 0.1, failed=version.name == "green" or number % 3 == 0)
    assert [it["version"] for it in endpoint.changes] == ["green"]


def test_requests_under_way_finish_on_the_version_that_is_rolled_back(text_folder: Path) -> None:
    """Half of a stream is read, its version is rolled back, and the rest comes as if nothing had happened."""
    from ingot.model.runtime import Runtime
    from ingot.serving.engines import start_engine

    of = {name: Deployed("chat", start_engine(Runtime.load(text_folder))) for name in ("blue", "green")}
    endpoint = Versioned(section({"blue": 1, "green": 1}), of)
    app = create_app(Deployments(endpoint), admin_key="secret")
    with TestClient(app, client=("127.0.0.1", 5)) as client:
        body = {"prompt": "Hello!", "max_tokens": 40}
        wanted = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        headers = {"x-ingot-version": "green"}
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}, headers=headers) as stream:
            events = stream.iter_lines()
            first = next(events)
            endpoint.roll_back("green", "by hand", by="test")
            lines = [first, *events]
        told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(one["choices"][0].get("text") or "" for one in told) == wanted
        assert stream.headers["x-ingot-version"] == "green"
        assert client.post("/v1/completions", json=body).headers["x-ingot-version"] == "blue"


# --- mirroring -------------------------------------------------------------------------------------------------------


def test_copies_are_counted_and_dropped() -> None:
    with Served({"blue": 1, "green": 0}, mirror={"version": "green"}) as served:
        assert {served.ask(n).json()["predictions"][0]["output_string"] for n in range(10)} == {"blue"}
        served.ask(11, temperature=1.0)  # would be answered differently by the same model, too
        served.ask(12, temperature=-1)  # the caller's mistake
        served.fakes["green"].fails = True
        served.ask(13)
        deadline = time.monotonic() + 10
        while served.admin("GET").json()["versions"]["green"]["mirrored"]["requests"] < 12:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        state = served.admin("GET").json()["versions"]["green"]
        assert state["answered"]["requests"] == 0
        assert state["mirrored"] | {"seconds": 0} == {
            "requests": 12, "errors": 1, "seconds": 0, "compared": 10, "different": 10, "skipped": 0
        }  # fmt: skip
        assert served.admin("PUT", json={"mirror": None}).json()["mirror"] is None
        served.ask(14)
        assert served.fakes["green"].asked == 12


def test_to_be_told_of_a_model_is_no_request_of_it() -> None:
    with Served({"blue": 1, "green": 0}, mirror={"version": "green"}) as served:
        for path in ("/v1/models/chat", "/v2/models/chat", "/v2/models/chat/ready"):
            assert served.client.get(path).status_code == 200, path
        assert served.ask().status_code == 200
        deadline = time.monotonic() + 10
        while served.admin("GET").json()["versions"]["green"]["mirrored"]["requests"] < 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        states = served.admin("GET").json()["versions"]
        assert states["blue"]["answered"]["requests"] == states["green"]["mirrored"]["requests"] == 1


@pytest.mark.parametrize(
    ("body", "repeatable"),
    [
        ({"prompt": "x"}, True),
        ({"prompt": "x", "temperature": 1.0}, False),
        ({"prompt": "x", "temperature": 1.0, "seed": 3}, True),
        ({"dataframe_records": [], "params": {"temperature": 1.0}}, False),
        ({"inputs": [], "parameters": {"temperature": 1.0}}, False),
        ({"input_data": {"input_string": [], "parameters": {"temperature": 0.7}}}, False),
        ({"input_data": {"input_string": [], "parameters": {"temperature": 0.7, "seed": 1}}}, True),
        ({"inputs": {"input_string": [], "parameters": {"do_sample": True}}}, False),
        ({"input_data": {"input_string": [], "parameters": {"do_sample": True, "temperature": 0.0}}}, True),
        ({"input_data": {"input_string": [], "parameters": {"do_sample": False}}}, True),
        ({"inputs": {"parameters": 3}}, True),
        ([1], True),
    ],
)
def test_who_draws_is_not_compared(body: Any, repeatable: bool) -> None:
    assert _repeatable(json.dumps(body).encode()) is repeatable


def test_a_part_of_the_requests_is_copied() -> None:
    with Served({"blue": 1, "green": 0}, mirror={"version": "green", "percent": 10}) as served:
        for number in range(200):
            served.ask(number)
        deadline = time.monotonic() + 10
        while served.fakes["green"].asked < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 3 <= served.fakes["green"].asked <= 50


def test_what_two_answers_say_is_compared() -> None:
    whole = b'{"id": "a", "created": 1, "choices": [{"index": 0, "text": "no"}], "usage": {"total_tokens": 3}}'
    assert answer_of(whole) == {"choices": [{"index": 0, "text": "no"}]}
    stream = (
        b'data: {"id": "a", "choices": [{"index": 0, "delta": {"content": "n"}}]}\n\n'
        b'data: {"id": "a", "choices": [{"index": 0, "delta": {"content": "o"}, "finish_reason": "stop"}]}\n\n'
        b"data: [DONE]\n\n"
    )
    assert answer_of(stream) == {0: "no"}
    assert answer_of(b"\xff") == b"\xff"


# --- replay ----------------------------------------------------------------------------------------------------------


def _stored(text: str) -> list[Stored]:
    return [Stored(f"test.jsonl:{n}", {"prompt": SECRET}, {"output_string": text, "score": 0.5}) for n in range(3)]


def test_a_version_that_answers_otherwise_gets_no_requests(caplog: pytest.LogCaptureFixture) -> None:
    stored = {"blue": _stored("blue"), "green": _stored("greet " + SECRET)}
    with Served({"blue": 10, "green": 90}, stored=stored) as served:
        assert served.client.get("/ready").status_code == 200
        assert {served.ask(n).headers["x-ingot-version"] for n in range(30)} == {"blue"}
        held = served.admin("GET").json()["versions"]["green"]["held"]
        assert (
            "3 of 3 rows were not answered as stored: row test.jsonl:0: output_string differs from character 5" in held
        )
        for path, body in (("/promote", {"version": "green"}), ("", {"weights": {"green": 1}})):
            answer = served.admin("POST" if path else "PUT", path, json=body)
            assert answer.status_code == 409
            assert "not answered as stored" in answer.text
        assert served.ask(forced="green").status_code == 503
        assert SECRET not in held + caplog.text
        # Not what requests of callers are counted by.
        assert served.admin("GET").json()["versions"]["blue"]["answered"]["requests"] == 30


def test_a_model_that_answers_otherwise_is_not_ready() -> None:
    fake: Any = Fake("tiny")
    deployed = Deployed("tiny", fake)
    with TestClient(create_app(Deployments(deployed), stored={deployed: _stored("tina")})) as client:
        assert client.get("/health").status_code == 200
        probes = ("/ready", "/ping", "/", "/v2/health/ready", "/v2/models/tiny/ready")
        for answer in (*map(client.get, probes), client.post("/invocations", json=ROW)):
            assert answer.status_code == 503, answer.url
            assert "differs from character 4 on" in answer.json()["error"]["message"]
    with TestClient(create_app(Deployments(deployed), stored={deployed: _stored("tiny")})) as client:
        assert client.get("/ready").status_code == client.post("/invocations", json=ROW).status_code == 200


def test_rows_that_are_refused_or_fail_are_reported() -> None:
    fake: Any = Fake("tiny")
    deployed = Deployed("tiny", fake)
    fake.fails = True
    with TestClient(create_app(Deployments(deployed), stored={deployed: _stored("tiny")})) as client:
        assert "row test.jsonl:0: answered 500" in client.get("/ready").json()["error"]["message"]


@pytest.mark.parametrize(
    ("expected", "found", "told"),
    [
        ("same", "same", ""),
        ("same", "sane", "the answer differs from character 3 on"),
        ("same", "same here", "the answer differs from character 5 on"),
        ({"a": {"b": "x"}}, {"a": {"b": "y"}, "c": 1}, "a.b differs from character 1 on"),
        ({"a": 1}, {}, "no a"),
        ([1, 2], [1], "the answer has 1 entries, stored were 2"),
        ([1.0, 2.0], [1.0, 2.5], "the answer[1] is another number, by 0.5"),
        (0.5, 0.500001, ""),
        (None, "x", "the answer is another value"),
    ],
)
def test_where_answers_differ(expected: Any, found: Any, told: str) -> None:
    assert difference(expected, found) == told


# --- /admin ----------------------------------------------------------------------------------------------------------


def test_admin_is_for_this_machine_and_one_key() -> None:
    with Served({"blue": 1, "green": 1}) as served:
        path = "/admin/endpoints/chat"
        assert served.client.get(path).status_code == 401
        assert served.client.get(path, headers={"x-ingot-admin-key": "secreT"}).status_code == 401
        far = TestClient(served.app, client=("192.0.2.7", 5))
        assert far.get(path, headers=KEY).status_code == 403
        assert served.client.get(path, headers=KEY | {"x-forwarded-for": "127.0.0.1"}).status_code == 403
        assert served.client.get("/admin/endpoints/other", headers=KEY).status_code == 404
        assert served.client.get("/admin/endpoints", headers=KEY).json()["endpoints"][0]["name"] == "chat"
    off = TestClient(create_app(Deployments(Deployed("tiny", Fake("tiny")))))  # type: ignore[arg-type]
    assert off.get("/admin/endpoints", headers=KEY).status_code == 404


def test_weights_promotion_and_refusals() -> None:
    with Served({"blue": 1, "green": 0}, mirror={"version": "green"}) as served:
        for body in ({"weights": {"red": 1}}, {"weights": {"blue": 0}}, {"weights": {"blue": -1}}, {"wait": 1}):
            assert served.admin("PUT", json=body).status_code == 400, body
        assert served.admin("POST", "/promote", json={"version": "red"}).status_code == 400
        after = served.admin("POST", "/promote", json={"version": "green"}).json()
        assert {name: one["weight"] for name, one in after["versions"].items()} == {"blue": 0, "green": 100}
        assert after["mirror"] is None
        assert served.ask().headers["x-ingot-version"] == "green"
        back = served.admin("POST", "/rollback", json={"version": "green"}).json()
        assert back["versions"]["blue"]["weight"] == 100
        assert back["versions"]["green"]["rolled_back"] == "by hand"
        served.fakes["green"].ready = False
        assert served.admin("POST", "/rollback", json={"version": "blue"}).status_code == 409
        assert served.client.get("/ready").status_code == 200
        served.fakes["blue"].ready = False
        assert served.client.get("/ready").status_code == 503
        assert served.ask().status_code == 503


def test_a_change_of_the_mirror_is_told_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept, weights, mirror = tmp_path / "chat.state.json", {"blue": 1, "green": 0}, {"version": "green"}
    with Served(weights, kept, mirror=mirror) as served:
        changed = served.admin("PUT", json={"mirror": {"version": "green", "percent": 5}}).json()
        assert changed["changes"][-1] | {"at": ""} == {
            "at": "", "what": "mirrored", "version": "green", "why": "5 % of the requests", "by": "admin",
            "weights": weights,
        }  # fmt: skip
        assert "mirrored green by admin" in caplog.text
        assert served.admin("PUT", json={"mirror": {"version": "red"}}).status_code == 400
    with Served(weights, kept, mirror=mirror) as served:
        assert served.admin("GET").json()["mirror"]["percent"] == 5
        assert served.admin("PUT", json={"mirror": None}).json()["changes"][-1]["version"] == ""
    with Served(weights, kept, mirror=mirror) as served:
        assert served.admin("GET").json()["mirror"] is None
    with Served(weights, kept, mirror=mirror | {"percent": 50.0}) as served:  # somebody has configured another one
        assert served.admin("GET").json()["mirror"]["percent"] == 50
    # A file of before the mirror was kept.
    before = json.loads(kept.read_text())
    kept.write_text(json.dumps({name: before[name] for name in ("configured", "versions", "changes")}))
    with Served(weights, kept, mirror=mirror) as served:
        assert served.admin("GET").json()["mirror"]["version"] == "green"


# --- what is configured ----------------------------------------------------------------------------------------------


def test_flags_and_file_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text(
        "name: chat\nversions:\n  blue: {target: runs/a, weight: 90}\n  green: {target: 'models:/chat/2', weight: 10}\n"
        "mirror: {version: green, percent: 50}\n"
    )
    flags = endpoint_of_flags("chat", ["blue=runs/a:90", "green=models:/chat/2:10"], "green:50")
    assert read_endpoint(path) == flags
    assert endpoint_of_flags("chat", ["blue=models:/chat/2"], None).versions["blue"].weight == 1


@pytest.mark.parametrize(
    ("text", "field", "fix"),
    [
        ("name: chat\nversions: {blue: {target: a}}\n", "versions", "weight above 0"),
        ("name: chat\nversions: {blue: {target: a, weight: -1}}\n", "versions.blue.weight", "greater than"),
        ("name: chat\nversions: {blue: {target: a, wait: 1}}\n", "versions.blue.wait", "unknown here"),
        ("name: a b\nversions: {blue: {target: a, weight: 1}}\n", "name", "pattern"),
        ("name: chat\nversions: {blue: {target: a, weight: 1}}\nmirror: {version: red}\n", "versions", "none of"),
        ("- chat\n", "--endpoint", "must hold"),
        ("a: [", "--endpoint", "not YAML"),
    ],
)
def test_a_wrong_file_names_the_field(tmp_path: Path, text: str, field: str, fix: str) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text(text)
    with pytest.raises(ServeError, match=fix) as told:
        read_endpoint(path)
    assert told.value.field == field


def test_wrong_flags(tmp_path: Path) -> None:
    for versions in (["runs/a:90"], ["blue=a:1", "blue=b:1"], []):
        with pytest.raises(ServeError, match=r"--version|two versions"):
            endpoint_of_flags("chat", versions, None)
    assert named("blue=runs/a") == ("blue", "runs/a")
    assert named("runs/a=b") == (None, "runs/a=b")
    (tmp_path / "lr=1e-4").mkdir()
    assert named(f"{tmp_path}/lr=1e-4") == (None, f"{tmp_path}/lr=1e-4")


def test_names_must_be_unique() -> None:
    one: Any = Fake("one")
    with pytest.raises(ValueError, match="one name"):
        Deployments(Deployed("a", one), Deployed("a", one))
    with pytest.raises(ApiError):
        Deployments(Deployed("a", one)).choose("b")
