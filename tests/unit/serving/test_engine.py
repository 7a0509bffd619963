"""What both engines promise: one worker, errors that stay with their caller, work that ends when nobody waits."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ingot.model import answers
from ingot.model.runtime import Runtime
from ingot.model.sampling import Generation, InputError, Sampling
from ingot.serving import continuous, worker
from ingot.serving.engine import ClosedError, DeadlineError, Engine, Limits, QueueFullError
from ingot.serving.engines import start_engine
from ingot.serving.record import Record, begin

PROMPT = [5, 6, 7]


@pytest.fixture(params=["text_folder", "mean_folder"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = start_engine(Runtime.load(request.getfixturevalue(request.param)), Limits(waiting_requests=3))
    assert engine.wait_ready(60)
    yield engine
    engine.close()


@pytest.fixture
def writer(text_folder: Path) -> Iterator[Engine]:
    engine = start_engine(Runtime.load(text_folder))
    assert engine.wait_ready(60)
    yield engine
    engine.close()


def _steps(engine: Engine, monkeypatch: pytest.MonkeyPatch, pause_s: float = 0.0) -> list[tuple[int, int]]:
    """Rows and tokens of each pass of the model, from now on."""
    seen: list[tuple[int, int]] = []
    model: Any = engine.runtime.model
    forward = model.forward

    def spy(*args: Any, **inputs: Any) -> Any:
        seen.append(tuple(inputs["input_ids"].shape))  # type: ignore[arg-type]
        time.sleep(pause_s)
        return forward(*args, **inputs)

    monkeypatch.setattr(model, "forward", spy)
    return seen


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
        return await asyncio.gather(*(engine.run(job) for _ in range(3)))

    assert set(asyncio.run(scene())) == {"ingot-engine"}
    assert most == 1


def test_an_error_reaches_its_caller_and_nobody_else(engine: Engine) -> None:
    def fail(_: Runtime) -> None:
        raise ValueError("mine")

    async def scene() -> str:
        with pytest.raises(ValueError, match="mine"):
            await engine.run(fail)
        return await engine.run(lambda runtime: runtime.task)

    assert asyncio.run(scene()) == engine.runtime.task


def test_a_full_queue_says_why_and_when(engine: Engine) -> None:
    go = threading.Event()

    async def scene() -> None:
        first = asyncio.create_task(engine.run(lambda _: go.wait(30)))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(engine.run(lambda _: None)) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFullError) as full:
            await engine.run(lambda _: None)
        assert full.value.cause == "requests"
        assert 1 <= full.value.retry_after_s <= 60
        go.set()
        await asyncio.gather(first, *waiting)
        await engine.run(lambda _: None)

    asyncio.run(asyncio.wait_for(scene(), 30))


def test_who_leaves_the_queue_is_never_worked_on(engine: Engine) -> None:
    go, done = threading.Event(), []

    async def scene() -> None:
        first = asyncio.create_task(engine.run(lambda _: go.wait(30)))
        await asyncio.sleep(0.05)
        gone = asyncio.create_task(engine.run(lambda _: done.append("gone")))
        late = asyncio.create_task(engine.run(lambda _: done.append("late"), deadline=0.05))
        await asyncio.sleep(0.02)
        gone.cancel()
        with pytest.raises(DeadlineError):
            await late
        go.set()
        await first
        await engine.run(lambda _: done.append("kept"))

    asyncio.run(asyncio.wait_for(scene(), 30))
    assert done == ["kept"]


def test_closing_refuses_what_waits_and_what_comes(engine: Engine) -> None:
    go = threading.Event()

    async def scene() -> None:
        first = asyncio.create_task(engine.run(lambda _: go.wait(30)))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(engine.run(lambda _: "never"))
        await asyncio.sleep(0.02)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        with pytest.raises(ClosedError):
            await waiting
        with pytest.raises(ClosedError):
            await engine.run(lambda _: "late")
        assert not engine.ready
        go.set()
        await first
        await closing

    asyncio.run(asyncio.wait_for(scene(), 30))


def test_a_model_that_does_not_answer_is_never_ready(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(**_: Any) -> None:
        raise ZeroDivisionError("why it does not")

    runtime = Runtime.load(text_folder)
    monkeypatch.setattr(runtime.model, "forward", broken)
    engine = start_engine(runtime)
    assert not engine.wait_ready(60)
    engine.close()
    assert "in broken" in caplog.text
    assert "ZeroDivisionError: why it does not" in caplog.text


def test_an_engine_that_failed_is_ready_once_it_answers_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "AGAIN_S", 0.01)

    async def ask() -> Any:
        writes = engine.runtime.task == "text-generation"
        return await (engine.write([PROMPT], [Sampling(2)]) if writes else engine.answer([{"text": "a"}], {}))

    async def scene() -> None:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await ask()

    with monkeypatch.context() as patch:
        patch.setattr(engine.runtime.model, "forward", lambda *_, **__: 1 / 0)
        asyncio.run(scene())
        time.sleep(0.3)
        assert not engine.ready
    until = time.monotonic() + 30
    while not engine.ready and time.monotonic() < until:
        time.sleep(0.02)
    assert engine.ready
    assert asyncio.run(ask())


def test_a_defect_of_the_engine_fails_who_waits_and_is_got_over(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "AGAIN_S", 0.01)
    writes = engine.runtime.task == "text-generation"
    go = threading.Event()

    async def ask() -> Any:
        return await (engine.write([PROMPT], [Sampling(2)]) if writes else engine.answer([{"text": "a"}], {}))

    async def scene() -> list[Any]:
        first = asyncio.create_task(engine.run(lambda _: go.wait(30)))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(ask()) for _ in range(2)]
        await asyncio.sleep(0.05)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_entering" if writes else "_next", lambda: {}["the secret"])
            go.set()
            found = await asyncio.gather(*waiting, return_exceptions=True)
        await first
        return found

    assert [type(one) for one in asyncio.run(asyncio.wait_for(scene(), 30))] == [KeyError, KeyError]
    assert "a defect of the engine: KeyError" in caplog.text
    until = time.monotonic() + 30
    while not engine.ready and time.monotonic() < until:
        time.sleep(0.02)
    assert engine.ready
    assert asyncio.run(ask())


def test_an_engine_that_hangs_is_not_ready(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "STUCK_S", 0.5)
    time.sleep(0.7)
    assert engine.ready  # there was nothing to do
    go = threading.Event()

    async def scene() -> None:
        hanging = asyncio.create_task(engine.run(lambda _: go.wait(30)))
        await asyncio.sleep(0.7)
        assert not engine.ready
        go.set()
        await hanging
        await engine.run(lambda _: None)
        assert engine.ready

    asyncio.run(asyncio.wait_for(scene(), 30))


def test_preparing_is_bounded_in_number_and_time(engine: Engine) -> None:
    go = threading.Event()

    async def scene() -> None:
        begin(Record(until=time.monotonic() + 0.2))
        waiting = [asyncio.create_task(engine.prepare(lambda _: go.wait(30))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await engine.prepare(lambda _: None)
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(one) for one in found} == {DeadlineError}
        go.set()
        begin(Record())
        assert await engine.prepare(lambda runtime: runtime.task) == engine.runtime.task

    asyncio.run(asyncio.wait_for(scene(), 30))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_rows_of_several_requests_share_the_passes(writer: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[5 + n, 6, 7][: 1 + n % 3] for n in range(6)]
    wanted = [writer.runtime.generate([prompt], max_new_tokens=12)[0] for prompt in prompts]
    seen = _steps(writer, monkeypatch)

    async def scene() -> list[list[Generation]]:
        return await asyncio.gather(*(writer.write([prompt], [Sampling(12)]) for prompt in prompts))

    assert [one for [one] in asyncio.run(scene())] == wanted
    assert len(seen) < 12 * 3
    assert max(rows for rows, _ in seen) > 2


def test_memory_is_given_back_once_nothing_runs(writer: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    monkeypatch.setattr(continuous, "give_back", lambda: running.append(writer.load().running))
    for _ in range(2):
        asyncio.run(writer.write([PROMPT, PROMPT], [Sampling(3)] * 2))
        time.sleep(0.5)
    assert running == [0, 0]


def test_a_seeded_answer_does_not_depend_on_who_shares_the_batch(writer: Engine) -> None:
    mine = Sampling(14, temperature=1.0, top_p=0.9, seed=3)
    alone = writer.runtime.generate([PROMPT, PROMPT], **vars(mine))
    assert alone[0].ids != alone[1].ids

    async def scene() -> list[Any]:
        others = [writer.write([[9] * n], [Sampling(5 + n, temperature=2.0, seed=n)]) for n in range(1, 8)]
        return await asyncio.gather(writer.write([PROMPT, PROMPT], [mine, mine]), *others)

    assert asyncio.run(scene())[0] == alone


def test_a_stream_is_the_answer_in_pieces(writer: Engine) -> None:
    samplings = [Sampling(12), Sampling(7, temperature=1.0, seed=1)]
    wanted = asyncio.run(writer.write([PROMPT, [8, 9]], samplings))

    async def scene() -> None:
        pieces: dict[int, list[Any]] = {0: [], 1: []}
        async for index, piece in writer.stream([PROMPT, [8, 9]], samplings):
            pieces[index].append(piece)
        for index, answer in enumerate(wanted):
            assert pieces[index][-1] == answer
            assert "".join(pieces[index][:-1]) == answer.text

    asyncio.run(scene())


@pytest.mark.parametrize("way", ["stream", "write", "deadline", "answer"])
def test_a_row_that_nobody_waits_for_is_stopped(writer: Engine, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _steps(writer, monkeypatch, 0.01)
    long = Sampling(120)

    async def scene() -> None:
        if way == "stream":
            pieces = writer.stream([PROMPT], [long])
            await anext(pieces)
            await pieces.aclose()
        elif way == "deadline":
            with pytest.raises(DeadlineError):
                await writer.write([PROMPT], [long], deadline=0.1)
        else:
            row, params = {"prompt": "a"}, {"max_tokens": 100}
            asked: Any = writer.answer([row], params) if way == "answer" else writer.write([PROMPT], [long])
            task = asyncio.create_task(asked)
            while len(seen) < 3:
                await asyncio.sleep(0.005)
            task.cancel()
        while writer.load().running:
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(scene(), 30))
    assert 0 < len(seen) < 60
    stopped = len(seen)
    time.sleep(0.1)
    assert len(seen) == stopped


def test_what_goes_on_while_others_leave(writer: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = writer.runtime.generate([PROMPT], max_new_tokens=60)[0]
    _steps(writer, monkeypatch, 0.002)

    async def scene() -> Generation:
        task = asyncio.create_task(writer.write([PROMPT], [Sampling(60)]))
        for n in range(4):
            pieces = writer.stream([[9] * (n + 4)], [Sampling(100)])
            await anext(pieces)
            await pieces.aclose()
        return (await task)[0]

    assert asyncio.run(scene()) == kept


def test_tokens_are_limited(text_folder: Path) -> None:
    engine = start_engine(Runtime.load(text_folder), Limits(waiting_tokens=100, cache_tokens=60))

    async def scene() -> None:
        with pytest.raises(InputError, match="3 prompt tokens \\+ 58 new tokens: this server holds 60"):
            await engine.write([PROMPT], [Sampling(58)])
        with pytest.raises(InputError, match="126 tokens in all; 100 may wait"):
            await engine.write([PROMPT] * 3, [Sampling(39)] * 3)
        go = threading.Event()
        first = asyncio.create_task(engine.run(lambda _: go.wait(30)))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(engine.write([PROMPT] * 2, [Sampling(40)] * 2))
        await asyncio.sleep(0.02)
        with pytest.raises(QueueFullError) as full:
            await engine.write([PROMPT], [Sampling(40)])
        assert full.value.cause == "tokens"
        go.set()
        await first
        assert [len(one.ids) for one in await second] == [40, 40]

    assert engine.wait_ready(60)
    asyncio.run(asyncio.wait_for(scene(), 30))
    engine.close()


def test_keys_and_values_stay_within_their_limit(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start_engine(Runtime.load(text_folder), Limits(cache_tokens=60))
    assert engine.wait_ready(60)
    seen = _steps(engine, monkeypatch)

    async def scene() -> list[Any]:
        return await asyncio.gather(*(engine.write([PROMPT], [Sampling(17)]) for _ in range(8)))

    assert {len(answer.ids) for [answer] in asyncio.run(scene())} == {17}
    assert max(rows for rows, _ in seen) == 3
    engine.close()


def test_a_failing_pass_ends_its_rows_and_not_the_engine(writer: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(writer.runtime.model, "forward", lambda **_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await writer.write([PROMPT], [Sampling(5)])
        assert len((await writer.write([PROMPT], [Sampling(5)]))[0].ids) == 5

    asyncio.run(scene())


@pytest.mark.parametrize("drain_s", [0.0, 20.0])
def test_closing_lets_what_runs_end_in_its_time(
    writer: Engine, drain_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    _steps(writer, monkeypatch, 0.01)

    async def scene() -> None:
        pieces = writer.stream([PROMPT], [Sampling(40)])
        await anext(pieces)
        closing = asyncio.create_task(asyncio.to_thread(writer.close, drain_s=drain_s))
        if drain_s:
            assert [len(one.ids) async for _, one in pieces if isinstance(one, Generation)] == [40]
        else:
            with pytest.raises(ClosedError):
                async for _ in pieces:
                    pass
        await closing

    asyncio.run(asyncio.wait_for(scene(), 30))


# --- rows answered together ------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of `Runtime.answer`."""
    seen: list[int] = []
    answer = Runtime.answer

    def spy(self: Runtime, rows: Any, *more: Any) -> Any:
        seen.append(len(rows))
        return answer(self, rows, *more)

    monkeypatch.setattr(Runtime, "answer", spy)
    return seen


