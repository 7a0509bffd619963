"""vLLM as far as the endpoint uses it, by transformers: the same names, the same checks, the same ways to end.

Written after vLLM's own files (`v1/engine/async_llm.py`, `sampling_params.py`, `outputs.py`, `lora/request.py`): an
engine belongs to the event loop that it was made in, deltas of a slow reader are joined, a request that is cancelled or
closed is aborted, and temperatures below 0.01 are raised.
"""

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from ingot.model.adapters import with_saved_adapter
from ingot.model.runtime import Runtime
from ingot.model.sampling import Row, Sampling, choose
from ingot.serving.structured import guided


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class StructuredOutputsParams:
    json: Any = None


@dataclass
class StructuredOutputsConfig:
    backend: str = "auto"
    disable_any_whitespace: bool = False


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None

    def __post_init__(self) -> None:
        if 0 < self.temperature < 0.01:
            self.temperature = 0.01
        if not 0.0 <= self.temperature <= 2.0:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if self.seed == -1:
            self.seed = None


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class AsyncEngineArgs:
    model: str
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float = 0.9
    trust_remote_code: bool = False
    generation_config: str = "auto"
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    structured_outputs_config: StructuredOutputsConfig = field(default_factory=StructuredOutputsConfig)
    enable_log_requests: bool = False
    disable_log_stats: bool = False
    seed: int = 0
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class Asked:
    """A request as it came."""

    prompt: list[int]
    params: SamplingParams
    lora: str | None


class AsyncLLM:
    """`made`: all engines. `pause_s` between two tokens; `failure`: what ends every request."""

    made: ClassVar[list["AsyncLLM"]] = []
    refusal: ClassVar[Exception | None] = None

    def __init__(self, args: AsyncEngineArgs) -> None:
        if self.refusal is not None:
            raise self.refusal
        assert args.generation_config == "vllm" and not args.trust_remote_code
        self.args, self.loop = args, asyncio.get_running_loop()
        self.runtime = Runtime.load(args.model)
        self.adapted: dict[str, Runtime] = {}
        self.asked: dict[str, Asked] = {}
        self.aborted: list[str] = []
        self.running, self.most_running, self.pause_s, self.shut = 0, 0, 0.0, 0
        self.failure: Exception | None = None
        self.made.append(self)

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs) -> "AsyncLLM":
        return cls(engine_args)

    def shutdown(self, timeout: float | None = None) -> None:
        self.shut += 1

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, *, lora_request: LoRARequest | None = None
    ) -> Any:
        assert asyncio.get_running_loop() is self.loop
        assert request_id not in self.asked and prompt.keys() == {"prompt_token_ids"}
        assert sampling_params.output_kind is RequestOutputKind.DELTA and sampling_params.n == 1
        lora = None if lora_request is None else lora_request.lora_name
        self.asked[request_id] = Asked(prompt["prompt_token_ids"], sampling_params, lora)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async for output in self._deltas(prompt["prompt_token_ids"], sampling_params, request_id, lora_request):
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            await self.abort(request_id)
            raise
        finally:
            self.running -= 1

    async def _deltas(
        self, prompt: list[int], how: SamplingParams, request_id: str, lora: LoRARequest | None
    ) -> AsyncIterator[RequestOutput]:
        runtime, row = self._runtime(lora), _row(self.runtime, prompt, how)
        ends, sent = frozenset(how.stop_token_ids or []), 0
        while not row.finish_reason:
            await asyncio.sleep(self.pause_s)
            if self.failure is not None:
                raise self.failure
            with torch.inference_mode():
                logits = runtime.model(input_ids=torch.tensor([prompt + row.ids])).logits[:, -1]
            row.push(choose(logits, [row])[0], ends)
            if len(row.ids) % 2 or row.finish_reason:  # the others come joined with the next one
                told = [_logprobs(one, how.logprobs or 0) for one in row.told[sent:]] if row.told else None
                reason = row.finish_reason or None
                yield RequestOutput(
                    request_id, [CompletionOutput(0, "", row.ids[sent:], told, reason)], bool(row.finish_reason)
                )
                sent = len(row.ids)

    def _runtime(self, lora: LoRARequest | None) -> Runtime:
        if lora is None:
            return self.runtime
        assert self.args.enable_lora and lora.lora_int_id > 0
        if lora.lora_name not in self.adapted:
            adapted = Runtime.load(self.args.model)
            adapted.model = with_saved_adapter(adapted.model, Path(lora.lora_path))
            self.adapted[lora.lora_name] = adapted
        return self.adapted[lora.lora_name]


def _row(runtime: Runtime, prompt: list[int], how: SamplingParams) -> Row:
    assert how.max_tokens is not None and how.detokenize is False
    along = how.structured_outputs
    sampling = Sampling(
        how.max_tokens,
        how.temperature,
        how.top_p,
        top_k=how.top_k,
        min_p=how.min_p,
        presence_penalty=how.presence_penalty,
        frequency_penalty=how.frequency_penalty,
        repetition_penalty=how.repetition_penalty,
        logit_bias=tuple((how.logit_bias or {}).items()),
        top_logprobs=how.logprobs,
        guide=None if along is None else guided(runtime, along.json, "json"),
    )
    return Row(0, prompt, lambda ids: "", random.Random(how.seed), sampling)


def _logprobs(told: Any, top: int) -> dict[int, Logprob]:
    """The token first, then the likeliest: up to one more than asked for."""
    found = {told.token: Logprob(told.logprob)}
    return found | {token: Logprob(logprob, rank) for rank, (token, logprob) in enumerate(told.top[:top], 1)}


def install(monkeypatch: pytest.MonkeyPatch) -> type[AsyncLLM]:
    """Put it where vLLM would be."""
    places: dict[str, tuple[Any, ...]] = {
        "vllm": (),
        "vllm.config": (StructuredOutputsConfig,),
        "vllm.engine": (),
        "vllm.engine.arg_utils": (AsyncEngineArgs,),
        "vllm.lora": (),
        "vllm.lora.request": (LoRARequest,),
        "vllm.sampling_params": (SamplingParams, StructuredOutputsParams, RequestOutputKind),
        "vllm.v1": (),
        "vllm.v1.engine": (),
        "vllm.v1.engine.async_llm": (AsyncLLM,),
    }
    for name, parts in places.items():
        module: Any = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
        for part in parts:
            setattr(module, part.__name__, part)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    monkeypatch.setattr(AsyncLLM, "made", [])
    return AsyncLLM
