"""Text from a causal language model.

Self-contained (standard library, torch, transformers): evaluation, the MLflow package (which holds a copy of this
file) and
the endpoint all answer through it, so that what was measured is what is served.
"""

# B rows of the running batch, T tokens, V vocabulary

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

# The decoder of some tokenizers drops a leading space, so new text is decoded behind this many prompt tokens.
CONTEXT_TOKENS = 8
UNFINISHED_CHARACTER = "\ufffd"


class InputError(ValueError):
    """An input that cannot be answered; `field` names the part of the request. Holds counts, never the input's text."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


@dataclass(frozen=True)
class Generation:
    """One answer. `ids` are all generated tokens (a closing end token included); `text` ends before the stop."""

    text: str
    ids: list[int]
    n_prompt: int
    finish_reason: str  # "stop": an end token or stop string; "length": max_new_tokens


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy. Row i draws from (seed, i), whatever shares its batch."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError("max_tokens", f"max_tokens must be 1 or more, not {self.max_new_tokens}")
        if not 0.0 <= self.temperature <= 100.0:
            raise InputError("temperature", f"temperature must be between 0 and 100, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError("top_p", f"top_p must be above 0 and at most 1, not {self.top_p}")
        if any(not text for text in self.stop):
            raise InputError("stop", "a stop string must not be empty")


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


@dataclass
class _Row:
    """One answer in the making."""

    index: int
    prompt: list[int]
    decode: Callable[[list[int]], str]
    draws: random.Random
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    ended: bool = False  # the last id is an end token

    def full_text(self) -> str:
        """The text so far, without the end token; stop strings are still in it."""
        context = self.prompt[-CONTEXT_TOKENS:]
        new = self.ids[:-1] if self.ended else self.ids
        before = self.decode(context)
        whole = self.decode(context + new)
        return whole[len(before) :] if whole.startswith(before) else self.decode(new)

    def push(self, token: int, ends: frozenset[int], sampling: Sampling) -> None:
        self.ids.append(token)
        if token in ends:
            self.finish_reason, self.ended = "stop", True
        elif sampling.stop and any(text in self.full_text() for text in sampling.stop):
            self.finish_reason = "stop"
        elif len(self.ids) >= sampling.max_new_tokens:
            self.finish_reason = "length"

    def result(self, sampling: Sampling) -> Generation:
        text = self.full_text()
        found = [text.find(stop) for stop in sampling.stop if stop in text]
        return Generation(text[: min(found)] if found else text, self.ids, len(self.prompt), self.finish_reason)


def _choose(logits_BV: Tensor, rows: list[_Row], sampling: Sampling) -> list[int]:
    """The next token of each row: the largest logit, or the inverse cumulative distribution at the row's own draw."""
    if sampling.temperature == 0.0:
        return logits_BV.argmax(-1).tolist()
    probs_BV, order_BV = torch.softmax(logits_BV.float() / sampling.temperature, -1).sort(-1, descending=True)
    cumulative_BV = probs_BV.cumsum(-1)
    # A token stays while the mass before it is under top_p: the first one always stays.
    kept_B1 = ((cumulative_BV - probs_BV) < sampling.top_p).sum(-1, keepdim=True)
    mass_B1 = cumulative_BV.gather(-1, kept_B1 - 1)
    draws_B1 = torch.tensor([[row.draws.random()] for row in rows], device=logits_BV.device) * mass_B1
    rank_B1 = torch.minimum((cumulative_BV <= draws_B1).sum(-1, keepdim=True), kept_B1 - 1)
    return order_BV.gather(-1, rank_B1).squeeze(-1).tolist()


