"""Models that answer in passes: whose parameters count, who is waited for, and what is counted."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from ingot.model.runtime import Runtime
from ingot.model.sampling import InputError
from ingot.serving.app import create_app
from ingot.serving.deployments import Deployed, Deployments
from ingot.serving.engine import DeadlineError, Engine, Limits, QueueFullError
from ingot.serving.engines import start_engine
from ingot.serving.metrics import Metrics
from ingot.serving.record import Record, begin

ROW = {"text": "short"}
SOURCE = {"input_string": "word " * 8}


@pytest.fixture
def beside(mean_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Two passes side by side, and room for three requests that wait."""
    monkeypatch.setattr("ingot.serving.passes.torch.get_num_threads", lambda: 2)
    engine = start_engine(Runtime.load(mean_folder), Limits(waiting_requests=3))
    assert engine.wait_ready(60)
    yield engine
    engine.close()


@pytest.fixture
def writer(folder_of: Callable[[str], Path]) -> Iterator[Engine]:
    """A T5 that never ends by itself."""
    runtime = Runtime.load(folder_of("summarization"))
    runtime.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    engine = start_engine(runtime, Limits(waiting_tokens=10**7))
    assert engine.wait_ready(60)
    yield engine
    engine.close()


class Held:
    """Passes that wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, answer = threading.Event(), Runtime.answer

        def slow(runtime: Runtime, rows: Any, *more: Any) -> Any:
            assert self.go.wait(20)
            return answer(runtime, rows, *more)

        monkeypatch.setattr(Runtime, "answer", slow)

    async def fill(self, engine: Engine, passes: int = 2) -> list[asyncio.Future[Any]]:
        """Begin so many."""
        asked = []
        for running in range(1, passes + 1):
            asked.append(asyncio.ensure_future(engine.answer([ROW], {})))
            while engine.load().running < running:
                await asyncio.sleep(0.01)
        return asked


def _run(scene: Any) -> Any:
    return asyncio.run(asyncio.wait_for(scene, 60))


def test_who_cannot_begin_yet_wakes_no_thread(beside: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = beside
    held, woken, notify = Held(monkeypatch), list[int](), engine._changed.notify
    monkeypatch.setattr(engine._changed, "notify", lambda n=1: (woken.append(n), notify(n)))

    async def scene() -> None:
        asked = await held.fill(engine)
        assert len(woken) == 2
        asked += [asyncio.ensure_future(engine.answer([ROW], {})) for _ in range(3)]
        await asyncio.sleep(0)
        assert engine.load().queue == 3
        assert len(woken) == 2
        held.go.set()
        assert all(found[0]["label"] for found in await asyncio.gather(*asked))

    _run(scene())


def test_a_wrong_parameter_fails_its_own_request_only(beside: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)

    async def scene() -> None:
        asked = await held.fill(beside)
        with pytest.raises(InputError, match="top_k"):  # before it waits: True is equal to 1
            await beside.answer([ROW], {"top_k": True})
        asked += [asyncio.ensure_future(beside.answer([ROW], {"top_k": 1})) for _ in range(3)]
        held.go.set()
        assert [len(found) for found in await asyncio.gather(*asked)] == [1] * 5

    _run(scene())


def test_who_has_left_takes_no_room(beside: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)

    async def scene() -> None:
        asked = await held.fill(beside)
        waiting = [asyncio.ensure_future(beside.answer([ROW], {})) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await beside.answer([ROW], {})
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert (beside.load().queue, beside.load().waiting_tokens) == (0, 0)
        asked.append(asyncio.ensure_future(beside.answer([ROW], {})))
        held.go.set()
        assert all(found[0]["label"] for found in await asyncio.gather(*asked))

    _run(scene())


@pytest.mark.parametrize("way", ["deadline", "left", "closed"])
def test_what_nobody_waits_for_is_not_written_to_its_end(writer: Engine, way: str) -> None:
    async def scene() -> None:
        # 100,000 tokens would take minutes.
        deadline = 0.3 if way == "deadline" else None
        long = asyncio.ensure_future(writer.answer([SOURCE], {"max_tokens": 100_000}, deadline=deadline))
        while not writer.load().running:
            await asyncio.sleep(0.01)
        if way == "deadline":
            with pytest.raises(DeadlineError):
                await long
        elif way == "left":
            long.cancel()
        else:
            await asyncio.to_thread(writer.close, 20.0)
            assert not writer.load().running or not writer._thread.is_alive()  # type: ignore[attr-defined]
            await asyncio.gather(long, return_exceptions=True)
            return
        assert len(await writer.answer([SOURCE], {"max_tokens": 2})) == 1

    _run(scene())


def test_what_is_written_counts_while_it_waits_and_afterwards(folder_of: Callable[[str], Path]) -> None:
    metrics, record = Metrics(), Record()
    engine = start_engine(Runtime.load(folder_of("summarization")), Limits(waiting_tokens=500), metrics.of("tiny"))

    async def scene() -> None:
        begin(record)
        assert await engine.answer([SOURCE], {"max_tokens": 400})

    try:
        assert engine.wait_ready(60)
        with pytest.raises(InputError, match="tokens in all; 500 may wait here"):
            _run(engine.answer([SOURCE], {"max_tokens": 600}))
        _run(scene())
        page = metrics.page().decode()
        assert record.prompt_tokens > 5
        assert f'ingot_prompt_tokens_total{{model="tiny"}} {float(record.prompt_tokens)}' in page
        assert f'ingot_generated_tokens_total{{model="tiny"}} {float(record.new_tokens)}' in page
        assert record.new_tokens
    finally:
        engine.close()


def test_embeddings_count_what_the_model_reads(folder_of: Callable[[str], Path]) -> None:
    whole = Runtime.load(folder_of("embeddings"))
    engine = start_engine(Runtime(whole.model, whole.tokenizer, whole.about | {"max_tokens": 8}))
    with TestClient(create_app(Deployments(Deployed("tiny", engine)))) as client:
        found = client.post("/v1/embeddings", json={"input": ["word " * 40, "one"]}).json()
    assert found["usage"]["prompt_tokens"] == sum(
        map(len, engine.runtime.answering.text_ids(["word " * 40, "one"], ""))
    )
    assert found["usage"]["prompt_tokens"] < 16
