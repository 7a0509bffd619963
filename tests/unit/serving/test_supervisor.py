"""The supervisor: a dead child is replaced, and whoever asks is told the truth at every moment."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

# A child without a model: it loads for LOAD_S, answers with its process id, and drains for DRAIN_S.
CHILD = """
import http.server, json, os, signal, sys, threading, time
from ingot.serving.channel import Parent
parent = Parent.from_environment()
place, load_s, drain_s, how = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
print(os.getpid(), file=open(f"{place}/pids", "a"))
time.sleep(load_s)
if how == "refuse":
    parent.refuse(3)
    sys.exit(3)
if how == "die" or os.path.exists(f"{place}/die"):
    os.kill(os.getpid(), signal.SIGKILL)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(drain_s if self.path == "/slow" else 0)
        body = json.dumps({"pid": os.getpid()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass

class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False
    def server_bind(self): pass

server = Server(("", 0), Handler, bind_and_activate=False)
server.socket = parent.listener
def stop(*_): threading.Thread(target=server.shutdown).start()
signal.signal(signal.SIGTERM, stop)
parent.ready()
open(f"{place}/ready", "a").write("x")
server.serve_forever(0.01)
server.server_close()
"""
PARENT = """
import logging, socket, sys
logging.basicConfig(level="INFO", format="%(message)s")
from ingot.errors import IngotError
from ingot.serving import supervisor
if len(sys.argv) > 6: supervisor.FIRST_DELAY_S = float(sys.argv[6])
hung_s = float(sys.argv[7]) if len(sys.argv) > 7 else 60
supervisor.TELLING_S = 0.3
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
assert not {"torch", "fastapi", "uvicorn"} & set(sys.modules), "the supervisor is light"
try:
    command = [sys.executable, "-c", sys.argv[1], *sys.argv[2:6]]
    code = supervisor.supervise(command, listener, drain_s=20, hung_s=hung_s)
except IngotError as error:
    sys.exit(f"error: {error}")
sys.exit(code)
"""

# A child with a model, whose engine hangs once a file tells it to.
HANGING = """
import os, sys, time
from pathlib import Path
from ingot.serving import server, worker
from ingot.serving.channel import Parent
from ingot.serving.continuous import ContinuousEngine
place, folder = Path(sys.argv[1]), Path(sys.argv[4])
print(os.getpid(), file=open(place / "pids", "a"))
server.UNWELL_S, server.LOOK_S, server.END_S, worker.STUCK_S = 0.5, 0.05, 1.0, 0.5
turn = ContinuousEngine._turn
def hanging(self):
    if (place / "hang").exists():
        (place / "hang").unlink()
        time.sleep(600)
    turn(self)
ContinuousEngine._turn = hanging
server.serve(folder, options=server.Options(drain_s=0.1), parent=Parent.from_environment())
"""

# A child with a model that writes its first token only while a file does not hold it up.
HELD = """
import os, sys, time
from pathlib import Path
from ingot.serving import server
from ingot.serving.channel import Parent
from ingot.serving.continuous import ContinuousEngine
place, folder = Path(sys.argv[1]), Path(sys.argv[4])
print(os.getpid(), file=open(place / "pids", "a"))
warm_up = ContinuousEngine._warm_up
def held(self):
    (place / "loaded").touch()
    while (place / "hold").exists():
        time.sleep(0.01)
    model, passes = self.runtime.model, []
    model.register_forward_hook(lambda *_: passes.append(1))
    warm_up(self)
    print(len(passes), file=open(place / "passes", "a"))
ContinuousEngine._warm_up = held
server.serve(folder, options=server.Options(drain_s=0.1), parent=Parent.from_environment())
"""

# A child whose event loop answers, is blocked for as many seconds as a request says, and one that is only slow to load.
BLOCKING = """
import asyncio, json, os, sys, time
from ingot.serving.channel import Parent
parent = Parent.from_environment()
print(os.getpid(), file=open(f"{sys.argv[1]}/pids", "a"))
time.sleep(float(sys.argv[2]))

async def answer(reader, writer):
    path = (await reader.readuntil(b"\\r\\n\\r\\n")).split()[1].decode()
    blocked_here(float(path.removeprefix("/block/"))) if path.startswith("/block/") else None
    body = json.dumps({"pid": os.getpid()})
    writer.write(f"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
    await writer.drain()
    writer.close()

def blocked_here(seconds):
    time.sleep(seconds)

async def main():
    await asyncio.to_thread(parent.ready, asyncio.get_running_loop())
    async with await asyncio.start_server(answer, sock=parent.listener) as server:
        await server.serve_forever()

asyncio.run(main())
"""


class Running:
    """A supervisor in a process of its own."""

    def __init__(
        self,
        place: Path,
        load_s: float,
        drain_s: float = 0.0,
        how: str = "serve",
        delay_s: float = 0.3,
        child: str = CHILD,
        hung_s: float = 60.0,
    ) -> None:
        self.place = place
        arguments = [child, place, load_s, drain_s, how, delay_s, hung_s]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def pids(self) -> list[int]:
        return [int(line) for line in (self.place / "pids").read_text().split()]

    def wait_ready(self) -> httpx.Response:
        deadline = time.monotonic() + 30
        # Without a process id it is the parent, for a connection that came just before the child took over.
        while "pid" not in (answer := self.get("/ready")).json():
            assert answer.status_code in (200, 503)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return answer

    def end(self) -> tuple[int, str]:
        """Its exit status and log, once it has ended."""
        _, log = self.process.communicate(timeout=30)
        return self.process.returncode, log


@contextlib.contextmanager
def running(*arguments: Any, **options: Any) -> Iterator[Running]:
    it = Running(*arguments, **options)
    try:
        yield it
    finally:
        it.process.kill()
        if not it.process.stderr.closed:
            it.process.communicate()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for number in it.pids()[-1:]:  # none yet, where the child has only begun to write its own
                os.kill(number, signal.SIGKILL)


def test_the_parent_answers_while_the_child_loads(tmp_path: Path) -> None:
    with running(tmp_path, 1.0) as served:
        assert served.get("/health").json() == {"status": "alive"}
        for path in ("/ready", "/v1/models", "/"):
            answer = served.get(path)
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
            assert answer.json()["error"]["type"] == "overloaded_error"
        # A long body is read, or the client would see a reset instead of the answer.
        assert httpx.post(served.url + "/v1/completions", content=b"x" * 3_000_000).status_code == 503
        assert served.wait_ready().json() == {"pid": served.pids()[0]}


def test_a_killed_child_is_replaced_and_ready_tells_the_truth(tmp_path: Path) -> None:
    seen: list[tuple[float, int, Any]] = []
    done = threading.Event()

    def poll(url: str) -> None:
        while not done.is_set():
            try:
                answer = httpx.get(url + "/ready", timeout=10)
                seen.append((time.monotonic(), answer.status_code, answer.json().get("pid")))
            except httpx.TransportError:
                seen.append((time.monotonic(), 0, None))  # cut by the kill
            time.sleep(0.01)

    with running(tmp_path, 0.4) as served:
        served.wait_ready()
        poller = threading.Thread(target=poll, args=(served.url,))
        poller.start()
        kills = []
        try:
            for _ in range(3):
                time.sleep(0.2)
                kills.append((time.monotonic(), served.pids()[-1]))
                os.kill(kills[-1][1], signal.SIGKILL)
                time.sleep(0.2)
                served.wait_ready()
            time.sleep(0.2)
        finally:
            done.set()
            poller.join()
        served.process.terminate()
        code, log = served.end()
    assert code == 0
    assert log.count("was killed by SIGKILL") == 3
    pids = [pid for _, status, pid in seen if status == 200 and pid]
    # Each child in its turn, never an earlier one again.
    assert list(dict.fromkeys(pids)) == [pid for pid in served.pids() if pid in pids]
    for at, killed in kills:
        # After a kill, nothing but 503 until another child answers; and there were such moments.
        after = [(status, pid) for when, status, pid in seen if when > at + 0.05]
        until = next(place for place, (status, pid) in enumerate(after) if status == 200 and pid)
        assert until > 1
        assert {status for status, _ in after[: until - 1]} == {503}  # the last may be the parent's "ready"
        assert after[until][1] != killed
    # A kill cuts at most the request that it meets: nobody is refused a connection.
    assert sum(status == 0 for _, status, _ in seen) <= 3


@pytest.mark.slow
def test_a_child_whose_engine_hangs_is_replaced(tmp_path: Path, text_folder: Path) -> None:
    def becomes(it: Running, status: int) -> None:
        until = time.monotonic() + 60
        while it.get("/ready").status_code != status:
            assert time.monotonic() < until
            time.sleep(0.05)

    with running(tmp_path, 0, how=str(text_folder), child=HANGING) as it:
        becomes(it, 200)
        (tmp_path / "hang").touch()
        becomes(it, 503)
        becomes(it, 200)
        assert len(it.pids()) == 2
        answer = httpx.post(f"{it.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=60)
        assert answer.status_code == 200
        it.process.send_signal(signal.SIGTERM)
        code, log = it.end()
    assert code == 0
    assert "a model has not worked" in log and "it is started again" in log


@pytest.mark.slow
def test_after_a_kill_ready_means_that_the_new_model_has_written(tmp_path: Path, text_folder: Path) -> None:
    def passes() -> list[int]:
        found = tmp_path / "passes"
        return [int(line) for line in found.read_text().split()] if found.exists() else []

    def becomes_ready(it: Running, lives: int) -> None:
        until = time.monotonic() + 60
        while it.get("/ready").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert len(passes()) == lives

    with running(tmp_path, 0, how=str(text_folder), child=HELD) as it:
        becomes_ready(it, 1)
        (tmp_path / "hold").touch()
        (tmp_path / "loaded").unlink()
        os.kill(it.pids()[0], signal.SIGKILL)
        until = time.monotonic() + 60
        while not (tmp_path / "loaded").exists():
            with contextlib.suppress(httpx.TransportError):  # cut by the kill
                assert it.get("/ready").status_code == 503
            assert time.monotonic() < until
            time.sleep(0.02)
        for _ in range(20):  # the weights are there, a token is not
            assert it.get("/ready").status_code == 503
            time.sleep(0.02)
        (tmp_path / "hold").unlink()
        becomes_ready(it, 2)
        assert min(passes()) >= 1
        assert len(it.pids()) == 2
        it.process.send_signal(signal.SIGTERM)
        assert it.end()[0] == 0


def test_a_blocked_event_loop_is_noticed(tmp_path: Path) -> None:
    # One that only loads, for longer than it may be silent (1.5 s), or is busy for less than that, is left alone.
    with running(tmp_path, 2.0, child=BLOCKING, hung_s=1.5) as it:
        it.wait_ready()
        for _ in range(3):
            assert it.get("/block/0.6").status_code == 200
        assert len(it.pids()) == 1
        began = time.monotonic()
        with pytest.raises(httpx.TransportError):
            it.get("/block/600")
        assert it.get("/ready").status_code == 503
        assert time.monotonic() - began < 20
        assert it.get("/health").status_code == 200
        assert it.wait_ready().json() == {"pid": it.pids()[1]}
        it.process.terminate()
        code, log = it.end()
    assert code == 0
    assert "has not answered for 1.5 s" in log
    assert "the serving process hung and was killed; it is started again in 0.3 s" in log
    assert "in blocked_here" in log  # where it hung


def test_requests_under_way_are_finished_when_stopping(tmp_path: Path) -> None:
    with running(tmp_path, 0.0, drain_s=1.0) as served:
        served.wait_ready()
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(served.get("/slow")))
        asking.start()
        time.sleep(0.3)
        served.process.terminate()
        time.sleep(0.2)
        assert served.get("/ready").status_code == 503
        asking.join()
        assert answers[0].json() == {"pid": served.pids()[0]}
        code, log = served.end()
    assert code == 0
    assert "stopping" in log
    assert "stopped" in log


def test_a_child_that_keeps_dying_ends_the_parent(tmp_path: Path) -> None:
    with running(tmp_path, 0.0, how="die", delay_s=0.01) as served:
        code, log = served.end()
    assert code == 1
    assert "error: the serving process was killed by SIGKILL" in log
    assert "5 times in a row" in log
    assert len(served.pids()) == 5
    assert [line.rpartition(" ")[0].rpartition(" ")[2] for line in log.splitlines() if "again in" in line] == [
        "0.01", "0.02", "0.04", "0.08"
    ]  # fmt: skip


def test_what_a_user_must_mend_is_not_tried_again(tmp_path: Path) -> None:
    with running(tmp_path, 0.0, how="refuse") as served:
        code, log = served.end()
    assert (code, len(served.pids())) == (3, 1)
    assert "again" not in log


def test_a_stop_while_loading_and_a_second_signal(tmp_path: Path) -> None:
    with running(tmp_path, 60.0) as served:
        while not (tmp_path / "pids").exists():
            time.sleep(0.02)
        served.process.send_signal(signal.SIGINT)
        assert served.end()[0] == 0
    with running(tmp_path, 0.0, drain_s=60.0) as served:
        served.wait_ready()

        def ask() -> None:
            with contextlib.suppress(httpx.TransportError):
                served.get("/slow")

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.2)
        served.process.terminate()
        time.sleep(0.2)
        served.process.terminate()
        assert served.end()[0] == 0
        asking.join()


def test_a_child_without_its_parent_stops(tmp_path: Path) -> None:
    with running(tmp_path, 0.0) as served:
        served.wait_ready()
        served.process.kill()
        served.end()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{served.pids()[0]}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_who_has_not_asked_yet_is_left_to_the_child(tmp_path: Path) -> None:
    """A connection that was opened while the child loaded, and asks later, must not hear an outdated 503."""
    with running(tmp_path, 1.0) as served:
        early = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
        served.wait_ready()
        early.settimeout(10)
        assert early.recv(100) == b""
        early.close()


def test_oddities_leave_the_stand_in_alone(tmp_path: Path) -> None:
    with running(tmp_path, 1.5) as served:
        port = int(served.url.rpartition(":")[2])
        for sent in (b"\x16\x03\x01\x00", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 9000, b"\r\n\r\n", b""):
            with socket.create_connection(("127.0.0.1", port)) as odd, contextlib.suppress(OSError):
                odd.sendall(sent)
                odd.shutdown(socket.SHUT_WR)
                odd.settimeout(5)
                odd.recv(10)
        assert httpx.head(served.url + "/health").status_code == 200
        assert json.loads(served.get("/health?x=1").text) == {"status": "alive"}