@pytest.fixture
def labeller(mean_folder: Path) -> Iterator[Engine]:
    engine = start_engine(Runtime.load(mean_folder), Limits(batch_tokens=64))
    assert engine.wait_ready(60)
    yield engine
    engine.close()


def test_rows_of_several_requests_are_answered_together(labeller: Engine, calls: list[int]) -> None:
    texts = [f"text {n}" for n in range(12)]
    wanted = [labeller.runtime.answer([{"text": text}])[0]["label"] for text in texts]
    calls.clear()

    async def scene() -> list[Any]:
        await asyncio.gather(*(labeller.answer([{"text": text}], {}) for text in texts))
        return await asyncio.gather(*(labeller.answer([{"text": text}], {"seed": None}) for text in texts))

    assert [answer["label"] for [answer] in asyncio.run(scene())] == wanted
    assert len(calls) < 12
    assert sum(calls) == 24


def test_a_bad_row_fails_its_own_request_only(labeller: Engine) -> None:
    async def scene() -> list[Any]:
        rows: list[dict[str, Any]] = [{"text": "a"}, {"text": 3}, {"text": "b"}, {"wrong": "c"}]
        return await asyncio.gather(*(labeller.answer([row], {}) for row in rows), return_exceptions=True)

    good, bad, also, wrong = asyncio.run(scene())
    assert good[0]["label"]
    assert also[0]["label"]
    assert isinstance(bad, InputError)
    assert isinstance(wrong, InputError)


