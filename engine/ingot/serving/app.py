"""The HTTP routes over one model. Errors have OpenAI's form, name the field, and never repeat the input."""

import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ingot.model.generate import Generation, InputError
from ingot.model.runtime import Runtime
from ingot.serving.engine import ClosedError, Engine, QueueFullError
from ingot.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    InvocationRequest,
    Params,
    Settings,
    messages_of,
    text_of,
)

MAX_BODY_BYTES = 4 * 1024 * 1024
RETRY_AFTER_S = 2
OPEN_PATHS = ("/health", "/ready")
log = logging.getLogger("ingot.serve")


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        self.status, self.message, self.kind, self.param = status, message, kind, param


def _error(status: int, message: str, kind: str, param: str | None = None) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
    return JSONResponse({"error": {"message": message, "type": kind, "param": param}}, status, headers)


class Gate:
    """Before any route: the API key, and a body read whole but never beyond `max_bytes`."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_bytes: int) -> None:
        self.app, self.api_key, self.max_bytes = app, api_key, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if self.api_key is not None and scope["path"] not in OPEN_PATHS:
            sent = headers.get(b"authorization", b"")
            if not hmac.compare_digest(sent, f"Bearer {self.api_key}".encode()):
                refusal = _error(401, "a valid API key is needed: Authorization: Bearer KEY", "authentication_error")
                return await refusal(scope, receive, send)
        declared = headers.get(b"content-length", b"0")
        body = bytearray()
        too_long = declared.isdigit() and int(declared) > self.max_bytes
        more = not too_long
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_bytes:
                too_long, more = True, False
        if too_long:
            refusal = _error(413, f"the request body is over {self.max_bytes} bytes", "invalid_request_error")
            return await refusal(scope, receive, send)
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()  # only a disconnect can follow
            replayed = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return await self.app(scope, replay, send)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return _error(error.status, error.message, error.kind, error.param)

    @app.exception_handler(InputError)
    async def input_error(_: Request, error: InputError) -> JSONResponse:
        return _error(400, str(error), "invalid_request_error", error.field)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, "the body is not valid JSON", "invalid_request_error")
        if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type"):
            needs = "the body must be a JSON object, sent with Content-Type: application/json"
            return _error(400, needs, "invalid_request_error")
        # A union reports the tried types as parts of the place: only fields and positions are of use to a caller.
        place = [str(part) for part in first["loc"][1:] if isinstance(part, int) or str(part).isidentifier()]
        place = [part for part in place if part not in ("str", "list")]
        message = {"extra_forbidden": "this field is not supported"}.get(
            first["type"], first["msg"].removeprefix("Value error, ")
        )
        field = ".".join(place) or None
        return _error(400, f"{field}: {message}" if field else message, "invalid_request_error", field)

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> JSONResponse:
        return _error(503, "too many requests are waiting; try again", "overloaded_error")

    @app.exception_handler(ClosedError)
    async def closed(_: Request, error: ClosedError) -> JSONResponse:
        return _error(503, "the server is stopping", "overloaded_error")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), "invalid_request_error")

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return _error(500, "the server failed on this request; its log says more", "server_error")


def _usage(answers: list[Generation]) -> dict[str, int]:
    prompt, new = sum(a.n_prompt for a in answers), sum(len(a.ids) for a in answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


Choice = Callable[[int, str | None, str | None], dict[str, Any]]  # index, text, finish reason -> OpenAI's choice


def _chat_delta(index: int, text: str | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": {} if text is None else {"content": text}, "finish_reason": reason}


def _chat_choice(index: int, text: str | None, reason: str | None) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": text},
        "finish_reason": reason,
        "logprobs": None,
    }


def _text_choice(index: int, text: str | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text or "", "finish_reason": reason, "logprobs": None}


class Routes:
    """The handlers, bound to one engine and the model's public name."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name, self.started = engine, name, int(time.time())

    def _check_name(self, request: Settings) -> None:
        if request.model is not None and request.model != self.name:
            raise ApiError(404, f"no such model; this server has {self.name!r}", "not_found_error", "model")

    def _envelope(self, prefix: str, kind: str) -> dict[str, Any]:
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}

    def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        entry = {"id": self.name, "object": "model", "created": self.started, "owned_by": "ingot"}
        return {"object": "list", "data": [entry | {"task": self.engine.runtime.task}]}

    async def chat(self, body: ChatRequest) -> Any:
        """POST /v1/chat/completions."""
        self._check_name(body)
        messages = [message.model_dump(exclude_none=True) for message in body.messages]

        def ids(runtime: Runtime) -> list[list[int]]:
            return [runtime.chat_ids(messages, body.tools)]

        if body.stream:
            role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            return await self._stream(body, ids, self._envelope("chatcmpl", "chat.completion.chunk"), _chat_delta, role)
        return await self._answer(body, ids, self._envelope("chatcmpl", "chat.completion"), _chat_choice)

    async def completions(self, body: CompletionRequest) -> Any:
        """POST /v1/completions."""
        self._check_name(body)
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt

        def ids(runtime: Runtime) -> list[list[int]]:
            return [runtime.prompt_ids(prompt) for prompt in prompts]

        envelope = self._envelope("cmpl", "text_completion")
        if body.stream:
            return await self._stream(body, ids, envelope, _text_choice, None)
        return await self._answer(body, ids, envelope, _text_choice)

    async def _answer(
        self, body: Settings, ids: Callable[[Runtime], list[list[int]]], envelope: dict[str, Any], choice: Choice
    ) -> dict[str, Any]:
        answers = await self.engine.run(lambda runtime: runtime.generate(ids(runtime), **body.sampling()))
        choices = [choice(index, answer.text, answer.finish_reason) for index, answer in enumerate(answers)]
        return envelope | {"choices": choices, "usage": _usage(answers)}

    async def _stream(
        self,
        body: Settings,
        ids: Callable[[Runtime], list[list[int]]],
        envelope: dict[str, Any],
        choice: Choice,
        first: dict[str, Any] | None,
    ) -> StreamingResponse:
        def start(runtime: Runtime) -> Iterator[str | Generation]:
            [prompt] = ids(runtime)
            return runtime.stream(prompt, **body.sampling())

        pieces = self.engine.stream(start)
        # The first piece is awaited here: what is wrong with the request is then still an ordinary 4xx.
        head = await anext(pieces)

        async def events() -> AsyncIterator[str]:
            try:
                if first is not None:
                    yield _event(envelope | {"choices": [first]})
                piece: str | Generation = head
                while isinstance(piece, str):
                    yield _event(envelope | {"choices": [choice(0, piece, None)]})
                    piece = await anext(pieces)
                yield _event(envelope | {"choices": [choice(0, None, piece.finish_reason)]})
                if body.stream_options is not None and body.stream_options.include_usage:
                    yield _event(envelope | {"choices": [], "usage": _usage([piece])})
                yield "data: [DONE]\n\n"
            except Exception as error:
                stopping = isinstance(error, ClosedError)
                log.error("a stream ended early: %s", type(error).__name__)
                text = "the server is stopping" if stopping else "the server failed on this request"
                yield _event({"error": {"message": text, "type": "server_error", "param": None}})
            finally:
                await pieces.aclose()

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def invocations(self, body: InvocationRequest) -> dict[str, Any]:
        """POST /invocations, as MLflow's own server answers it."""
        rows = body.rows()
        if not rows:
            raise InputError("inputs", "the input holds no row")
        if self.engine.runtime.task == "text-classification":
            if given := [name for name in Params.model_fields if getattr(body.settings, name) is not None]:
                raise InputError(given[0], f"{given[0]}: a classifier takes no parameters")
            texts = [text_of(row, ("text", "input_string")) for row in rows]
            found = await self.engine.run(lambda runtime: runtime.classify(texts))
            return {"predictions": [{"label": label, "probability": probs[label]} for label, probs in found]}
        ids = self._invocation_ids(rows)
        sampling = body.settings.sampling()
        answers = await self.engine.run(lambda runtime: runtime.generate(ids(runtime), **sampling))
        return {"predictions": [{"output_string": answer.text} for answer in answers]}

    def _invocation_ids(self, rows: list[dict[str, Any]]) -> Callable[[Runtime], list[list[int]]]:
        if self.engine.runtime.task == "chat-completion":
            conversations = [messages_of(row) for row in rows]
            return lambda runtime: [runtime.chat_ids(messages) for messages in conversations]
        prompts = [text_of(row, ("input_string", "prompt")) for row in rows]
        return lambda runtime: [runtime.prompt_ids(prompt) for prompt in prompts]

    async def health(self) -> dict[str, str]:
        """GET /health: the process is alive."""
        return {"status": "alive"}

    async def ready(self) -> dict[str, str]:
        """GET /ready: a request sent now would be worked on."""
        if not self.engine.ready:
            raise ClosedError
        return {"status": "ready"}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def create_app(
    runtime: Runtime,
    name: str,
    *,
    api_key: str | None = None,
    max_waiting: int = 32,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The application over a loaded model. `api_key`: what callers must send; None asks for none."""
    engine = Engine(runtime, max_waiting)
    routes = Routes(engine, name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(title=f"Ingot: {name}", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.add_middleware(Gate, api_key=api_key, max_bytes=max_body_bytes)
    _add_error_handlers(app)
    app.get("/v1/models")(routes.models)
    app.post("/v1/chat/completions", response_model=None)(routes.chat)
    app.post("/v1/completions", response_model=None)(routes.completions)
    app.post("/invocations", response_model=None)(routes.invocations)
    app.get("/health")(routes.health)
    app.get("/ready")(routes.ready)
    return app
