"""Text through transformers' own continuous batching: keys and values in pages, rows of any length side by side.

Answers are those of `generate`, the form of the results too. What transformers leaves out is added here: stop strings
are looked for in what comes back, and the request is cancelled; a failure of its thread is an error; the model is left
as it was, also after Ctrl-C. What cannot be done this way is said by `supports` before anything is run.
"""

# B rows, T tokens

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ingot.errors import ModelError
from ingot.model.attention import NAME
from ingot.model.generate import end_ids, make_rows
from ingot.model.kinds import pad_id
from ingot.model.sampling import Generation, InputError, Sampling

PAGE = 32  # tokens; at 256, transformers' own, short rows waste most of what they hold
PROMPT_TOKENS = 2048  # run at once: masks grow with it times all that is held
SPARE = 1.25  # pages beyond those of full rows: the scheduler begins no row while few are free
LOGGER = logging.getLogger("ContinuousBatchingLogger")
LAYERS = {"full_attention", "sliding_attention"}


def supports(model: nn.Module) -> str | None:
    """Why `model` cannot write through continuous batching; None: it can."""
    if "page_size" not in getattr(getattr(transformers, "ContinuousBatchingConfig", None), "__annotations__", {}):
        return f"transformers {transformers.__version__} has another continuous batching than 5.17 and later"
    inner: Any = _inner(model)
    config = getattr(inner, "config", None)
    if config is None or not hasattr(inner, "init_continuous_batching"):
        return "it is not a model of transformers that writes"
    text = config.get_text_config()
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if text is not config:
        return "it reads more than text"
    if any(getattr(it, "is_prompt_learning", False) for it in getattr(model, "peft_config", {}).values()):
        return "its adapter puts virtual tokens before the prompt"
    return _attention(inner, text) or _storage(inner)