def test_a_long_request_is_answered_in_parts_that_stop_at_its_deadline(labeller: Engine, calls: list[int]) -> None:
    rows = [{"text": "word " * 20}] * 40
    found = asyncio.run(labeller.answer(rows, {}))
    assert len(found) == 40
    assert max(calls) <= 2
    calls.clear()

    async def scene() -> None:
        with pytest.raises(DeadlineError):
            await labeller.answer(rows * 50, {}, deadline=0.05)
        await labeller.answer([{"text": "next"}], {})

    asyncio.run(asyncio.wait_for(scene(), 30))
    assert sum(calls) < 1000


@pytest.mark.parametrize("task", ["text-generation", "chat-completion", "summarization"])
def test_no_answer_is_longer_than_the_server_writes(
    folder_of: Callable[[str], Path], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"input_string": "Hello there, how are you?"}
    engine = start_engine(Runtime.load(folder_of(task)), Limits(answer_tokens=3))
    longest: list[int] = []
    write = answers.write

    def spy(model: Any, tokenizer: Any, sources: Any, new: int, *more: Any, **named: Any) -> list[str]:
        longest.append(new)
        return write(model, tokenizer, sources, new, *more, **named)

    monkeypatch.setattr(answers, "write", spy)
    try:
        assert engine.wait_ready(60)
        longest.clear()

        def ask(**params: Any) -> list[dict[str, Any]]:
            return asyncio.run(engine.answer([row], params))

        # Who names no number gets what there is, and not an error about the model's own number.
        assert ask() == ask(max_tokens=3)
        if task == "summarization":  # the tiny model has nothing to say
            assert longest == [3, 3]
        else:
            assert ask() != Runtime.load(folder_of(task)).answer([row], {})
        with pytest.raises(InputError, match="4 new tokens: this server writes 3 at most"):
            ask(max_tokens=4)
        with pytest.raises(InputError, match="max_tokens"):
            ask(max_tokens="many")
    finally:
        engine.close()


