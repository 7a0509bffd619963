"""vLLM for the endpoint (`pip install ingot[vllm]`). Checked against a stand-in only, never run with vLLM.

Its engine belongs to the event loop that it was made in: it has one here, in a thread of its own.
"""

import asyncio
import contextlib
import json
import random
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ingot.errors import ModelError
from ingot.evaluation.vllm_engine import require_vllm
from ingot.model.generate import context_limit
from ingot.model.runtime import Runtime
from ingot.model.sampling import BOUNDS, COLDEST, InputError, Sampling
from ingot.serving.engine import Limits

MEMORY = 0.9  # of the GPU's, for all models of a server: what vLLM takes for one by itself
COLD, HOT = 0.01, 2.0  # vLLM raises lower temperatures than the one to it, and refuses higher ones than the other
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that `max_lora_rank` may be
END_S = 10.0  # that tasks of its loop have to end
Hear = Callable[[Any], None]


class Vllm:
    """A model's folder in vLLM's hands, for the engines of the model itself and of its adapters."""

    def __init__(
        self, folder: Path, runtime: Runtime, limits: Limits, adapters: Mapping[str, Path], share: float
    ) -> None:
        """`share`: of the GPU's memory. Raises MissingPackage without vLLM, ModelError for what it cannot run."""
        require_vllm("serve --engine vllm")
        rank = _rank(adapters)
        self._loop, self._users, self._lock = asyncio.new_event_loop(), set[object](), threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ingot-vllm", daemon=True)
        self._thread.start()
        try:
            self._llm: Any = self._wait(self._open(folder, runtime, limits, adapters, rank, share))
        except Exception as error:  # an architecture, an adapter, a GPU or a size that it does not take
            self._stop()
            fix = f"it cannot run {folder.name}: {error}; --engine own runs what transformers does"
            raise ModelError("--engine", "vllm", fix) from error

    async def _open(
        self,
        folder: Path,
        runtime: Runtime,
        limits: Limits,
        adapters: Mapping[str, Path],
        rank: int,
        share: float,
    ) -> Any:
        from vllm import sampling_params
        from vllm.config import StructuredOutputsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        self._made: Any = sampling_params
        self._adapters = {name: LoRARequest(name, n, str(path)) for n, (name, path) in enumerate(adapters.items(), 1)}
        more: dict[str, Any] = {}
        if adapters:
            more = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": rank}
        args = AsyncEngineArgs(
            model=str(folder),
            max_model_len=context_limit(runtime.model),
            max_num_seqs=limits.rows,
            gpu_memory_utilization=share,
            trust_remote_code=False,
            generation_config="vllm",  # not the folder's: what a request does not say is as `Sampling` has it
            max_logprobs=int(BOUNDS["top_logprobs"][1]),
            logprobs_mode="raw_logprobs",  # before anything reshaped the distribution, as `Told` has them
            structured_outputs_config=StructuredOutputsConfig(backend="guidance", disable_any_whitespace=True),
            enable_log_requests=False,
            disable_log_stats=True,
            seed=0,
            **more,
        )
        return AsyncLLM.from_engine_args(args)

    def sampling(self, asked: Sampling, place: int, ends: frozenset[int]) -> Any:
        """vLLM's parameters of a request's row. Raises InputError for what it would change or ignore."""
        heat = 0.0 if asked.temperature < COLDEST else asked.temperature
        if heat and not COLD <= heat <= HOT:
            raise InputError("temperature", f"temperature: this server's engine takes 0, or {COLD} to {HOT:g}")
        guide, along = asked.guide, None
        if guide is not None:
            schema = getattr(guide, "schema", None)
            if schema is None:
                raise InputError("response_format", "response_format: this server's engine takes a JSON Schema")
            along = self._made.StructuredOutputsParams(json=schema)
        bias: dict[int, float] = {}
        for token, by in asked.logit_bias:
            bias[token] = bias.get(token, 0.0) + by
        # Each row is a request of its own: of one seed they would all say the same.
        seed = None if asked.seed is None else random.Random(f"{asked.seed}/{place}").getrandbits(32)
        try:
            return self._made.SamplingParams(
                max_tokens=asked.max_new_tokens,
                temperature=heat,
                top_p=asked.top_p,
                top_k=asked.top_k,
                min_p=asked.min_p,
                seed=seed,
                presence_penalty=asked.presence_penalty,
                frequency_penalty=asked.frequency_penalty,
                repetition_penalty=asked.repetition_penalty,
                logit_bias=bias or None,
                logprobs=asked.top_logprobs,
                structured_outputs=along,
                stop_token_ids=sorted(ends),
                detokenize=False,
                output_kind=self._made.RequestOutputKind.DELTA,
            )
        except ValueError as error:
            raise InputError("model", "this server's engine refuses these settings") from error

    def begin(self, prompt: list[int], sampling: Any, adapter: str | None, hear: Hear) -> Future[None]:
        """Have an answer written. `hear` is called, in vLLM's thread, with each of its outputs or with the error that
        ends them. Cancelling the future ends the work.
        """
        return asyncio.run_coroutine_threadsafe(self._write(prompt, sampling, adapter, hear), self._loop)

    async def _write(self, prompt: list[int], sampling: Any, adapter: str | None, hear: Hear) -> None:
        more = {} if adapter is None else {"lora_request": self._adapters[adapter]}
        outputs = self._llm.generate({"prompt_token_ids": prompt}, sampling, uuid.uuid4().hex, **more)
        try:
            async with contextlib.aclosing(outputs):  # `generate` aborts its request where it is cancelled or closed
                async for output in outputs:
                    hear(output.outputs[0])
        except Exception as error:
            hear(error)

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def enter(self, engine: object) -> None:
        """`engine` uses it from now on."""
        with self._lock:
            self._users.add(engine)

    def leave(self, engine: object) -> None:
        """`engine` does no longer; it ends with the last one."""
        with self._lock:
            last = self._users == {engine}
            self._users.discard(engine)
        if last:
            self._llm.shutdown()
            self._stop()

    def _stop(self) -> None:
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancelled(), self._loop).result(END_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_S)
        if not self._thread.is_alive():
            self._loop.close()


async def _cancelled() -> None:
    """Wait until all other tasks of the loop have ended."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _rank(adapters: Mapping[str, Path]) -> int:
    """The least `max_lora_rank` that all adapters fit. Raises ModelError."""
    most = 0
    for name, folder in adapters.items():
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max(int(config.get("r", 0)), *(config.get("rank_pattern") or {"": 0}).values())
        if rank > RANKS[-1]:
            raise ModelError("--adapter", name, f"its rank is {rank}, and vLLM takes up to {RANKS[-1]}; merge it")
        most = max(most, rank)
    return next(rank for rank in RANKS if rank >= most)