def _attention(inner: Any, text: Any) -> str | None:
    if strange := sorted(set(getattr(text, "layer_types", None) or LAYERS) - LAYERS):
        return f"it has layers of {', '.join(strange)}"
    try:
        layers = DynamicCache(config=text).layers
    except (KeyError, AttributeError):  # an architecture without keys and values
        layers = []
    if not layers or {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
        return "it holds states other than keys and values"
    if getattr(text, "num_kv_shared_layers", 0) or getattr(text, "kv_lora_rank", None):
        return "its layers share keys and values, or compress them"
    # Pages reach attention as an argument of transformers' own functions; others would not see what came before.
    if not getattr(inner, "_supports_attention_backend", False):
        return "its attention is its own"
    chosen = _paged(inner)
    if not (chosen in ("sdpa", "eager") or chosen.startswith("flash_attention")):
        return f"its attention is {chosen}"
    if getattr(text, "attn_logit_softcapping", None) and not chosen.startswith("flash_attention"):
        return "it caps the logits of attention"  # which paged eager attention leaves out
    return None


def _paged(inner: Any) -> str:
    """The attention that `inner` has beside pages: its own, or what ours is for rows without documents."""
    chosen = str(inner.config._attn_implementation)
    if chosen == NAME or chosen.startswith(f"{NAME}_"):
        return "sdpa" if inner._supports_sdpa else "eager"
    return chosen


def _storage(inner: Any) -> str | None:
    parameters = list(inner.parameters())
    if len({parameter.device for parameter in parameters}) > 1:
        return "it is spread over several devices"
    if getattr(inner, "is_quantized", False) or not all(parameter.is_floating_point() for parameter in parameters):
        return "its weights are quantized"  # pages would be of the dtype of the weights
    return None


def refuse_beams(model: nn.Module) -> None:
    """Raise ModelError where the model's generation config asks for a search, which would be run as greedy decoding."""
    config: Any = getattr(model, "generation_config", None)
    for name in ("num_beams", "num_return_sequences", "num_beam_groups"):
        if (getattr(config, name, None) or 1) > 1:
            fix = f"the model's generation config asks for {name} = {getattr(config, name)}, which continuous batching "
            fix += "ignores; take it out, or use static, whose answers are greedy"
            raise ModelError("evaluate.engine", "continuous", fix)


def generate_continuously(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop: Sequence[str] = (),
    tokens_per_batch: int = 8192,
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Answer every prompt (token ids) greedily; results in input order, as `generate` returns them.

    Args:
        max_new_tokens: of every answer, or of each prompt's.
        tokens_per_batch: that keys and values are held of, at about the same time.
        progress: hears of prompts as they are finished.

    Which rows share a step depends on when a stop string is found, so answers are the same but for float noise.

    Raises:
        ModelError: for a model that `supports` or `refuse_beams` turns away, and where transformers' loop fails.
        InputError: as `generate`.
    """
    if (reason := supports(model)) is not None:
        raise ModelError("evaluate.engine", "continuous", f"{reason}; use static")
    refuse_beams(model)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != len(prompts):
        raise InputError("max_tokens", f"{len(limits)} limits of {len(prompts)} prompts")
    samplings = [Sampling(limit, stop=tuple(stop)) for limit in limits]
    rows: list[Any] = []
    for place, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        rows += [replace(row, index=place) for row in make_rows(model, tokenizer, [prompt], sampling)]
    if not rows:
        return []
    ends = end_ids(model, tokenizer)
    with _Manager(_inner(model), rows, limits, ends, pad_id(tokenizer), tokens_per_batch) as manager:
        for row in sorted(rows, key=lambda row: len(row.prompt), reverse=True):
            name, limit = str(row.index), limits[row.index]
            manager.add_request(row.prompt, name, max_new_tokens=limit, streaming=bool(stop), eos_token_id=sorted(ends))
        manager.start()
        left = len(rows)
        while left:
            result = manager.get_result(timeout=1.0)
            if result is None and manager.is_running():
                continue
            if result is None or result.error:
                raise _failed(manager.background_thread_status.fatal_error or (result and result.error))
            row = rows[int(result.request_id)]
            if row.finish_reason:
                continue  # written before the cancellation was heard of
            for token in result.generated_tokens[len(row.ids) :]:
                row.push(token, ends)
                if row.finish_reason:
                    break
            if row.finish_reason:
                left -= 1
                if not result.is_finished():
                    manager.cancel_request(result.request_id)
                if progress is not None:
                    progress(1)
            elif result.is_finished():
                raise _failed(f"row {row.index} ended after {len(row.ids)} tokens for no reason")
    return [row.result() for row in rows]


class _Manager:
    """transformers' manager while a block runs. After it: no thread, no pages, and the model as it was."""

    def __init__(
        self, inner: Any, rows: Sequence[Any], limits: Sequence[int], ends: frozenset[int], pad: int, tokens: int
    ) -> None:
        self._inner, self._found = inner, None
        longest = max(len(row.prompt) + limit for row, limit in zip(rows, limits, strict=True))
        width = max(1, min(len(rows), tokens // longest))
        self._paging = transformers.ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=math.ceil(width * math.ceil((longest + 1) / PAGE) * SPARE) + 1,
            max_batch_tokens=max(width, min(PROMPT_TOKENS, tokens)),
            max_requests_per_batch=width,
            auto_switch_to_flash=False,  # other numbers than the static engine's, and code that is fetched
            disable_nccl_graph_mixing=False,  # else it changes the environment
        )
        self._how = GenerationConfig(
            max_new_tokens=max(limits), do_sample=False, num_beams=1, eos_token_id=sorted(ends) or -1, pad_token_id=pad
        )

    def __enter__(self) -> Any:
        self._attention = self._inner.config._attn_implementation
        self._training = [module for module in self._inner.modules() if module.training]
        # Its failures are raised as errors here; it would print them with their tracebacks too.
        self._quiet, LOGGER.disabled = LOGGER.disabled, True
        try:
            self._inner.set_attn_implementation(_paged(self._inner))
            self._found = self._inner.init_continuous_batching(self._how, self._paging)
        except BaseException:
            self._restore()
            raise
        return self._found

    def __exit__(self, *_: Any) -> None:
        try:
            manager: Any = self._found
            if manager.is_running():
                # At once: to wait for the rows that are left would ignore Ctrl-C.
                manager.stop(block=True, hard_stop=True)
            manager.batch_processor = None
            manager.destroy()
        finally:
            self._found = None
            self._restore()

    def _restore(self) -> None:
        if self._inner.config._attn_implementation != self._attention:
            self._inner.set_attn_implementation(self._attention)
        for module in self._training:
            module.training = True
        LOGGER.disabled = self._quiet
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _failed(reason: Any) -> ModelError:
    return ModelError("evaluate.engine", "continuous", f"transformers' loop stopped ({reason}); use static")


def _inner(model: nn.Module) -> nn.Module:
    """The model of transformers itself; adapters sit in its layers."""
    found: nn.Module = getattr(model, "get_base_model", lambda: model)()
    return found
