"""Answers in OpenAI's form as server-sent events, piece by piece."""

import asyncio
import contextlib
import json
import logging
import traceback
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

from fastapi.responses import StreamingResponse

from ingot.model.sampling import Generation, Piece
from ingot.serving.engine import ClosedError, DeadlineError
from ingot.serving.openai_answers import chat_logprobs, text_logprobs, usage
from ingot.serving.openai_schemas import ChatRequest, CompletionRequest, Settings
from ingot.serving.tools import Unfolding

log = logging.getLogger("ingot.serve")

HEARTBEAT_S = 10.0  # proxies close connections that say nothing for 30 to 60 seconds
HEARTBEAT = ": waiting\n\n"
Pieces = AsyncGenerator[tuple[int, Any], None]  # (index, Piece), and (index, Generation) at a row's end


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class Events(Protocol):
    """What is said of each choice."""

    begins: dict[str, Any]

    @property
    def body(self) -> Settings:
        """What was asked."""

    def first(self, index: int) -> list[dict[str, Any]]:
        """Choices of the events before any text."""

    def piece(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Of the events of a piece."""

    def last(self, index: int, answer: Generation) -> list[dict[str, Any]]:
        """Of the events at the end."""


class ChatEvents:
    """Role, then deltas of the content and calls, then the reason of the end. `names`: functions that are offered."""

    def __init__(self, begins: dict[str, Any], body: ChatRequest, tokenizer: Any, names: set[str]) -> None:
        self.begins, self.body, self.tokenizer = begins, body, tokenizer
        self._calls: dict[int, Unfolding] = {}
        self._names, self._told = names, dict[int, int]()

    def _choice(self, index: int, delta: dict[str, Any], told: Any = (), reason: str | None = None) -> dict[str, Any]:
        logprobs = chat_logprobs(self.tokenizer, told) if told else None
        return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}

    def first(self, index: int) -> list[dict[str, Any]]:
        """The role."""
        if self._names:
            self._calls[index] = Unfolding(self._names)
        return [self._choice(index, {"role": "assistant", "content": ""})]

    def piece(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Text and calls, as far as they are certain."""
        self._told[index] = self._told.get(index, 0) + len(piece.told)
        text, calls = self._calls[index].feed(piece) if index in self._calls else (str(piece), [])
        return self._deltas(index, text, calls, piece.told)

    def last(self, index: int, answer: Generation) -> list[dict[str, Any]]:
        """The rest of both, the reason."""
        text, calls, called = self._calls[index].end() if index in self._calls else ("", [], False)
        choices = self._deltas(index, text, calls, answer.told[self._told.get(index, 0) :])
        return [*choices, self._choice(index, {}, reason="tool_calls" if called else answer.finish_reason)]

    def _deltas(self, index: int, text: str, calls: list[dict[str, Any]], told: Any) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = [{"content": text}] if text else []
        deltas += [{"tool_calls": [call]} for call in calls]
        if told and not deltas:
            deltas = [{}]
        return [self._choice(index, delta, () if place else told) for place, delta in enumerate(deltas)]


class TextEvents:
    """Text, then the reason of its end."""

    def __init__(self, begins: dict[str, Any], body: CompletionRequest, tokenizer: Any) -> None:
        self.begins, self.body, self.tokenizer = begins, body, tokenizer
        self._told, self._sent = dict[int, int](), dict[int, int]()

    def _choice(self, index: int, text: str, told: Any, reason: str | None = None) -> dict[str, Any]:
        logprobs = text_logprobs(self.tokenizer, told, self._sent.get(index, 0)) if told else None
        if logprobs:
            self._sent[index] = self._sent.get(index, 0) + sum(map(len, logprobs["tokens"]))
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def first(self, index: int) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def piece(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Text."""
        self._told[index] = self._told.get(index, 0) + len(piece.told)
        return [self._choice(index, piece, piece.told)]

    def last(self, index: int, answer: Generation) -> list[dict[str, Any]]:
        """The reason, with what was not told yet."""
        return [self._choice(index, "", answer.told[self._told.get(index, 0) :], answer.finish_reason)]


async def _waiting(pieces: Pieces, seconds: float) -> AsyncGenerator[tuple[int, Any] | None, None]:
    """`pieces`, and None whenever nothing came for so long. Leaving it ends them."""
    task = asyncio.ensure_future(anext(pieces))
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=seconds)
            if not done:
                yield None
                continue
            try:
                item = task.result()
            except StopAsyncIteration:
                return
            yield item
            task = asyncio.ensure_future(anext(pieces))
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(task, return_exceptions=True)  # raised again, its error would lose its place
        await pieces.aclose()


async def streamed(pieces: Pieces, events: Events, n_rows: int) -> StreamingResponse:
    """The response over what the engine writes; n rows a request. Raises what is wrong with the request."""
    waiting = _waiting(pieces, HEARTBEAT_S)
    # Awaited here: what is wrong with the request is then still an ordinary 4xx.
    head = await anext(waiting)
    return StreamingResponse(
        _said(waiting, head, events, n_rows), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _said(
    waiting: AsyncGenerator[tuple[int, Any] | None, None], head: tuple[int, Any] | None, events: Events, n_rows: int
) -> AsyncIterator[str]:
    answers: dict[int, Generation] = {}
    options = events.body.stream_options
    counts = options is not None and options.include_usage

    def chunks(choices: list[dict[str, Any]]) -> str:
        # OpenAI: where usage is asked for, every event has the field.
        more = {"usage": None} if counts else {}
        return "".join(_event(events.begins | {"choices": [choice]} | more) for choice in choices)

    try:
        if begun := "".join(chunks(events.first(index)) for index in range(n_rows)):
            yield begun
        item = head
        while True:
            if item is None:
                yield HEARTBEAT
            elif isinstance(item[1], Generation):
                answers[item[0]] = item[1]
                yield chunks(events.last(*item))
            elif text := chunks(events.piece(*item)):
                yield text
            if len(answers) == n_rows:
                break
            item = await anext(waiting)
        if counts:
            used = usage([answers[index] for index in sorted(answers)], events.body.n or 1)
            yield _event(events.begins | {"choices": [], "usage": used})
        yield "data: [DONE]\n\n"
    except Exception as error:
        said = {ClosedError: "the server is stopping", DeadlineError: "the time for this request is over"}
        text = said.get(type(error), "the server failed on this request; its log says more")
        # The message may hold a part of the request.
        where = "" if type(error) in said else "\n" + "".join(traceback.format_tb(error.__traceback__))
        log.error("a stream ended early: %s%s", type(error).__name__, where)
        kind = "timeout_error" if isinstance(error, DeadlineError) else "server_error"
        yield _event({"error": {"message": text, "type": kind, "param": None}})
    finally:
        await waiting.aclose()
