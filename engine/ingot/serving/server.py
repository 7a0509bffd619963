"""Starting and stopping the endpoint: finding the model, the address, the process's signals."""

import asyncio
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import uvicorn

from ingot.errors import ServeError
from ingot.model.runtime import WRITING
from ingot.recipe_serve import Serve
from ingot.serving.app import WARM_UP_S, create_app
from ingot.serving.channel import Parent
from ingot.serving.connection import Patient
from ingot.serving.deployments import Deployed, Deployments
from ingot.serving.engine import Limits
from ingot.serving.engines import Wanted
from ingot.serving.fleet import Fleet, Target, Where, deploy
from ingot.serving.gate import BODY_S, MAX_BODY_BYTES, Rules
from ingot.serving.keys import KEY_VARIABLE, Keyring
from ingot.serving.listening import bind, keyring, url_of
from ingot.serving.logs import Format, write_logs
from ingot.serving.metrics import Metrics
from ingot.serving.replay import Stored
from ingot.serving.tracing import Traces, traces_to

START_TIMEOUT_S = 60.0
UNWELL_S = 60.0  # without a model at work behind a name: then the process has to be started again
LOOK_S = 1.0
END_S = 25.0  # to leave engines and connections behind that do not end by themselves
log = logging.getLogger("ingot.serve")
Started = Callable[[asyncio.AbstractEventLoop], None]


@dataclass(frozen=True)
class Options:
    """How a model is served. Limits in a minute are for each key that has none of its own. `drain_s`: what runs has so
    long to end after SIGTERM; `deadline_s`: every request, which may ask for less; `body_s`: its body to arrive.
    """

    limits: Limits = field(default_factory=Limits)
    keys: Path | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    deadline_s: float | None = 600.0
    drain_s: float = 30.0
    max_body_bytes: int = MAX_BODY_BYTES
    body_s: float = BODY_S
    log_format: Format = "text"
    admin_key: str | None = field(default=None, repr=False)
    engine: Wanted = "auto"
    passes: Where = "auto"
    otel: str | None = None  # a collector's address; None: OpenTelemetry's own variables say whether there is one

    @classmethod
    def of(cls, section: Serve, admin_key: str | None = None, otel: str | None = None) -> Self:
        """As a recipe or the command line says."""
        limits = Limits(
            waiting_requests=section.max_waiting,
            waiting_tokens=section.max_waiting_tokens,
            rows=section.max_rows,
            cache_tokens=section.cache_tokens,
            answer_tokens=section.max_tokens,
        )
        return cls(
            limits=limits,
            keys=None if section.keys is None else Path(section.keys),
            requests_per_minute=section.requests_per_minute,
            tokens_per_minute=section.tokens_per_minute,
            deadline_s=section.deadline,
            drain_s=section.drain,
            max_body_bytes=section.max_body,
            body_s=section.body_timeout,
            log_format=section.log_format,
            admin_key=admin_key,
            engine=section.engine or "auto",
            passes=section.passes or "auto",
            otel=otel,
        )


def check_address(section: Serve) -> None:
    """Raise `ServeError` now for an address that could not be served later."""
    keyring(section.host, Options.of(section).keys)
    bind(section.host, section.port or 0).close()


