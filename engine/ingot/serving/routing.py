"""Requests to the versions of an endpoint: each is counted where it was answered, and copied where that is wanted."""

import asyncio
import json
import logging
import math
import time
import traceback
from collections.abc import Mapping
from typing import Any, Self

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ingot.serving import record
from ingot.serving import trip as trips
from ingot.serving.deployments import Deployed, Deployments
from ingot.serving.faults import error_response
from ingot.serving.trip import Trip
from ingot.serving.versions import Version

VERSION_HEADER = b"x-ingot-version"
COPIES_AT_ONCE = 4  # more are left out: copies must not become the load
DEFECT = "the server failed on this request; its log says more"
KEPT_BYTES = 1024 * 1024  # of an answer that is compared
PASSING = ("id", "created", "usage")  # fields that are others in every answer, or follow from the rest
NO_ROOM = ("requests", "tokens", "closed")  # causes
FAILED_STREAM = b'data: {"error"'
log = logging.getLogger("ingot.serve")


class Answer:
    """What a request was answered: `status` 0 where nothing came. `seconds`: until the answer began."""

    def __init__(self) -> None:
        self.status, self.body, self.whole, self.failed_later = 0, bytearray(), True, False
        self._began, self.seconds = time.monotonic(), 0.0

    def hear(self, message: Message) -> None:
        """Note a message of the application."""
        if message["type"] == "http.response.start":
            self.status, self.seconds = message["status"], time.monotonic() - self._began
        elif message["type"] == "http.response.body":
            part = message.get("body", b"")
            self.failed_later = self.failed_later or part.startswith(FAILED_STREAM)
            if len(self.body) + len(part) <= KEPT_BYTES:
                self.body += part
            else:
                self.whole = False

    @property
    def failed(self) -> bool:
        """Whether the server, and not the caller, is to blame for what is wrong."""
        return self.status >= 500 or self.failed_later


class Routing:
    """Stands before the routes, behind the gate. `over(app)` puts it there."""

    app: ASGIApp

    def __init__(self, deployments: Deployments) -> None:
        self.deployments = deployments
        self._copies: set[asyncio.Task[None]] = set()

    def over(self, app: ASGIApp) -> Self:
        """Itself, in front of `app`."""
        self.app = app
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.deployments.endpoints:
            return await self.app(scope, receive, send)
        headers, kept = dict(scope["headers"]), dict(scope)  # the routes add to it
        works = scope["method"] == "POST"  # to be told of a model asks nothing of it
        trip = Trip(id=record.current().id or record.new_id())
        trip.forced = headers[VERSION_HEADER].decode("latin-1") if VERSION_HEADER in headers else None
        body, answer = bytearray(), Answer()

        async def hear() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.extend(message.get("body", b""))
            return message

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start" and trip.version is not None:
                name = trip.version.name.encode()
                message = {**message, "headers": [*message.get("headers", ()), (VERSION_HEADER, name)]}
            answer.hear(message)
            await send(message)

        trips.begin(trip)
        try:
            await self.app(scope, hear, tell)
        except Exception:
            if trip.version is not None:
                if not answer.status:  # what stands further out would answer, without the version
                    await error_response(500, DEFECT, "server_error")(scope, hear, tell)
                if works:
                    _note(trip, answer.seconds, failed=True)
            raise
        # Without a status the caller has left; with one of these it is to blame.
        if works and trip.version is not None and answer.status and not 400 <= answer.status < 500:
            _note(trip, answer.seconds, answer.failed)
            self._copy(kept, bytes(body), trip, answer)
        return None

    async def ask(self, path: str, body: Any, *, meant: Deployed | None = None) -> tuple[int, Any]:
        """POST `body` as JSON to a route, from within: (status, what its JSON holds). It is not counted.

        `meant`: the model that answers, whatever the body says.
        """
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "server": None,
            "client": None,
        }
        answer = await self._within(scope, json.dumps(body).encode(), Trip(meant=meant))
        try:
            return answer.status, json.loads(bytes(answer.body))
        except ValueError:
            return answer.status, None

    async def _within(self, scope: Mapping[str, Any], body: bytes, trip: Trip) -> Answer:
        """Send a request to the routes in a task of its own, so that this one keeps its trip."""
        answer, asked, never = Answer(), False, asyncio.Event()

        async def receive() -> Message:
            nonlocal asked
            if asked:
                await never.wait()  # nobody leaves
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            answer.hear(message)

        async def run() -> None:
            trips.begin(trip)
            record.begin(record.Record(id=trip.id))  # that of who is waited for is not to be added to
            try:
                await self.app({**scope, "state": {}}, receive, send)
            except Exception as error:
                where = "".join(traceback.format_tb(error.__traceback__))  # the message may hold a part of a row
                log.error("a request from within failed: %s\n%s", type(error).__name__, where)
                answer.status = answer.status or 500
                answer.failed_later = True

        await asyncio.create_task(run())
        return answer

    # --- copies -------------------------------------------------------------------------------------------------------

    def _copy(self, scope: Scope, body: bytes, trip: Trip, answer: Answer) -> None:
        """Send the request to the version that gets copies, once it is answered: its caller waits for nothing."""
        version = trip.endpoint.copied(trip.id, trip.version)
        if version is None or answer.failed:
            return
        if len(self._copies) >= COPIES_AT_ONCE:
            version.mirrored.skipped += 1
            return
        task = asyncio.create_task(self._compare(scope, body, version, answer))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _compare(self, scope: Scope, body: bytes, version: Version, first: Answer) -> None:
        second = await self._within(scope, body, Trip(meant=version.deployed))
        version.mirrored.add(second.seconds, second.failed)
        if first.whole and second.whole and not second.failed and _repeatable(body):
            version.mirrored.compared += 1
            version.mirrored.different += not same(answer_of(bytes(first.body)), answer_of(bytes(second.body)))


