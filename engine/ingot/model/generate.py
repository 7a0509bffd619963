"""Text from a causal language model.

Self-contained (standard library, torch, transformers, its neighbours `generate_cache.py`, `kinds.py`, `running.py` and
`sampling.py`): evaluation, the MLflow package (which holds copies) and the endpoint all answer through it, so that what
was measured is what is served.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .generate_cache import plain
from .kinds import pad_id
from .running import Batch, accepted, begin, joined, step, unfinished
from .sampling import Generation, InputError, Row, Sampling, choose


def end_ids(model: nn.Module | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every end-of-sequence id that generation config, config or tokenizer name. A padding id alone ends nothing."""
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    found.update(_end_of_turn(tokenizer))
    return frozenset(int(i) for i in found)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token that the chat template ends an assistant's turn with: often none of the configured ids."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # the template asks for more than plain turns: the configured ids remain
        return []
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    while ids and not tokenizer.decode([ids[-1]]).strip():
        ids.pop()
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[-1:] if ids and ids[-1] in added | set(tokenizer.all_special_ids) else []


def context_limit(model: nn.Module) -> int | None:
    """Most tokens (prompt and answer) that the model's positions reach; None for an architecture without a limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]


def without_gradients() -> Any:
    """inference_mode, or no_grad where the caller has gradients off already: a model that goes on training must not be
    left with tensors of inference mode in its buffers.
    """
    return torch.inference_mode() if torch.is_grad_enabled() else torch.no_grad()


def _entering(waiting: list[Row], batch: Batch | None, most_new: int, tokens_per_batch: int, joining: bool) -> int:
    """How many of the waiting rows, longest first, are begun now, beside those of `batch`. `most_new`: tokens of an
    answer.
    """
    if not waiting or (batch is not None and not batch.open):
        return 0
    running = [] if batch is None else batch.rows
    longest = max(len(row.prompt) for row in [waiting[0], *running])
    size = max(1, tokens_per_batch // (longest + most_new))
    free = min(size - len(running), len(waiting))
    if not joining:
        return free
    # Not one by one: each time all keys and values are copied, and few prompts use the processor badly. Nor all at
    # once: a token of a prompt takes more memory while it is run than its keys and values later.
    return 0 if free < min(size // 4, len(waiting)) else min(free, max(1, tokens_per_batch // 4 // longest))


def _decode(
    model: nn.Module, waiting: list[Row], ends: frozenset[int], pad_id: int, tokens_per_batch: int = 1
) -> Iterator[list[Row]]:
    """`_tokens` without gradients: switched off and on again around each token, as it is a generator."""
    decode: Any = without_gradients()(_tokens)
    written: Iterator[list[Row]] = decode(model, waiting, ends, pad_id, tokens_per_batch)
    return written


def _tokens(
    model: nn.Module, waiting: list[Row], ends: frozenset[int], pad_id: int, tokens_per_batch: int
) -> Iterator[list[Row]]:
    """Write all rows; yields those that got a token, after each token. The place of a row that is finished is taken by
    the next one that waits, where the model's cache allows it: otherwise once the whole batch is finished.

    An own loop because `model.generate` draws samples that depend on the batch, keeps finished rows in it, and applies
    whatever the folder's generation config says. Greedy it is as fast, and the tests compare the ids of both.
    """
    known, batch = accepted(model), None
    joining = "position_ids" in known and plain(model.config)
    most_new = max((row.sampling.max_new_tokens for row in waiting), default=0)
    while waiting or batch is not None:
        count = _entering(waiting, batch, most_new, tokens_per_batch, joining)
        if count:
            new: Batch | None = begin(model, known, waiting[:count], pad_id, joining)
            waiting = waiting[count:]
        else:
            assert batch is not None
            step(model, known, batch)
            new, batch = batch, None
        assert new is not None
        for row, token in zip(new.rows, choose(new.logits, new.rows), strict=True):
            row.push(token, ends)
        yield new.rows
        batch = joined(batch, unfinished(new))


def make_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling | Sequence[Sampling],
) -> list[Row]:
    """Answers to be written, all with one `sampling` or each with its own: row i draws from (its seed, i). Raises
    InputError for a prompt that is empty or too long.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    limit = context_limit(model)
    for prompt, one in zip(prompts, samplings, strict=True):
        if not prompt:
            raise InputError("prompt", "the prompt holds no token")
        most = one.max_new_tokens
        if limit is not None and len(prompt) + most > limit:
            wanted = f"{len(prompt)} prompt tokens + {most} new tokens = {len(prompt) + most}"
            raise InputError("max_tokens", f"{wanted}: the model reaches {limit}")

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[return-value]

    drawn = random.getrandbits(64)
    return [
        Row(i, prompt, decode, random.Random(f"{drawn if one.seed is None else one.seed}/{i}"), one)
        for i, (prompt, one) in enumerate(zip(prompts, samplings, strict=True))
    ]


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    tokens_per_batch: int = 8192,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int | None = None,
    progress: Callable[[int], None] | None = None,
    **more: Any,
) -> list[Generation]:
    """Answer every prompt (token ids); results in input order, each independent of its batch but for float noise.

    A batch holds prompts of similar length, at most `tokens_per_batch` tokens counting padding and `max_new_tokens`
    (at least one prompt). `progress` hears of prompts as they are finished; `more`: further fields of `Sampling`.
    Raises `InputError`, a ValueError.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, tuple(stop), seed, **more)
    rows = make_rows(model, tokenizer, prompts, sampling)
    ends = end_ids(model, tokenizer)
    # Longest first: memory runs out at the first batch or never.
    waiting = sorted(rows, key=lambda row: len(row.prompt), reverse=True)
    was_training = model.training
    model.eval()
    try:
        for written in _decode(model, waiting, ends, pad_id(tokenizer), tokens_per_batch):
            finished = sum(bool(row.finish_reason) for row in written)
            if finished and progress is not None:
                progress(finished)
    finally:
        model.train(was_training)
    return [row.result() for row in rows]


def stream(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: list[int], sampling: Sampling
) -> Iterator[str | Generation]:
    """Answer one prompt piece by piece: strings, joined equal to the text of the `Generation` that comes last.

    A piece is held back while it may still become a stop string or the rest of a character.
    """
    [row] = make_rows(model, tokenizer, [prompt], sampling)
    for _ in _decode(model, [row], end_ids(model, tokenizer), pad_id(tokenizer)):
        if piece := row.piece():
            yield piece
    yield row.result()


def plain_prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a prompt that the model continues, as in training: the tokenizer's own prefix (BOS or nothing) once.

    Spaces at the end are dropped, because in training the space before an answer is part of the answer.
    """

    def bare(plain: str) -> list[int]:
        return list(tokenizer(plain, add_special_tokens=False)["input_ids"])

    probe, dressed, ids = bare("a"), list(tokenizer("a")["input_ids"]), bare(text.rstrip(" "))
    prefix = dressed[: next((n for n in range(len(dressed)) if dressed[n : n + len(probe)] == probe), 0)]
    return ids if ids[: len(prefix)] == prefix else prefix + ids
