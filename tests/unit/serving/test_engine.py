"""The worker: one job at a time, a stream that ends when nobody listens, and a clean end."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingot.model.runtime import Runtime
from ingot.serving.engine import ClosedError, Engine


@pytest.fixture
def engine(text_folder: Path) -> Iterator[Engine]:
    engine = Engine(Runtime.load(text_folder))
    yield engine
    engine.close()


def test_jobs_never_overlap(engine: Engine) -> None:
    inside, most = 0, 0

    def job(_: Runtime) -> str:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        inside -= 1
        return threading.current_thread().name

    async def scene() -> list[str]:
        return await asyncio.gather(*(engine.run(job) for _ in range(8)))

    assert set(asyncio.run(scene())) == {"ingot-engine"}
    assert most == 1


def test_an_error_reaches_its_caller_and_nobody_else(engine: Engine) -> None:
    def fail(_: Runtime) -> None:
        raise ValueError("mine")

    async def scene() -> str:
        with pytest.raises(ValueError, match="mine"):
            await engine.run(fail)
        return await engine.run(lambda runtime: runtime.task)

    assert asyncio.run(scene()) == "text-generation"


def test_a_stream_that_nobody_reads_stops_the_work(engine: Engine) -> None:
    written = 0

    def endless(_: Runtime) -> Iterator[Any]:
        nonlocal written
        while True:
            written += 1
            yield "x"
            time.sleep(0.005)

    async def scene() -> None:
        pieces = engine.stream(endless)
        assert await anext(pieces) == "x"
        await pieces.aclose()
        assert await engine.run(lambda _: "free again") == "free again"

    asyncio.run(asyncio.wait_for(scene(), 20))
    after = written
    time.sleep(0.05)
    assert written == after


def test_an_error_within_a_stream_reaches_the_reader(engine: Engine) -> None:
    def breaks(_: Runtime) -> Iterator[Any]:
        yield "x"
        raise ValueError("halfway")

    async def scene() -> None:
        pieces = engine.stream(breaks)
        assert await anext(pieces) == "x"
        with pytest.raises(ValueError, match="halfway"):
            await anext(pieces)

    asyncio.run(scene())


def test_closing_ends_a_stream_and_refuses_what_comes(engine: Engine) -> None:
    def endless(_: Runtime) -> Iterator[Any]:
        while True:
            yield "x"
            time.sleep(0.005)

    async def scene() -> None:
        pieces = engine.stream(endless)
        await anext(pieces)
        waiting = asyncio.create_task(engine.run(lambda _: "never"))
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.close)
        with pytest.raises(ClosedError):
            async for _ in pieces:
                pass
        with pytest.raises(ClosedError):
            await waiting
        with pytest.raises(ClosedError):
            await engine.run(lambda _: "late")

    asyncio.run(asyncio.wait_for(scene(), 20))
    assert not engine.ready
