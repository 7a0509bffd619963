"""Spans of requests: what they say, whose trace they go on, where they are sent, and that nothing is paid without."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from ingot.errors import MissingPackage, ServeError
from ingot.model.runtime import Runtime
from ingot.serving.app import create_app
from ingot.serving.deployments import Deployed, Deployments
from ingot.serving.engines import start_engine
from ingot.serving.record import Record
from ingot.serving.server import Endpoint
from ingot.serving.tracing import VARIABLES, Traces, traces_to

TEXT = "/v1/completions"
SECRET = "the-secret-of-the-prompt"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


def _spans(folder: Path, *requests: tuple[str, str, dict[str, Any]]) -> list[Any]:
    """Of requests (method, path, what httpx takes) to a server of the model, in order."""
    exporter = InMemorySpanExporter()
    deployments = Deployments(Deployed("tiny", start_engine(Runtime.load(folder))))
    app = create_app(deployments, traces=Traces(exporter))
    with TestClient(app, raise_server_exceptions=False) as client:  # all are sent at its end
        for method, path, more in requests:
            client.request(method, path, **more)
    return list(exporter.get_finished_spans())


def test_a_span_for_each_request_and_nothing_of_it(text_folder: Path) -> None:
    asked = {"prompt": SECRET, "max_tokens": 5, "temperature": 0}
    caller = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    whole, streamed, refused, unknown, nowhere = _spans(
        text_folder,
        ("POST", TEXT, {"json": asked, "headers": caller}),
        ("POST", TEXT, {"json": asked | {"stream": True}}),
        ("POST", TEXT, {"json": asked | {SECRET: 1}}),
        ("POST", TEXT, {"json": asked | {"model": SECRET}}),
        ("GET", f"/{SECRET}", {}),
        ("GET", "/ready", {}),
        ("GET", "/metrics", {}),
    )
    told = dict(whole.attributes)
    assert 0 < told.pop("gen_ai.response.time_to_first_chunk") * 1e9 <= whole.end_time - whole.start_time
    prompt, new = told.pop("gen_ai.usage.input_tokens"), told.pop("gen_ai.usage.output_tokens")
    assert prompt > 1 and new == 5
    assert told == {
        "http.request.method": "POST",
        "http.route": TEXT,
        "http.response.status_code": 200,
        "ingot.request.id": "mine",
        "ingot.task": "text-generation",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "ingot",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
    }
    assert (whole.name, whole.kind, whole.resource.attributes["service.name"]) == (
        f"POST {TEXT}",
        SpanKind.SERVER,
        "ingot",
    )
    assert (f"{whole.context.trace_id:032x}", f"{whole.parent.span_id:016x}") == (TRACE, PARENT)
    assert streamed.parent is None and streamed.attributes["gen_ai.usage.output_tokens"] == 5
    assert refused.attributes["http.response.status_code"] == 400 and refused.attributes["error.type"] == "400"
    assert "gen_ai.request.model" not in unknown.attributes and unknown.attributes["http.response.status_code"] == 404
    assert (nowhere.name, nowhere.attributes["http.route"]) == ("GET none", "none")
    all_of_it = [span.to_json() for span in (whole, streamed, refused, unknown, nowhere)]
    assert SECRET not in json.dumps(all_of_it)


def test_a_model_of_another_task(mean_folder: Path) -> None:
    rows = {"dataframe_records": [{"input_string": "Hello!"}]}
    [span] = _spans(mean_folder, ("POST", "/invocations", {"json": rows}))
    assert span.attributes["ingot.task"] == "text-classification"
    assert span.attributes["gen_ai.response.time_to_first_chunk"] > 0
    assert "gen_ai.operation.name" not in span.attributes


def test_a_defect_is_an_error(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr("ingot.serving.openai.usage", broken)
    [span] = _spans(text_folder, ("POST", TEXT, {"json": {"prompt": "a", "max_tokens": 2}}))
    assert span.status.status_code is StatusCode.ERROR and span.attributes["error.type"] == "defect"
    assert SECRET not in span.to_json()


# --- where they go ---


def test_without_a_setting_nothing_is_imported() -> None:
    assert traces_to(None) is None
    code = "import sys, ingot.serving.server as it; assert it.traces_to(None) is None\n"
    # Other libraries import OpenTelemetry's API; what works is its SDK.
    code += "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_an_address_is_one() -> None:
    with pytest.raises(ServeError, match="http://HOST:4318"):
        traces_to("localhost:4318")


def test_without_the_exporter(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    with pytest.raises(MissingPackage, match=r"ingot\[otel\]"):
        traces_to("http://127.0.0.1:1")
    monkeypatch.setenv(VARIABLES[1], "http://127.0.0.1:1")  # where a whole cluster has it set
    assert traces_to(None) is None
    assert "no traces are sent" in caplog.text


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A collector's address, and what it gets: (path, body)."""
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_collector_that_says_nothing_does_not_hold_up_the_end(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip(EXPORTER)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        traces = traces_to(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert traces is not None
        traces.span({"method": "GET", "headers": []}, Record(id="mine"), 200)
        began = time.monotonic()
        traces.close()
        assert time.monotonic() - began < 6  # of the 10 that the exporter waits for an answer
    assert "they are lost" in caplog.text


@pytest.mark.parametrize("flag", [True, False])
def test_a_collector_gets_them(
    text_folder: Path, collector: tuple[str, list[tuple[str, bytes]]], flag: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(EXPORTER)
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    address, got = collector
    monkeypatch.setenv("OTEL_SERVICE_NAME", "letters")
    if not flag:
        monkeypatch.setenv(VARIABLES[1], address)
    with Endpoint(text_folder, otel=address if flag else None) as endpoint:
        endpoint.ask("Hello!", max_tokens=2)
    [(path, body)] = got
    assert path == "/v1/traces"
    [sent] = ExportTraceServiceRequest.FromString(body).resource_spans
    assert {it.key: it.value.string_value for it in sent.resource.attributes}["service.name"] == "letters"
    [span] = sent.scope_spans[0].spans
    assert span.name == f"POST {TEXT}"
