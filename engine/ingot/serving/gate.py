"""What every request passes: its id and log line, key and limits, a body of bounded size, a deadline, and an end when
its client leaves.
"""

import asyncio
import json
import logging
import math
import re
import time
import traceback
from dataclasses import dataclass, field

from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ingot.serving.faults import ApiError, error_response
from ingot.serving.keys import Key, Keyring
from ingot.serving.listening import is_loopback
from ingot.serving.metrics import Metrics
from ingot.serving.quota import Quota
from ingot.serving.record import Record, begin, new_id
from ingot.serving.tracing import Traces

OPEN_PATHS = ("/", "/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready")  # hosts' probes send no key
QUIET_PATHS = (*OPEN_PATHS, "/metrics")
ADMIN = "/admin/"  # on this machine, and with a key of its own
ID_HEADERS = (b"x-request-id", b"x-ms-client-request-id")
ID = re.compile(rb"[\x21-\x7e]{1,100}")
# Half of a pair of JSON escapes is no character, and no tokenizer takes it.
HALF = re.compile(rb"\\u[dD][89a-fA-F]")
PORT = re.compile(r":\d*$")
LEFT = 499  # no status of HTTP's: nobody reads it but the log
GRACE_S = 5.0  # beyond its deadline, that an answer has to say so
MAX_BODY_BYTES = 4 * 1024 * 1024
BODY_S = 60.0  # for a whole body to arrive
log = logging.getLogger("ingot.serve")


@dataclass(frozen=True)
class Rules:
    """What a request may be. Limits in a minute are for each key that has none of its own. `deadline_s`: the most that
    a request may take, unless its X-Request-Timeout says less; `body_s`: its body. `local`: only requests to a loopback
    name are answered.
    """

    keys: Keyring = field(default_factory=Keyring)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    deadline_s: float | None = 600.0
    max_body_bytes: int = MAX_BODY_BYTES
    body_s: float = BODY_S
    local: bool = False


