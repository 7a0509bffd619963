"""The engine over vLLM, whose place a stand-in takes: the answers of our own engine, its limits, and how work ends."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from peft import LoraConfig, get_peft_model
from tests.unit.serving.stand_in_vllm import AsyncLLM, install

from ingot.errors import MissingPackage, ModelError, ServeError
from ingot.model.adapters import with_saved_adapter
from ingot.model.runtime import Runtime
from ingot.model.sampling import Generation, InputError, Sampling
from ingot.model.unweighted import without_weights
from ingot.serving import vllm_engine, worker
from ingot.serving.app import create_app
from ingot.serving.engine import ClosedError, DeadlineError, Limits, Meter, QueueFullError
from ingot.serving.engines import by_vllm, start_engine
from ingot.serving.fleet import Fleet, Target, deploy
from ingot.serving.record import Record, begin
from ingot.serving.vllm_engine import VllmEngine
from ingot.serving.vllm_model import Vllm

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [30]]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Heard(Meter):
    """What an engine told."""

    def __init__(self) -> None:
        self.prompts, self.new, self.firsts, self.betweens = 0, 0, 0, 0
        self.causes: list[str] = []

    def entered(self, prompt_tokens: int) -> None:
        self.prompts += prompt_tokens

    def first(self, seconds: float) -> None:
        self.firsts += 1

    def between(self, seconds: float, rows: int) -> None:
        self.betweens += rows

    def written(self, tokens: int) -> None:
        self.new += tokens

    def refused(self, cause: str) -> None:
        self.causes.append(cause)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> type[AsyncLLM]:
    return install(monkeypatch)


Start = Callable[..., tuple[VllmEngine, AsyncLLM]]


@pytest.fixture
def start(made: type[AsyncLLM], text_folder: Path) -> Iterator[Start]:
    """start(**limits) -> an engine that has answered, and the stand-in behind it, which has forgotten that."""
    engines: list[VllmEngine] = []

    def starts(meter: Meter | None = None, **limits: Any) -> tuple[VllmEngine, AsyncLLM]:
        runtime, known = without_weights(text_folder), Limits(**limits)
        engines.append(VllmEngine(runtime, Vllm(text_folder, runtime, known, {}, 0.9), known, meter))
        assert engines[-1].wait_ready(60)
        made.made[-1].asked.clear()
        return engines[-1], made.made[-1]

    yield starts
    for engine in engines:
        engine.close()


def _same(ours: Generation, theirs: Generation) -> None:
    assert (ours.ids, ours.text, ours.finish_reason) == (theirs.ids, theirs.text, theirs.finish_reason)
    assert [one.token for one in ours.told] == [one.token for one in theirs.told]
    for one, other in zip(ours.told, theirs.told, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"top_logprobs": 3},
        {"top_logprobs": 0},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": ((40, 60.0), (40, 40.0))},
    ],
)
def test_it_answers_as_our_own_engine(start: Start, text_folder: Path, more: dict[str, Any]) -> None:
    engine, _ = start()
    own = start_engine(Runtime.load(text_folder))
    free = Runtime.load(text_folder).generate(PROMPTS[:1], max_new_tokens=12, **more)[0].text
    for stop in ((), (free[4:6],)):
        samplings = [Sampling(12, stop=stop, **more)] * len(PROMPTS)
        wanted = asyncio.run(own.write(PROMPTS, samplings))
        for ours, theirs in zip(wanted, asyncio.run(engine.write(PROMPTS, samplings)), strict=True):
            _same(ours, theirs)
        streamed = asyncio.run(_streamed(engine, PROMPTS, samplings))
        for place, (ours, theirs) in enumerate(zip(wanted, streamed, strict=True)):
            _same(ours, theirs[1])
            assert theirs[0] == ours.text, place
    own.close()


async def _streamed(engine: Any, prompts: Any, samplings: Any) -> list[tuple[str, Generation]]:
    """Pieces joined, and the answer, of each row."""
    texts, answers = [""] * len(prompts), dict[int, Generation]()
    async for index, item in engine.stream(prompts, samplings):
        if isinstance(item, Generation):
            answers[index] = item
        else:
            texts[index] += item
    return [(texts[index], answers[index]) for index in range(len(prompts))]


# Each field of Sampling -> a value that is not its default, and where vLLM's parameters have it.
GIVEN: dict[str, tuple[Any, str, Any]] = {
    "max_new_tokens": (3, "max_tokens", 3),
    "temperature": (0.5, "temperature", 0.5),
    "top_p": (0.5, "top_p", 0.5),
    "top_k": (7, "top_k", 7),
    "min_p": (0.1, "min_p", 0.1),
    "presence_penalty": (0.5, "presence_penalty", 0.5),
    "frequency_penalty": (0.5, "frequency_penalty", 0.5),
    "repetition_penalty": (1.5, "repetition_penalty", 1.5),
    "logit_bias": (((4, 1.5), (4, 2.0)), "logit_bias", {4: 3.5}),
    "top_logprobs": (2, "logprobs", 2),
}
ELSEWHERE = {"stop", "seed", "guide"}  # have tests of their own here


def test_every_field_arrives(start: Start) -> None:
    assert {one.name for one in fields(Sampling)} == GIVEN.keys() | ELSEWHERE
    engine, llm = start()
    for name, (value, theirs, arrives) in GIVEN.items():
        llm.asked.clear()
        asyncio.run(engine.write([[5]], [Sampling(**{"max_new_tokens": 2} | {name: value})]))
        [asked] = llm.asked.values()
        assert getattr(asked.params, theirs) == arrives
        ends = engine.runtime.tokenizer.eos_token_id
        assert asked.params.stop_token_ids is not None and ends in asked.params.stop_token_ids


@pytest.mark.parametrize("heat", [0.005, 2.5])
def test_temperatures_that_it_would_change_are_refused(start: Start, heat: float) -> None:
    engine, llm = start()
    with pytest.raises(InputError, match=r"takes 0, or 0\.01 to 2") as caught:
        asyncio.run(engine.write([[5]], [Sampling(2, temperature=heat)]))
    assert caught.value.field == "temperature" and not llm.asked


def test_rows_of_one_seed_differ_and_come_again(start: Start) -> None:
    engine, _ = start()
    hot = Sampling(16, temperature=1.5, seed=-1)  # vLLM takes this seed for none
    twice = [[it.ids for it in asyncio.run(engine.write([[5]] * 2, [hot] * 2))] for _ in range(2)]
    assert twice[0] == twice[1] and twice[0][0] != twice[0][1]


def _wait(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_who_leaves_a_stream_ends_the_work(start: Start) -> None:
    meter = Heard()
    engine, llm = start(meter)
    llm.pause_s, record = 0.02, Record()

    async def leave() -> None:
        begin(record)
        stream = engine.stream([[5], [6]], [Sampling(100)] * 2)
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    _wait(lambda: len(llm.aborted) == 2 and not llm.running)
    assert meter.causes == ["left"] and engine.load().running == 0
    assert 0 < record.new_tokens < 50 and record.prompt_tokens in (1, 2)


def test_a_deadline_ends_the_work(start: Start) -> None:
    meter = Heard()
    engine, llm = start(meter)
    llm.pause_s = 0.02
    with pytest.raises(DeadlineError):
        asyncio.run(engine.write([[5]], [Sampling(100)], deadline=0.2))
    _wait(lambda: len(llm.aborted) == 1 and not llm.running)
    assert meter.causes == ["deadline"]


def test_a_stop_string_ends_the_work(start: Start, text_folder: Path) -> None:
    engine, llm = start()
    llm.pause_s = 0.01
    [free] = Runtime.load(text_folder).generate([[5]], max_new_tokens=6)
    asyncio.run(engine.write([[5]], [Sampling(100, stop=(free.text[2:4],))]))
    _wait(lambda: len(llm.aborted) == 1 and not llm.running)


def test_the_queue_is_bounded(start: Start) -> None:
    meter = Heard()
    engine, llm = start(meter, rows=2, waiting_requests=1, waiting_tokens=100, cache_tokens=60, answer_tokens=50)
    assert llm.args.max_num_seqs == 2
    llm.pause_s = 0.02

    async def crowd() -> list[Any]:
        first = asyncio.create_task(engine.write([[5], [6]], [Sampling(20)] * 2))
        while engine.load().running < 2:
            await asyncio.sleep(0.01)
        second = asyncio.create_task(engine.write([[7]], [Sampling(20)]))
        await asyncio.sleep(0.05)
        assert engine.load().queue == 1 and engine.load().tokens > 2
        with pytest.raises(QueueFullError) as full:
            await engine.write([[8]], [Sampling(20)])
        assert full.value.cause == "requests"
        return [*await first, *await second]

    assert len(asyncio.run(crowd())) == 3
    assert llm.most_running == 2 and meter.causes == ["requests"]
    for new, says in ((51, "this server writes 50"), (60, "writes 50")):
        with pytest.raises(InputError, match=says):
            asyncio.run(engine.write([[5]], [Sampling(new)]))
    with pytest.raises(InputError, match="this server holds 60"):
        asyncio.run(engine.write([[5] * 20], [Sampling(50)]))


def test_rows_wait_where_they_could_reach_more_than_is_held(start: Start) -> None:
    engine, llm = start(cache_tokens=30)
    asyncio.run(engine.write([[5], [6], [7]], [Sampling(13)] * 3))  # 14 tokens each
    assert llm.most_running == 2


def test_what_is_measured(start: Start) -> None:
    meter, record = Heard(), Record()
    engine, _ = start(meter)

    async def ask() -> list[Generation]:
        begin(record)
        return await engine.write([[5, 6]], [Sampling(9)])

    [answer] = asyncio.run(ask())
    assert (meter.prompts, meter.new, meter.firsts) == (2, len(answer.ids), 1) and meter.betweens > 1
    assert (record.prompt_tokens, record.new_tokens) == (2, len(answer.ids))


def test_what_runs_may_end_and_what_waits_is_refused(start: Start) -> None:
    engine, llm = start(rows=1)
    llm.pause_s = 0.01

    async def scene() -> None:
        running = asyncio.create_task(engine.write([[5]], [Sampling(20)]))
        while not engine.load().running:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(engine.write([[6]], [Sampling(20)]))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.close, drain_s=30.0)
        assert len((await running)[0].ids) == 20
        with pytest.raises(ClosedError):
            await waiting
        with pytest.raises(ClosedError):
            await engine.write([[6]], [Sampling(20)])

    asyncio.run(scene())
    assert llm.shut == 1
    engine.close()  # as the application does once more
    assert llm.shut == 1


def test_a_dead_vllm_is_not_ready_and_may_recover(start: Start) -> None:
    engine, llm = start()
    llm.failure = RuntimeError("EngineDeadError")
    for _ in range(worker.FAILURES):
        with pytest.raises(RuntimeError):
            asyncio.run(engine.write([[5]], [Sampling(2)]))
    assert not engine.ready
    llm.failure = None
    _wait(lambda: engine.ready)
    llm.failure = ValueError("a part of the prompt")  # a request that vLLM does not take
    for _ in range(worker.FAILURES + 1):
        with pytest.raises(InputError, match="does not take this request"):
            asyncio.run(engine.write([[5]], [Sampling(2)]))
    assert engine.ready


def test_a_silent_vllm_fails_what_waits_for_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, llm = start()
    llm.pause_s = 60.0
    monkeypatch.setattr(vllm_engine, "STUCK_S", 0.3)
    with pytest.raises(TimeoutError):
        asyncio.run(engine.write([[5]], [Sampling(2)]))
    assert not engine.ready and not engine.load().running
    llm.pause_s = 0.0
    _wait(lambda: engine.ready)


# --- behind the endpoint ---------------------------------------------------------------------------------------------


def _client(fleet: Fleet) -> TestClient:
    deployments, _ = deploy(fleet, Limits(), lambda name: Meter(), "vllm")
    return TestClient(create_app(deployments))


def test_each_request_gets_its_adapter(made: type[AsyncLLM], text_folder: Path, tmp_path: Path) -> None:
    adapters = {}
    for seed, (name, rank) in enumerate({"letters": 4, "poems": 12}.items()):
        torch.manual_seed(seed)
        model = get_peft_model(
            Runtime.load(text_folder).model, LoraConfig(r=rank, lora_alpha=64, target_modules=["q_proj"])
        )
        for place, parameter in model.named_parameters():
            if "lora_B" in place:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(tmp_path / name)
        adapters[name] = tmp_path / name
    wanted = {}
    for name in ("base", *adapters):
        runtime = Runtime.load(text_folder)
        runtime.model = with_saved_adapter(runtime.model, adapters[name]) if name in adapters else runtime.model
        wanted[name] = runtime.complete("Hello!", max_new_tokens=12).text
    assert len(set(wanted.values())) == 3
    with _client(Fleet((Target(text_folder, "base"),), adapters)) as client:
        [llm] = made.made  # one for all of them
        assert (llm.args.max_loras, llm.args.max_lora_rank, llm.args.gpu_memory_utilization) == (2, 16, 0.9)
        for name, text in wanted.items():
            body = {"model": name, "prompt": "Hello!", "max_tokens": 12, "temperature": 0}
            assert client.post(TEXT, json=body).json()["choices"][0]["text"] == text
        assert client.get("/ready").status_code == 200
    assert llm.shut == 1 and not llm.running


def test_two_models_share_the_memory(made: type[AsyncLLM], text_folder: Path) -> None:
    with _client(Fleet((Target(text_folder, "a"), Target(text_folder, "b")))):
        assert [llm.args.gpu_memory_utilization for llm in made.made] == [0.45, 0.45]
    assert [llm.shut for llm in made.made] == [1, 1]


def test_requests_of_the_endpoint(made: type[AsyncLLM], folder_of: Callable[[str], Path]) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    schema |= {"additionalProperties": False}
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 60}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with _client(Fleet((Target(folder_of("chat-completion"), "chat"),))) as client:
        told = client.post(CHAT, json=asked | {"response_format": wanted}).json()["choices"][0]
        assert told["finish_reason"] == "stop" and json.loads(told["message"]["content"])["city"] in ("Rome", "Oslo")
        [llm] = made.made
        assert list(llm.asked.values())[-1].params.structured_outputs.json == schema  # type: ignore[union-attr]
        book = {"type": "function", "function": {"name": "book", "parameters": schema}}
        told = client.post(CHAT, json=asked | {"tools": [book], "tool_choice": "required"}).json()["choices"][0]
        assert told["message"]["tool_calls"][0]["function"]["name"] == "book"
        told = client.post(CHAT, json=asked | {"n": 3, "temperature": 1.0, "seed": 4}).json()
        assert len({one["message"]["content"] for one in told["choices"]}) == 3
        scores = {"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 0}
        refused = client.post(TEXT, json=scores)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "echo"
        rows = {"dataframe_records": [{"input_string": "Hello!"}], "params": {"max_tokens": 3}}
        assert client.post("/invocations", json=rows).json()["predictions"][0]["output_string"]


# --- which models get it ---------------------------------------------------------------------------------------------


def test_what_auto_comes_to(
    made: type[AsyncLLM], folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, classes = folder_of("chat-completion"), folder_of("text-classification")
    assert not by_vllm("auto", chat)  # no GPU
    assert by_vllm("vllm", chat)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert by_vllm("auto", chat) and not by_vllm("own", chat)
    assert not by_vllm("auto", classes)
    with pytest.raises(ServeError, match="is for text-classification; use own"):
        by_vllm("vllm", classes)


def test_without_vllm(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not by_vllm("auto", folder_of("chat-completion"))
    with pytest.raises(MissingPackage, match=r"serve --engine vllm needs .*ingot\[vllm\]"):
        by_vllm("vllm", folder_of("chat-completion"))
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ServeError, match="holds an adapter alone"):
        by_vllm("vllm", tmp_path)


def test_what_vllm_cannot_run_says_so(
    made: type[AsyncLLM], text_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(AsyncLLM, "refusal", ValueError("no such architecture"))
    with pytest.raises(ModelError, match="no such architecture; --engine own"):
        deploy(Fleet((Target(text_folder),)), Limits(), lambda name: Meter(), "vllm")
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "rank_pattern": {"q": 600}}', encoding="utf-8")
    with pytest.raises(ModelError, match="its rank is 600"):
        Vllm(text_folder, without_weights(text_folder), Limits(), {"big": tmp_path}, 0.9)
