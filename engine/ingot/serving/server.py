"""Starting and stopping the endpoint: finding the model, the address, the process's signals."""

import errno
import ipaddress
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import uvicorn

from ingot.errors import ServeError
from ingot.model.runtime import Runtime
from ingot.serving.app import create_app

KEY_VARIABLE = "INGOT_API_KEY"
START_TIMEOUT_S = 60.0


def find_model_folder(target: Path) -> Path:
    """A package, a run folder (its package, else its merged model) or a Hugging Face folder -> the latter."""
    candidates = [target, target / "model", target / "package" / "model", *sorted(target.glob("package/*/model"))]
    # A run folder has both: the package is what was verified.
    for folder in [*candidates[2:], *candidates[:2]]:
        if (folder / "config.json").is_file():
            return folder
    what = "no such folder" if not target.exists() else "holds no packaged model, no model/ and no config.json"
    raise ServeError("target", str(target), f"{what}; give a package, a run folder or a Hugging Face folder")


def _name(target: Path) -> str:
    """The model's public name: as its package says, else the folder's."""
    for package in (target, target.parent):
        if (package / "MLmodel").is_file():
            import yaml

            metadata = yaml.safe_load((package / "MLmodel").read_text(encoding="utf-8")).get("metadata") or {}
            return str(metadata.get("name") or package.name)
    return target.resolve().name


def _load(target: Path) -> tuple[Runtime, str]:
    folder = find_model_folder(target)
    try:
        runtime = Runtime.load(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ServeError("target", str(target), f"the model in {folder} does not load: {error}") from error
    return runtime, _name(folder.parent if folder.name == "model" else folder)


def _api_key(host: str) -> str | None:
    """The key from the environment; an address that others can reach needs one."""
    key = os.environ.get(KEY_VARIABLE) or None
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and key is None:
        fix = (
            f"others could reach this address: set {KEY_VARIABLE} to a secret that callers must send, or use 127.0.0.1"
        )
        raise ServeError("serve.host", host, fix)
    return key


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is known before the model is loaded. Port 0: any free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise ServeError("serve.host", host, "is not an address of this machine") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            fix = "another program listens there; stop it, choose another port, or use 0 for a free one"
            raise ServeError("serve.port", port, fix) from error
        if error.errno == errno.EACCES:
            raise ServeError("serve.port", port, "needs administrator rights; choose a port above 1023") from error
        raise ServeError("serve.host", host, "is not an address of this machine") from error
    return listener


def check_address(host: str, port: int) -> None:
    """Raise `ServeError` now for an address that could not be served later."""
    _api_key(host)
    _bind(host, port).close()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _server(runtime: Runtime, name: str, key: str | None) -> uvicorn.Server:
    app = create_app(runtime, name, api_key=key)
    # Access lines would hold nothing that a proxy does not log better; errors still go to stderr.
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=10,
        server_header=False,
        # uvicorn's own configuration closes every log handler of the process, and with absl's handler its stream.
        log_config=None,
    )
    return uvicorn.Server(config)


def serve(target: Path, host: str = "127.0.0.1", port: int = 0, *, announce: Callable[[str], None] = print) -> None:
    """Answer until Ctrl-C or SIGTERM, then finish and return. `announce` gets the URL. Raises `ServeError`."""

    def stop(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    key = _api_key(host)
    listener = _bind(host, port)
    # uvicorn ends its connections first and then repeats the signal to this handler.
    before = signal.signal(signal.SIGTERM, stop)
    try:
        runtime, name = _load(target)
        server = _server(runtime, name, key)
        announce(f"{name} at {_url(listener)}")
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        announce("stopped")
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()


class Endpoint:
    """The endpoint in a thread of this process: `with Endpoint(folder) as endpoint: endpoint.ask("...")`."""

    def __init__(self, target: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        self.target, self.host, self.port = target, host, port

    def __enter__(self) -> Self:
        self._key = _api_key(self.host)
        self._listener = _bind(self.host, self.port)
        try:
            self._runtime, self.name = _load(self.target)
            self._server = _server(self._runtime, self.name, self._key)
        except BaseException:
            self._listener.close()
            raise
        self.url = _url(self._listener)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.__exit__(None, None, None)
                raise ServeError("serve.port", self.port, f"the endpoint did not come up within {START_TIMEOUT_S:g} s")
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(30.0)
        self._listener.close()

    def ask(self, question: str | list[dict[str, Any]], **params: Any) -> str:
        """One question over HTTP -> the text, or the label. `params` as the route takes them (max_tokens, stop ...)."""
        if self._runtime.task == "text-classification":
            return str(self._post("/invocations", {"text": question} | params)["predictions"][0]["label"])
        if self._runtime.task == "chat-completion":
            messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
            answer = self._post("/v1/chat/completions", {"messages": messages} | params)
            return str(answer["choices"][0]["message"]["content"])
        return str(self._post("/v1/completions", {"prompt": question} | params)["choices"][0]["text"])

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        # No proxy: the endpoint is this process.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=600) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as error:
            message = json.load(error)["error"]["message"]
            raise ServeError("serve.question", "...", f"the endpoint answered {error.code}: {message}") from error