class Gate:
    """Around the application; holds nothing of a request once it has ended."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics, traces: Traces | None = None) -> None:
        self.app, self.rules, self.metrics, self.traces = app, rules, metrics, traces
        self._quotas: dict[str, Quota] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        record, quota = Record(id=_id(headers)), None
        begin(record)
        answer = _Answer(send, record)
        try:
            record.until = self._until(headers, record)
            quota = self._admit(scope["path"], headers, record)
            body = await self._body(headers, receive, record)
            if ended := "left" if body is None else await self._work(scope, body, receive, answer.send, record):
                record.cause = ended
                if ended == "deadline" and not answer.status:
                    raise ApiError(504, "the time for this request is over", "timeout_error")
                answer.status = LEFT
        except ApiError as error:
            record.cause = record.cause or error.kind
            if record.cause in ("key", "host", "body", "rate_requests", "rate_tokens"):
                self.metrics.rejects.labels("", record.cause).inc()
            refusal = error_response(error.status, error.message, error.kind, error.param, error.retry_after_s)
            await refusal(scope, receive, answer.send)
        except Exception as error:
            # The message may hold a part of the request: where it happened says enough.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("a defect: %s\n%s", type(error).__name__, where, extra={"fields": {"id": record.id}})
            record.cause = "defect"
            if not answer.status:
                refusal = error_response(500, "the server failed on this request; its log says more", "server_error")
                await refusal(scope, receive, answer.send)
        finally:
            if quota is not None:
                quota.spend(record.prompt_tokens + record.new_tokens)
            self._note(scope, record, answer.status)

    def _until(self, headers: dict[bytes, bytes], record: Record) -> float | None:
        """When the request must have ended. Raises ApiError."""
        seconds, sent = self.rules.deadline_s, headers.get(b"x-request-timeout")
        if sent is not None:
            try:
                wanted = float(sent)
            except ValueError:
                wanted = math.nan
            if not 0.0 < wanted < math.inf:
                raise ApiError(
                    400, "X-Request-Timeout: give seconds above 0", "invalid_request_error", "X-Request-Timeout"
                )
            record.hurried = seconds is None or wanted < seconds
            seconds = wanted if seconds is None else min(seconds, wanted)
        return None if seconds is None else record.began + seconds

    def _admit(self, path: str, headers: dict[bytes, bytes], record: Record) -> Quota | None:
        """The caller's limits. Raises ApiError: 401 without a key that is known, 429 beyond the limits."""
        if path in OPEN_PATHS:
            return None
        # A page in a browser on this machine can have a name of its own resolve to it, and then ask as the same origin.
        host = PORT.sub("", headers.get(b"host", b"").decode("latin-1")).strip("[]").lower()
        if self.rules.local and host and not is_loopback(host):
            record.cause = "host"
            what = "without keys only requests to localhost are answered; give the server a key"
            raise ApiError(403, what, "permission_error")
        key: Key | None = None
        if not self.rules.keys.open:
            kind, _, sent = headers.get(b"authorization", b"").partition(b" ")
            sent = sent if kind.lower() == b"bearer" else headers.get(b"api-key", b"")  # as Azure's clients send it
            key = self.rules.keys.find(sent.strip())
            if key is None:
                record.cause = "key"
                raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", "authentication_error")
            record.key = key.name
        if path in QUIET_PATHS or path.startswith(ADMIN):  # who is throttled can still roll back
            return None
        quota = self._quota(key)
        record.cause, wait_s = quota.enter()
        if record.cause:
            what = record.cause.removeprefix("rate_")
            wait = max(1, math.ceil(wait_s))
            message = f"too many {what} in a minute for this key; try again in {wait} s"
            raise ApiError(429, message, "rate_limit_error", retry_after_s=wait)
        return quota

    def _quota(self, key: Key | None) -> Quota:
        rules, name = self.rules, "" if key is None else f"{key.name}/{key.sha256}"
        requests, tokens = (None, None) if key is None else (key.requests_per_minute, key.tokens_per_minute)
        limits = (requests or rules.requests_per_minute, tokens or rules.tokens_per_minute)
        found = self._quotas.get(name)
        if found is None or found.limits != limits:  # the file of keys is read again as it changes
            found = self._quotas[name] = Quota(*limits)
        return found

    async def _body(self, headers: dict[bytes, bytes], receive: Receive, record: Record) -> bytes | None:
        """The body, never more than allowed; None: the client has left. Raises ApiError: 413, 408 past its deadline."""
        most, declared, body = self.rules.max_body_bytes, headers.get(b"content-length", b"0"), bytearray()
        too_long = declared.isdigit() and int(declared) > most
        more, until = not too_long, record.began + self.rules.body_s
        try:
            async with asyncio.timeout(min(until, record.until or math.inf) - time.monotonic()):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        too_long, more = True, False
        except TimeoutError:
            record.cause = "body"
            raise ApiError(408, "the body did not arrive in time", "timeout_error") from None
        if too_long:
            record.cause = "body"
            raise ApiError(413, f"the request body is over {most} bytes", "invalid_request_error")
        if not _utf8(body):
            raise ApiError(400, "the body is not UTF-8", "invalid_request_error")
        if HALF.search(body) and not _writable(body):
            raise ApiError(
                400, "the body holds half of a surrogate pair, which is no character", "invalid_request_error"
            )
        return bytes(body)

    async def _work(self, scope: Scope, body: bytes, receive: Receive, send: Send, record: Record) -> str:
        """Let the application answer. What ended the work before that: "left", by the client, or "deadline", where it
        could not be said in time, for one that reads too slowly; empty where nothing did.
        """
        replayed, gone = False, asyncio.Event()

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                await gone.wait()
                return {"type": "http.disconnect"}
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        work = asyncio.ensure_future(self.app(scope, replay, send))
        watch = asyncio.ensure_future(receive())  # behind the whole body only a disconnect can follow
        most = None if record.until is None else record.until + GRACE_S - time.monotonic()
        try:
            await asyncio.wait({work, watch}, timeout=most, return_when=asyncio.FIRST_COMPLETED)
            ended = "" if work.done() else "left" if watch.done() else "deadline"
            if ended:
                gone.set()
                work.cancel()
                await asyncio.wait({work})
            if work.cancelled():
                return ended or "left"
            work.result()
            return ended
        finally:
            watch.cancel()
            work.cancel()

    def _note(self, scope: Scope, record: Record, status: int) -> None:
        record.route = _route(scope)
        seconds = time.monotonic() - record.began
        self.metrics.requests.labels(record.route, str(status)).inc()
        self.metrics.seconds.labels(record.route).observe(seconds)
        if scope["path"] in QUIET_PATHS and status < 400:
            return
        if self.traces is not None:
            self.traces.span(scope, record, status)
        fields = {
            "id": record.id,
            "route": record.route,
            "model": record.model,
            "status": status,
            "seconds": round(seconds, 4),
            "prompt_tokens": record.prompt_tokens,
            "new_tokens": record.new_tokens,
            "key": record.key,
            "cause": record.cause,
        }
        log.info("request", extra={"fields": fields})


def _route(scope: Scope) -> str:
    """The path as its route spells it, also of a request that was refused before it got there; none for another: a path
    of the caller's own making would be a new time series each.
    """
    route = scope.get("route")
    if route is None:
        nearest, route = max(((one.matches(scope)[0], one) for one in scope["app"].routes), key=lambda it: it[0].value)
        route = None if nearest is Match.NONE else route
    return getattr(route, "path", None) or "none"


def _utf8(body: bytearray) -> bool:
    """Python's json would take halves of pairs as bytes, and other encodings, which it knows by their zeros."""
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in body


def _writable(body: bytearray) -> bool:
    """Whether all texts of a JSON body are Unicode."""
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except (ValueError, RecursionError):  # not JSON: the routes say so
        return True
    return True


def _id(headers: dict[bytes, bytes]) -> str:
    """The caller's own name for the request, where it is one; else a new one."""
    for header in ID_HEADERS:
        sent = headers.get(header, b"")
        if ID.fullmatch(sent):
            return sent.decode("ascii")
    return new_id()


class _Answer:
    """Hands on what the application sends, with headers for every answer; `status`: 0 before it has begun."""

    def __init__(self, send: Send, record: Record) -> None:
        self._send, self._record, self.status = send, record, 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", [])]
            headers += [(b"x-request-id", self._record.id.encode()), (b"x-content-type-options", b"nosniff")]
            if not any(name.lower() == b"cache-control" for name, _ in headers):
                headers.append((b"cache-control", b"no-store"))
            message = {**message, "headers": headers}
        await self._send(message)
