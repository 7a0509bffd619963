"""A scripted OpenAI-style server on loopback that fails on demand."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass
class Reply:
    """`cut`: the connection ends in the middle of the body. `raw`: instead of JSON. `trickle_s`: before each byte."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    cut: bool = False
    trickle_s: float = 0.0


def text(words: str, finish: str = "stop", **more: Any) -> dict[str, Any]:
    """An answer of /completions or /chat/completions."""
    choice = {"index": 0, "text": words, "message": {"role": "assistant", "content": words}, "finish_reason": finish}
    used = {"prompt_tokens": 7, "completion_tokens": len(words.split()), "total_tokens": 0}
    return {"model": "tiny", "choices": [choice], "usage": used, **more}


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    return Reply(
        status, {"error": {"message": message, "code": code}}, {n.replace("_", "-"): v for n, v in headers.items()}
    )


class FakeServer:
    """`answer(path, body)` gives a dict or a Reply; `first`: what comes before, one for each request but /models.

    `asked`: (path, body) of all POSTs; `headers`: of all requests; `most_at_once`: POSTs.
    """

    def __init__(
        self,
        answer: Callable[[str, dict[str, Any]], Any] = lambda path, body: text("yes"),
        models: tuple[str, ...] | None = ("tiny",),
        first: list[Reply] | None = None,
    ) -> None:
        self.answer, self.models, self.first = answer, models, list(first or [])
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.now_at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.headers.append(dict(self.headers))
                if outer.models is None:
                    self._send(error(404, "no such route"))
                else:
                    self._send(Reply(body={"data": [{"id": name} for name in outer.models]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                path = self.path.removeprefix("/v1")
                with outer._lock:
                    outer.headers.append(dict(self.headers))
                    outer.asked.append((path, body))
                    outer.now_at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.now_at_once)
                    planned = outer.first.pop(0) if outer.first else None
                found = planned if planned is not None else outer.answer(path, body)
                with outer._lock:
                    outer.now_at_once -= 1
                self._send(found if isinstance(found, Reply) else Reply(body=found))

            def _send(self, reply: Reply) -> None:
                content = reply.raw if reply.raw is not None else json.dumps(reply.body).encode()
                try:
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    if reply.trickle_s:
                        for place in range(len(content)):
                            time.sleep(reply.trickle_s)
                            self.wfile.write(content[place : place + 1])
                            self.wfile.flush()
                    elif reply.cut:
                        self.wfile.write(content[: len(content) // 2])
                        self.close_connection = True
                    else:
                        self.wfile.write(content)
                except OSError:  # the client gave up
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close, request_queue_size = True, False, 64

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, it: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Answer nothing any more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def said(self, path: str = "/completions") -> list[dict[str, Any]]:
        """Bodies that came to `path`."""
        return [body for where, body in self.asked if where == path]
