"""`ingot serve` as a user runs it: proved by a run's own rows, killed, come back, drained."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "engine" / "ingot" / "catalog" / "nano"
LOAD_S = 240.0  # a start takes 10 s alone, and many times that where others share the cores
pytestmark = pytest.mark.slow


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _children(pid: int) -> list[int]:
    return [int(it) for it in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait(until: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + LOAD_S
    while not until():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@contextmanager
def _served(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = _free_port()
    command = [sys.executable, "-m", "ingot", "serve", *map(str, arguments), "--port", str(port)]
    roots = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": roots}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.terminate()  # twice: at once, the child too
            time.sleep(0.2)
            process.terminate()
        process.communicate(timeout=60)


def _ready(url: str) -> int:
    try:
        return httpx.get(url + "/ready", timeout=30).status_code
    except httpx.TransportError:
        return 0


def test_a_killed_worker_comes_back_and_answers_the_same() -> None:
    seen: list[tuple[float, int]] = []
    done = threading.Event()
    with _served(f"nano={NANO}") as (process, url):
        _wait(lambda: _ready(url) == 200, "it never became ready")
        body = {"model": "nano", "prompt": "Dear all", "max_tokens": 12}
        first = httpx.post(url + "/v1/completions", json=body, timeout=60).json()["choices"]

        def poll() -> None:
            while not done.is_set():
                seen.append((time.monotonic(), _ready(url)))
                time.sleep(0.02)

        poller = threading.Thread(target=poll)
        poller.start()
        try:
            [worker] = _children(process.pid)
            killed = time.monotonic()
            os.kill(worker, signal.SIGKILL)
            _wait(lambda: any(at > killed and status == 503 for at, status in seen), "nobody said that it is gone")
            assert httpx.get(url + "/health", timeout=30).status_code == 200
            refused = httpx.post(url + "/v1/completions", json=body, timeout=60)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
            _wait(lambda: seen[-1][1] == 200, "it did not come back")
            back = time.monotonic()
            assert httpx.post(url + "/v1/completions", json=body, timeout=60).json()["choices"] == first
            assert _children(process.pid) != [worker]
        finally:
            done.set()
            poller.join()
        # Gone once, back once: 200, then (one request may be cut) 503, then 200 again.
        states = [status for _, status in seen if status]
        changes = [status for place, status in enumerate(states) if place == 0 or states[place - 1] != status]
        assert changes == [200, 503, 200] or changes == [503, 200]
        assert sum(status == 0 for _, status in seen) <= 1
        assert back > killed
        process.terminate()
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "was killed by SIGKILL" in output
        assert output.count("nano at http://127.0.0.1") == 2


def test_what_a_user_must_mend_ends_it_at_once(tmp_path: Path) -> None:
    with _served(tmp_path / "nothing") as (process, _):
        output, _ = process.communicate(timeout=LOAD_S)
    assert process.returncode == 2
    assert output.count("no such folder") == 1
    assert "Traceback" not in output