class DrainingServer(uvicorn.Server):
    """After the first signal to stop, what runs may end within `drain_s`, while new requests and /ready are answered
    503; a second signal stops it after its running token.
    """

    def __init__(self, config: uvicorn.Config, deployments: Deployments, drain_s: float) -> None:
        super().__init__(config)
        self._deployments, self.drain_s = deployments, drain_s

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self.should_exit or bool(self._captured_signals)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or end."""
        drain_s = 0.0 if self._captured_signals else self.drain_s
        self._captured_signals.append(sig)
        threading.Thread(target=self._drain, args=(drain_s,), name="ingot-drain", daemon=True).start()

    def _drain(self, drain_s: float) -> None:
        running = sum(one.engine.load().running for one, _ in self._deployments.each())
        log.info("stopping", extra={"fields": {"running": running, "drain_seconds": drain_s}})
        self._deployments.close(drain_s)
        self.should_exit = True


def end_when_unwell(server: DrainingServer, deployments: Deployments) -> None:
    """Return once `server` stops; end the process where a model does not work any more (a device that has failed, a
    pass that hangs) and does not recover: nothing in here can mend that, and a supervisor starts it again.
    """
    well = time.monotonic()
    while not server.stopping and time.monotonic() - well < UNWELL_S:
        time.sleep(LOOK_S)
        well = time.monotonic() if deployments.working else well
    if server.stopping:
        return
    log.error("a model has not worked for %g s: this process ends, to be started again", UNWELL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(server.drain_s + END_S)
    os._exit(1)  # a thread that hangs cannot be joined


def make_server(
    deployments: Deployments,
    ring: Keyring,
    metrics: Metrics,
    options: Options,
    stored: Mapping[Deployed, Sequence[Stored]] | None = None,
    started: Started | None = None,
    traces: Traces | None = None,
) -> DrainingServer:
    """A server over engines that have been started; `stored`, `started` and `traces` as `create_app` takes them."""
    minute = options.requests_per_minute, options.tokens_per_minute
    rules = Rules(ring, *minute, options.deadline_s, options.max_body_bytes, options.body_s, local=ring.open)
    config = uvicorn.Config(
        create_app(
            deployments,
            rules=rules,
            metrics=metrics,
            traces=traces,
            admin_key=options.admin_key,
            stored=stored,
            started=started,
        ),
        http=Patient,
        ws="none",
        log_level="warning",
        access_log=False,  # the gate writes a line a request
        timeout_graceful_shutdown=10,
        server_header=False,
        # uvicorn's own configuration closes every log handler of the process, and with absl's handler its stream.
        log_config=None,
    )
    return DrainingServer(config, deployments, options.drain_s)


def _start(
    fleet: Fleet, ring: Keyring, options: Options, started: Started | None = None
) -> tuple[DrainingServer, Deployments]:
    """A server whose models have answered. Raises ServeError."""
    metrics, traces = Metrics(), traces_to(options.otel)
    deployments, stored = deploy(fleet, options.limits, metrics.of, options.engine, options.passes)
    deployments.wait_ready(WARM_UP_S)
    if not deployments.working:
        deployments.close()
        given = [str(target.folder) for target in (*fleet.models, *fleet.versions.values())]
        raise ServeError("MODEL", ", ".join(given), "the model loads, but does not answer; the log says why")
    return make_server(deployments, ring, metrics, options, stored, started, traces), deployments


def serve(
    target: Path | Fleet,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    options: Options | None = None,
    parent: Parent | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Answer until Ctrl-C or SIGTERM, then finish and return. `announce` gets the URL. `parent`: the supervisor, whose
    address it is. Raises `ServeError`.
    """

    def stop(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    options = options or Options()
    ring, listener = keyring(host, options.keys), bind(host, port) if parent is None else parent.listener
    handler = write_logs(options.log_format)
    # uvicorn ends its connections first and then repeats the signal to this handler.
    before = signal.signal(signal.SIGTERM, stop)
    interval = sys.getswitchinterval()
    # The model's thread asks for the interpreter after each of its operations: at 5 ms, Python's own, each request
    # that is being read would hold it up for as long.
    sys.setswitchinterval(0.0005)
    try:
        fleet = target if isinstance(target, Fleet) else Fleet((Target(target),))

        def started(loop: asyncio.AbstractEventLoop) -> None:
            if parent is not None:
                parent.ready(loop)
                tell()

        def tell() -> None:
            announce(f"{', '.join(one.name for one in deployments.all())} at {url_of(listener)}")

        server, deployments = _start(fleet, ring, options, started)
        if parent is None:
            tell()
        else:
            threading.Thread(target=end_when_unwell, args=(server, deployments), daemon=True).start()
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        announce("stopped")
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.setswitchinterval(interval)
        log.removeHandler(handler)
        listener.close()


class Endpoint:
    """The endpoint in a thread of this process: `with Endpoint(folder) as endpoint: endpoint.ask("...")`."""

    def __init__(
        self,
        target: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        engine: Wanted = "own",
        passes: Where = "threads",
        otel: str | None = None,
        options: Options | None = None,
    ) -> None:
        self.target, self.host, self.port = target, host, port
        self.options = replace(options or Options(), engine=engine, passes=passes, otel=otel)

    def __enter__(self) -> Self:
        self._key, ring = os.environ.get(KEY_VARIABLE) or None, keyring(self.host, self.options.keys)
        if self._key is None and not ring.open:  # nothing tells the keys of a file
            self._key = secrets.token_urlsafe(32)
            ring = Keyring(self.options.keys, self._key)
        self._listener = bind(self.host, self.port)
        try:
            self._server, deployments = _start(Fleet((Target(self.target),)), ring, self.options)
            self._runtime, self.name = deployments.all()[0].engine.runtime, deployments.all()[0].name
        except BaseException:
            self._listener.close()
            raise
        self.url = url_of(self._listener)
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

    def ask(self, question: str | list[dict[str, Any]] | dict[str, Any], **params: Any) -> str:
        """One question over HTTP -> the text, or the first column of the answer. A mapping is a row of the task.
        `params` as the route takes them (max_tokens, stop ...).
        """
        if self._runtime.task not in WRITING:
            row = question if isinstance(question, dict) else {"": question}
            body = {"dataframe_records": [row]} | ({"params": params} if params else {})
            found = next(iter(self._post("/invocations", body)["predictions"][0].values()))
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
        question = next(iter(question.values())) if isinstance(question, dict) else question
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
