"""Finding the model, taking the address, one question over HTTP, and stopping."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import httpx
import pytest

from ingot.errors import ServeError
from ingot.model.runtime import Runtime
from ingot.serving import server as server_module
from ingot.serving.fleet import find_model_folder
from ingot.serving.server import Endpoint, end_when_unwell, serve


def test_a_package_a_run_and_a_plain_folder_are_found(tmp_path: Path) -> None:
    def place(name: str) -> Path:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        return tmp_path / name

    assert find_model_folder(place("plain")) == tmp_path / "plain"
    package = place("package/model")
    assert find_model_folder(tmp_path / "package") == package
    merged = place("run/model")
    assert find_model_folder(tmp_path / "run") == merged
    verified = place("run/package/model")
    assert find_model_folder(tmp_path / "run") == verified


def test_a_wrong_folder_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="no such folder"):
        find_model_folder(tmp_path / "nothing")
    with pytest.raises(ServeError, match=r"no config\.json"):
        serve(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ServeError, match="does not load"):
        serve(tmp_path)


def test_a_taken_port_names_field_port_and_fix(text_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"serve\.port = {port}: another program .* or use 0"):
            Endpoint(text_folder, port=port).__enter__()


def test_others_may_come_in_only_with_a_key(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INGOT_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "example.invalid"):
        with pytest.raises(ServeError, match=r"serve\.host = .*INGOT_API_KEY"):
            serve(text_folder, host)
    monkeypatch.setenv("INGOT_API_KEY", "right")
    with Endpoint(text_folder, "0.0.0.0") as endpoint:
        port = endpoint.url.rpartition(":")[2]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").close()
        assert endpoint.ask("Hello!") == Runtime.load(text_folder).complete("Hello!").text


def test_an_address_of_another_machine_is_refused(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_API_KEY", "right")
    with pytest.raises(ServeError, match=r"serve\.host = '192\.0\.2\.1'"):
        serve(text_folder, "192.0.2.1")


@pytest.mark.parametrize("kind", ["chat_folder", "text_folder", "head_folder"])
def test_one_question_and_a_clean_end(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    runtime = Runtime.load(folder)
    with Endpoint(folder) as endpoint:
        answer = endpoint.ask("Hello!")
        url = endpoint.url
        assert httpx.get(f"{url}/ready", trust_env=False).status_code == 200
        thread = endpoint._thread
    wanted = {
        "chat_folder": lambda: runtime.chat([{"role": "user", "content": "Hello!"}]).text,
        "text_folder": lambda: runtime.complete("Hello!").text,
        "head_folder": lambda: runtime.classify(["Hello!"])[0][0],
    }
    assert answer == wanted[kind]()
    assert not thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)


def test_without_a_key_only_this_machines_names_are_answered(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a web page asks whose own name was made to resolve to this machine."""

    def status(url: str, host: str, **headers: str) -> int:
        return client.get(f"{url}/v1/models", headers={"host": host} | headers).status_code

    client = httpx.Client(trust_env=False)
    with Endpoint(text_folder) as endpoint:
        port = endpoint.url.rpartition(":")[2]
        for host in ("localhost", f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
            assert status(endpoint.url, host) == 200, host
        for host in ("evil.example", f"evil.example:{port}", "192.0.2.7", "127.0.0.1.evil.example"):
            assert status(endpoint.url, host) == 403, host
        assert client.get(f"{endpoint.url}/health", headers={"host": "probe"}).status_code == 200
    monkeypatch.setenv("INGOT_API_KEY", "secret")
    with Endpoint(text_folder) as endpoint:
        assert status(endpoint.url, "model.example", authorization="Bearer secret") == 200
    client.close()


def test_a_refused_question_is_a_serve_error(text_folder: Path) -> None:
    with Endpoint(text_folder) as endpoint, pytest.raises(ServeError, match=r"400: \d+ prompt tokens .* 128"):
        endpoint.ask("word " * 200)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_server_cleanly(text_folder: Path, sent: signal.Signals, repo_root: Path) -> None:
    code = "import sys; from pathlib import Path; from ingot.serving.server import serve; serve(Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": str(repo_root / "engine"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", code, str(text_folder)]
    # A shell's background job ignores Ctrl-C, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        first = child.stdout.readline()
        url = first.split()[-1]
        assert first.startswith("text at http://127.0.0.1:")
        client = httpx.Client(trust_env=False, transport=httpx.HTTPTransport(retries=5))
        assert client.post(f"{url}/v1/completions", json={"prompt": "Hello!"}, timeout=60).status_code == 200
        child.send_signal(sent)
        assert child.wait(30) == 0
        assert child.stdout.read() == "stopped\n"
        assert "Traceback" not in child.stderr.read()
        client.close()


def test_the_processs_log_handlers_are_left_alone(text_folder):
    """A handler that another library put in place (absl's closes its stream with itself) must survive the endpoint."""
    closed = []

    class Foreign(logging.Handler):
        def close(self):
            closed.append(True)
            super().close()

    foreign = Foreign()
    with Endpoint(text_folder):
        pass
    assert not closed
    foreign.close()


SLOW = """
import functools, sys, time
from pathlib import Path
from ingot.model.runtime import Runtime
from ingot.serving import serve
load = Runtime.load
def slow(folder):
    runtime = load(folder)
    forward = runtime.model.forward
    @functools.wraps(forward)
    def late(*args, **inputs):
        time.sleep(0.03)
        return forward(*args, **inputs)
    runtime.model.forward = late
    return runtime
Runtime.load = slow
serve(Path(sys.argv[1]))
"""


@pytest.mark.slow  # each starts a process
@pytest.mark.parametrize("works", ["never", "again", "always"])
def test_a_process_whose_model_does_not_work_ends(works: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "UNWELL_S", 0.3)
    monkeypatch.setattr(server_module, "LOOK_S", 0.02)
    monkeypatch.setattr(server_module, "END_S", 0.0)
    done: list[Any] = []
    monkeypatch.setattr(os, "kill", lambda *given: done.append(given))
    monkeypatch.setattr(os, "_exit", done.append)
    began = time.monotonic()

    class Models:
        @property
        def working(self) -> bool:
            return works == "always" or (works == "again" and time.monotonic() - began > 0.1)

    class Server:
        drain_s = 0.0

        @property
        def stopping(self) -> bool:
            return time.monotonic() - began > 1.0

    end_when_unwell(Server(), Models())  # type: ignore[arg-type]
    assert done == ([(os.getpid(), signal.SIGTERM), 1] if works == "never" else [])


@pytest.mark.parametrize("signals", [1, 2])
def test_what_runs_ends_before_the_server_does(text_folder: Path, signals: int, repo_root: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(repo_root / "engine"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", SLOW, str(text_folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as child:  # type: ignore[call-overload]
        url = child.stdout.readline().split()[-1]
        body = {"prompt": "Hello!", "max_tokens": 120, "stream": True}
        with (
            httpx.Client(trust_env=False, timeout=60) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            child.send_signal(signal.SIGTERM)
            ready = client.get(f"{url}/ready")
            while ready.status_code == 200:
                ready = client.get(f"{url}/ready")
            refused = client.post(f"{url}/v1/completions", json=body)
            assert (ready.status_code, refused.status_code) == (503, 503)
            assert refused.headers["retry-after"]
            assert client.get(f"{url}/health").status_code == 200
            if signals == 2:
                child.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert child.wait(30) == 0
        assert child.stdout.read() == "stopped\n"
        log = child.stderr.read()
    written = sum("text" in line for line in events)
    assert ("data: [DONE]" in events) is (signals == 1)
    assert (written > 50) is (signals == 1)
    assert "stopping running=1 drain_seconds=30.0" in log
    assert "cause=closed" in log
    assert "Hello!" not in log
