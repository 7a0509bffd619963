"""Clients that are slow on purpose: each loses its connection after a time, and nobody else notices."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import uvicorn

from ingot.serving import connection, server
from ingot.serving.connection import Patient
from ingot.serving.listening import url_of
from ingot.serving.server import Endpoint

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Slow:
    """A socket to the endpoint, and when it was opened."""

    def __init__(self, url: str) -> None:
        self.began = time.monotonic()
        self.socket = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def trickle(self, piece: bytes, pause_s: float = 0.05) -> float:
        """Send a piece again and again; the seconds from the first one until the connection was closed."""
        began = time.monotonic()
        self.socket.settimeout(pause_s)
        try:
            while time.monotonic() < began + 10:
                self.socket.sendall(piece)
                try:
                    if not self.socket.recv(65536):
                        break
                except TimeoutError:
                    continue
        except OSError:  # reset
            pass
        return time.monotonic() - began

    def answer(self) -> bytes:
        """The status line of what was answered; nothing where it was hung up."""
        with self.socket.makefile("rb") as lines:
            return lines.readline()


@pytest.fixture
def url(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An endpoint with short deadlines: a head has 1 s, a body 0.5 s, the rest of an answer 1 s."""
    monkeypatch.setattr(connection, "HEAD_S", 1.0)
    monkeypatch.setattr(connection, "LINGER_S", 1.0)
    monkeypatch.setattr(connection, "LOOK_S", 0.05)
    options = server.Options(body_s=0.5)
    monkeypatch.setattr(server, "Options", lambda: options)
    with Endpoint(text_folder) as endpoint:
        yield endpoint.url


@pytest.mark.parametrize("piece", [b"", b"a: b\r\n", b"x"])
def test_a_head_that_does_not_come(url: str, piece: bytes) -> None:
    with Slow(url) as slow:
        if piece:
            slow.socket.sendall(HEAD)
            assert 0.7 < slow.trickle(piece) < 5.0
        else:
            assert slow.answer() == b""
            assert 0.9 < time.monotonic() - slow.began < 5.0
    assert httpx.get(f"{url}/health", trust_env=False).status_code == 200


def test_a_second_head_has_no_longer(url: str) -> None:
    with Slow(url) as slow:
        slow.socket.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" in slow.answer()
        time.sleep(1.5)  # idle is allowed: a connection is kept for 5 s
        slow.socket.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" in slow.answer()
        assert 0.7 < slow.trickle(b"G") < 5.0


def test_a_body_that_trickles(url: str) -> None:
    with Slow(url) as slow:
        slow.socket.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        assert b"408" in slow.answer()
        assert 0.4 < time.monotonic() - slow.began < 5.0
        assert slow.trickle(b" ") < 5.0  # what still comes is not read for ever
        page = httpx.get(f"{url}/metrics", trust_env=False).text
        assert 'ingot_rejects_total{cause="body",model=""} 1.0' in page


def test_the_rest_of_a_refused_body(url: str) -> None:
    with Slow(url) as slow:
        slow.socket.sendall(HEAD + b"Content-Length: 99999999\r\n\r\n{")
        assert b"413" in slow.answer()
        assert slow.trickle(b" ") < 5.0


def test_an_answer_that_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_S", 0.5)
    monkeypatch.setattr(connection, "LOOK_S", 0.05)
    size = 64 * 1024 * 1024  # more than the kernel holds

    async def app(scope: Any, receive: Any, send: Any) -> None:
        length = (b"content-length", str(size).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": b"x" * size})

    config = uvicorn.Config(app, http=Patient, lifespan="off", log_config=None, timeout_keep_alive=1)
    running = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener, Slow(url_of(listener)) as slow:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            slow.socket.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until = time.monotonic() + 10
            while not running.server_state.connections and time.monotonic() < until:
                time.sleep(0.01)
            while running.server_state.connections and time.monotonic() < until:
                time.sleep(0.01)
            assert not running.server_state.connections
            assert time.monotonic() - slow.began > 1.0
            taken = 0
            with contextlib.suppress(ConnectionResetError):
                while piece := slow.socket.recv(1 << 20):
                    taken += len(piece)
            assert 0 < taken < size
        finally:
            running.should_exit = True
            thread.join(20)
