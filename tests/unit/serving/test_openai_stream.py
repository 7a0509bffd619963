"""Streams say that they live while nothing comes, end what they leave, and tell of a failure as their last event."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from ingot.model.sampling import Generation, Piece
from ingot.serving import openai_stream
from ingot.serving.engine import ClosedError, DeadlineError
from ingot.serving.openai_schemas import CompletionRequest
from ingot.serving.openai_stream import HEARTBEAT, TextEvents, streamed

DONE = Generation("ab", [1, 2], 3, "stop")


def _events() -> TextEvents:
    return TextEvents({"id": "x"}, CompletionRequest(prompt="p", stream=True), None)


async def _read(pieces: AsyncGenerator[tuple[int, Any], None], most: int = 99) -> list[str]:
    response, found = await streamed(pieces, _events(), 1), []
    async for chunk in response.body_iterator:
        found.append(str(chunk))
        if len(found) == most:
            await response.body_iterator.aclose()  # type: ignore[attr-defined]
            break
    return found


def test_a_slow_answer_has_heartbeats(monkeypatch: Any) -> None:
    monkeypatch.setattr(openai_stream, "HEARTBEAT_S", 0.02)
    go = asyncio.Event()

    async def pieces() -> AsyncGenerator[tuple[int, Any], None]:
        yield 0, Piece("a")
        await asyncio.wait_for(go.wait(), 30)
        yield 0, Piece("b")
        yield 0, DONE

    async def scene() -> list[str]:
        response, found = await streamed(pieces(), _events(), 1), []
        async for chunk in response.body_iterator:
            found.append(str(chunk))
            if found.count(HEARTBEAT) == 2:
                go.set()
        return found

    found = asyncio.run(scene())
    assert found.count(HEARTBEAT) >= 2
    said = [json.loads(chunk[6:])["choices"][0] for chunk in found if chunk.startswith("data: {")]
    assert [one["text"] for one in said] == ["a", "b", ""]
    assert said[-1]["finish_reason"] == "stop" and found[-1] == "data: [DONE]\n\n"


def test_leaving_a_stream_ends_the_work() -> None:
    ended = []

    async def pieces() -> AsyncGenerator[tuple[int, Any], None]:
        try:
            while True:
                yield 0, Piece("a")
                await asyncio.sleep(0.001)
        finally:
            ended.append(True)

    assert len(asyncio.run(_read(pieces(), 3))) == 3
    assert ended == [True]


@pytest.mark.parametrize(
    ("error", "words"),
    [(ClosedError(), "stopping"), (DeadlineError(), "time for this request"), (ValueError("secret"), "failed")],
)
def test_a_failure_is_the_last_event(error: Exception, words: str, caplog: pytest.LogCaptureFixture) -> None:
    async def pieces() -> AsyncGenerator[tuple[int, Any], None]:
        yield 0, Piece("a")
        raise error

    *_, last = asyncio.run(_read(pieces()))
    assert words in json.loads(last[6:])["error"]["message"]
    assert "secret" not in last + caplog.text
    assert type(error).__name__ in caplog.text
    assert ("in pieces" in caplog.text) is isinstance(error, ValueError)  # the others are no defect