@torch.inference_mode()
def _decode(
    model: nn.Module, rows: list[_Row], ends: frozenset[int], pad_id: int, sampling: Sampling
) -> Iterator[list[_Row]]:
    """Run one left-padded batch to its end; yields the rows that got a token, after each token.

    An own loop because `model.generate` draws samples that depend on the batch, keeps finished rows in it, and applies
    whatever the folder's generation config says. Greedy it is as fast, and the tests compare the ids of both.
    """
    device = next(model.parameters()).device
    longest = max(len(row.prompt) for row in rows)
    ids_BT = torch.tensor([[pad_id] * (longest - len(row.prompt)) + row.prompt for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (longest - len(row.prompt)) + [1] * len(row.prompt) for row in rows], device=device)
    known = inspect.signature(model.forward).parameters
    cache: Any = None
    while True:
        options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        if "position_ids" in known:
            positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = positions_BT[:, -ids_BT.shape[1] :]
        output = model(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, **options)
        cache = output.past_key_values
        tokens = _choose(output.logits[:, -1], rows, sampling)
        for row, token in zip(rows, tokens, strict=True):
            row.push(token, ends, sampling)
        yield rows
        left = [i for i, row in enumerate(rows) if not row.finish_reason]
        if not left:
            return
        if len(left) < len(rows):
            keep = torch.tensor(left, device=device)
            rows, tokens, mask_BT = [rows[i] for i in left], [tokens[i] for i in left], mask_BT[keep]
            cache.batch_select_indices(keep)
        ids_BT = torch.tensor(tokens, device=device).unsqueeze(-1)
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], -1)


def make_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], sampling: Sampling
) -> list[_Row]:
    limit = context_limit(model)
    for prompt in prompts:
        if not prompt:
            raise InputError("prompt", "the prompt holds no token")
        if limit is not None and len(prompt) + sampling.max_new_tokens > limit:
            wanted = f"{len(prompt)} prompt tokens + {sampling.max_new_tokens} new tokens"
            raise InputError(
                "max_tokens", f"{wanted} = {len(prompt) + sampling.max_new_tokens}: the model reaches {limit}"
            )

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[return-value]

    seed = random.getrandbits(64) if sampling.seed is None else sampling.seed
    return [_Row(i, prompt, decode, random.Random(f"{seed}/{i}")) for i, prompt in enumerate(prompts)]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return (
        0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    )  # masked: any id of the vocabulary will do


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
) -> list[Generation]:
    """Answer every prompt (token ids); results in input order, each independent of its batch but for float noise.

    A batch holds prompts of similar length, at most `tokens_per_batch` tokens counting padding and `max_new_tokens`
    (at least one prompt). `progress` gets how many prompts each batch finished. Raises `InputError`, a ValueError.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, tuple(stop), seed)
    rows = make_rows(model, tokenizer, prompts, sampling)
    ends, pad_id = end_ids(model, tokenizer), padding_id(tokenizer)
    # Longest first: memory runs out at the first batch or never.
    waiting = sorted(rows, key=lambda row: len(row.prompt), reverse=True)
    was_training = model.training
    model.eval()
    try:
        while waiting:
            size = max(1, tokens_per_batch // (len(waiting[0].prompt) + max_new_tokens))
            batch, waiting = waiting[:size], waiting[size:]
            for _ in _decode(model, batch, ends, pad_id, sampling):
                pass
            if progress is not None:
                progress(len(batch))
    finally:
        model.train(was_training)
    return [row.result(sampling) for row in rows]


def stream(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: list[int], sampling: Sampling
) -> Iterator[str | Generation]:
    """Answer one prompt piece by piece: strings, joined equal to the text of the `Generation` that comes last.

    A piece is held back while it may still become a stop string or the rest of a character.
    """
    [row] = make_rows(model, tokenizer, [prompt], sampling)
    sent = 0
    for _ in _decode(model, [row], end_ids(model, tokenizer), padding_id(tokenizer), sampling):
        if not row.finish_reason:
            text = row.full_text()
            text = text.rstrip(UNFINISHED_CHARACTER)
            held = max((n for stop in sampling.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            if len(text) - held > sent:
                yield text[sent : len(text) - held]
                sent = len(text) - held
    done = row.result(sampling)
    if done.text[sent:]:
        yield done.text[sent:]
    yield done


def plain_prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a prompt that the model continues, as in training: the tokenizer's own prefix (BOS or nothing) once.

    Spaces at the end are dropped, because in training the space before an answer is part of the answer.
    """

    def bare(plain: str) -> list[int]:
        return list(tokenizer(plain, add_special_tokens=False)["input_ids"])

    probe, dressed, ids = bare("a"), list(tokenizer("a")["input_ids"]), bare(text.rstrip(" "))
    prefix = dressed[: next((n for n in range(len(dressed)) if dressed[n : n + len(probe)] == probe), 0)]
    return ids if ids[: len(prefix)] == prefix else prefix + ids