@pytest.fixture
def grouping(mean_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Two passes side by side where rows differ by more than 8 tokens."""
    monkeypatch.setattr("ingot.serving.passes.torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("ingot.serving.passes.pass_tokens", lambda _device: 8)
    monkeypatch.setattr("ingot.serving.passes.unpad", lambda _model: False)
    runtime = Runtime.load(mean_folder)
    engine = start_engine(Runtime(runtime.model, runtime.tokenizer, runtime.about | {"max_tokens": 100}))
    assert engine.wait_ready(60)
    yield engine
    engine.close()


def test_groups_of_rows_run_side_by_side(grouping: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": text} for text in ("short", "word " * 20, "brief", "word " * 200)]  # the last one is cut
    answer, both = Runtime.answer, threading.Barrier(2, timeout=20)
    wanted = [grouping.runtime.answer([row])[0] for row in rows]

    def meeting(self: Runtime, rows: Any, *more: Any) -> Any:
        both.wait()
        return answer(self, rows, *more)

    monkeypatch.setattr(Runtime, "answer", meeting)
    asyncio.run(grouping.answer(rows[:2], {}))
    monkeypatch.setattr(Runtime, "answer", answer)
    for _ in range(5):
        found = asyncio.run(grouping.answer(rows, {}))
        assert [row["label"] for row in found] == [row["label"] for row in wanted]
        assert [row["probability"] for row in found] == pytest.approx([row["probability"] for row in wanted])


def test_a_group_that_is_done_does_not_wait_for_the_others(grouping: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    released, answer = threading.Event(), Runtime.answer

    def slow(self: Runtime, rows: Any, *more: Any) -> Any:
        assert rows[0]["text"] != "short" or released.wait(20)
        return answer(self, rows, *more)

    async def scene() -> None:
        hold = asyncio.ensure_future(grouping.run(lambda _: time.sleep(0.5)))  # so that both wait for the same turn
        short = asyncio.ensure_future(grouping.answer([{"text": "short"}], {}))
        await grouping.answer([{"text": "word " * 20}], {})
        assert not short.done()
        released.set()
        assert (await short)[0]["label"]
        await hold

    monkeypatch.setattr(Runtime, "answer", slow)
    asyncio.run(asyncio.wait_for(scene(), 30))