def _note(trip: Trip, seconds: float, failed: bool) -> None:
    """Count what a version has answered. Callers who choose it, or a deadline that it missed, say nothing of how it
    does beside the others, nor do those for whom it had no room: they could have any version rolled back.
    """
    asked = record.current()
    if trip.forced is not None or asked.cause in NO_ROOM or (asked.hurried and asked.cause == "deadline"):
        trip.version.answered.add(seconds, failed)
    else:
        trip.endpoint.answered(trip.version, seconds, failed)


def _repeatable(body: bytes) -> bool:
    """Whether the same model would answer the request in the same way again."""
    try:
        asked = json.loads(body)
    except ValueError:
        return False
    if not isinstance(asked, dict):
        return True
    # Azure's clients put parameters beside the input or into it.
    places = [asked, *(asked[name] for name in ("input_data", "inputs") if isinstance(asked.get(name), dict))]
    found = [place.get(name) for place in places for name in ("params", "parameters")]
    settings = dict(asked)
    for one in found:
        settings |= one if isinstance(one, dict) else {}
    drawn = settings.get("temperature", settings.get("do_sample"))
    return not drawn or settings.get("seed") is not None


def answer_of(body: bytes) -> Any:
    """What an answer says, without what is another in every answer: of a stream the text of each choice."""
    try:
        if not body.startswith(b"data:"):
            return _lasting(json.loads(body))
        texts: dict[int, str] = {}
        for line in body.decode("utf-8", "replace").split("\n\n"):
            data = line.removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            for choice in json.loads(data).get("choices", ()):
                piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                texts[choice["index"]] = texts.get(choice["index"], "") + piece
        return texts
    except (ValueError, KeyError, TypeError, AttributeError):
        return body


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(one) for key, one in value.items() if key not in PASSING}
    return [_lasting(one) for one in value] if isinstance(value, list) else value


def same(one: Any, other: Any) -> bool:
    """Equal, numbers with a fraction to a thousandth."""
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-3)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
