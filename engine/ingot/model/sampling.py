"""How the next token is chosen, and what becomes of it: the answers of a causal language model in the making.

Self-contained (standard library and torch): the MLflow package holds a copy.
"""

# B rows of the running batch, V vocabulary

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# The decoder of some tokenizers drops a leading space, so new text is decoded behind this many prompt tokens.
CONTEXT_TOKENS = 8
SETTLED_TOKENS = 16  # so many new tokens are decoded again with each further one, to twice as many
UNFINISHED_CHARACTER = "\ufffd"


class InputError(ValueError):
    """An input that cannot be answered; `field` names the part of the request. Holds counts, never the input's text."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


class Told(NamedTuple):
    """How likely a token was, in nats, before anything reshaped the model's own distribution; `top`: the likeliest
    tokens there, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Piece(str):
    """Text of an answer in the making, with what is told of its tokens where that was asked for."""

    told: tuple[Told, ...] = ()


class Guide(Protocol):
    """What one answer may say next. `finished`: nothing more; `failed`: it was given up before its end."""

    finished: bool
    failed: bool

    def allowed(self, width: int) -> Tensor:
        """Which ids may come next, [width], on the CPU."""

    def push(self, token: int) -> None:
        """Go on behind a token."""


@dataclass(frozen=True)
class Generation:
    """One answer. `ids` are all generated tokens (a closing end token included); `text` ends before the stop. `told`
    has an entry for each token of the text where `Sampling.top_logprobs` asks for it.
    """

    text: str
    ids: list[int]
    n_prompt: int
    finish_reason: str  # "stop": an end token, a stop string or a guide's end; "length": max_new_tokens
    told: tuple[Told, ...] = ()


# Field of Sampling -> lowest and highest value. A field's name is the one that clients send.
BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 2**31),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
    "top_logprobs": (0, 20),
}
BIAS_BOUND = 100.0
STOPS, STOP_CHARACTERS = 64, 256  # each token's text is held against all beginnings of all of them
COLDEST = 1e-5  # below it logits over the temperature leave float32, and the likeliest token is taken


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy. Row i draws from (seed, i), whatever shares its batch.

    `top_k` (0: all), then `top_p`, then `min_p` (of the likeliest token's probability) cut what is drawn from.
    `presence_penalty` and `frequency_penalty` are subtracted from the logits of tokens that the answer holds, once and
    once for each time; `repetition_penalty` weakens those of answer and prompt: positive ones are divided by it,
    negative ones multiplied. `logit_bias`: (id, what its logit gains). `guide` makes what says which tokens are open.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None  # None: nothing is told of the tokens
    guide: Callable[[], Guide] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError("max_tokens", f"max_tokens must be 1 or more, not {self.max_new_tokens}")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError("top_p", f"top_p must be above 0 and at most 1, not {self.top_p}")
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(name, f"{name} must be between {low:g} and {high:g}, not {value:g}")
        if any(not -BIAS_BOUND <= bias <= BIAS_BOUND for _, bias in self.logit_bias):
            raise InputError("logit_bias", f"a bias must be between {-BIAS_BOUND:g} and {BIAS_BOUND:g}")
        if any(not text for text in self.stop):
            raise InputError("stop", "a stop string must not be empty")
        if len(self.stop) > STOPS or any(len(text) > STOP_CHARACTERS for text in self.stop):
            raise InputError("stop", f"stop: up to {STOPS} strings of up to {STOP_CHARACTERS} characters")

    @property
    def penalized(self) -> bool:
        """Whether tokens that were said count."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    @property
    def reshaped(self) -> bool:
        """Whether the logits are not taken as they are."""
        return self.penalized or bool(self.logit_bias) or self.guide is not None


@dataclass
class Row:
    """One answer in the making."""

    index: int
    prompt: list[int]
    decode: Callable[[list[int]], str]
    draws: random.Random
    sampling: Sampling
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    ended: bool = False  # the last id is an end token
    sent: int = 0  # characters that `piece` gave out
    settled: int = 0  # tokens whose text no longer changes, and that text
    settled_text: str = ""
    told: list[Told] = field(default_factory=list)  # by `choose`, one for each id
    reported: int = 0  # of them, `piece` gave out
    guide: Guide | None = None

    def __post_init__(self) -> None:
        if self.sampling.guide is not None:
            self.guide = self.sampling.guide()

    def full_text(self) -> str:
        """The text so far, without the end token; stop strings are still in it."""
        return self._text_of(self.ids[:-1] if self.ended else self.ids)

    def _text_of(self, new: list[int]) -> str:
        """The text of the answer or its beginning. What was settled is not decoded again."""
        at, text = (self.settled, self.settled_text) if self.settled <= len(new) else (0, "")
        context = new[max(0, at - CONTEXT_TOKENS) : at]
        if len(context) < CONTEXT_TOKENS:
            context = self.prompt[len(context) - CONTEXT_TOKENS :] + context
        before = self.decode(context)
        whole = self.decode(context + new[at:])
        return text + (whole[len(before) :] if whole.startswith(before) else self.decode(new[at:]))

    def _settle(self) -> None:
        """Keep the text of tokens that are some way behind, up to the end of a character."""
        for end in range(self.settled + SETTLED_TOKENS, len(self.ids) - SETTLED_TOKENS):
            text = self._text_of(self.ids[:end])
            if not text.endswith(UNFINISHED_CHARACTER):
                self.settled, self.settled_text = end, text
                return

    def push(self, token: int, ends: frozenset[int]) -> None:
        """Add a token, and say why the answer ends where it does."""
        self.ids.append(token)
        self.ended = token in ends
        if self.guide is not None and not self.ended:
            self.guide.push(token)
        if self.ended or (self.guide is not None and self.guide.finished):
            self.finish_reason = "length" if self.guide is not None and self.guide.failed else "stop"
        elif self.sampling.stop and self._stopped():
            self.finish_reason = "stop"
        elif len(self.ids) >= self.sampling.max_new_tokens:
            self.finish_reason = "length"

    def _stopped(self) -> bool:
        self._settle()
        text = self.full_text()
        return any(stop in text for stop in self.sampling.stop)

    def piece(self) -> Piece:
        """Text that came since the last call. What may still become a stop string, or the rest of a character, is held
        back until the answer is finished; joined, the pieces are the result's text.
        """
        if self.finish_reason:
            text = self.result().text
        else:
            self._settle()
            text, stops = self.full_text().rstrip(UNFINISHED_CHARACTER), self.sampling.stop
            held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            text = text[: len(text) - held]
        piece, self.sent = Piece(text[self.sent :]), max(self.sent, len(text))
        if piece and self.told:
            told = self._told_of(text)
            piece.told, self.reported = told[self.reported :], max(self.reported, len(told))
        return piece

    def _told_of(self, text: str) -> tuple[Told, ...]:
        """What was told of the tokens that `text`, the answer or its beginning, is made of."""
        n = len(self.ids) - self.ended
        while n and len(self._text_of(self.ids[: n - 1]).rstrip(UNFINISHED_CHARACTER)) >= len(text):
            n -= 1
        return tuple(self.told[:n])

    def result(self) -> Generation:
        """What was written so far."""
        text = self.full_text()
        found = [text.find(stop) for stop in self.sampling.stop if stop in text]
        text = text[: min(found)] if found else text
        told = self._told_of(text) if self.told else ()
        return Generation(text, self.ids, len(self.prompt), self.finish_reason, told)


def choose(logits_BV: Tensor, rows: list[Row]) -> list[int]:
    """The next token of each row, as its own sampling says."""
    shaped_BV = _shaped(logits_BV, rows)
    chosen = shaped_BV.argmax(-1)
    drawn = [place for place, row in enumerate(rows) if row.sampling.temperature >= COLDEST]
    if drawn:
        places = torch.tensor(drawn, device=logits_BV.device)
        chosen[places] = _drawn(shaped_BV[places].float(), [rows[place] for place in drawn])
    found: list[int] = chosen.tolist()
    _tell(logits_BV, rows, found)
    return found


def _shaped(logits_BV: Tensor, rows: list[Row]) -> Tensor:
    """Logits with each row's penalties, biases and guide; the model's own where no row has any."""
    places = [place for place, row in enumerate(rows) if row.sampling.reshaped]
    if not places:
        return logits_BV
    shaped_BV = logits_BV.to(torch.float32, copy=True)
    for place in places:
        _shape(shaped_BV[place], rows[place])
    return shaped_BV


def _shape(logits_V: Tensor, row: Row) -> None:
    """In place."""

    def tensor(values: list[int] | list[float]) -> Tensor:
        return torch.tensor(values, device=logits_V.device)

    sampling = row.sampling
    if sampling.repetition_penalty != 1.0 and (said := {*row.prompt, *row.ids}):
        places, by = tensor(list(said)), sampling.repetition_penalty
        old = logits_V[places]
        logits_V[places] = torch.where(old > 0, old / by, old * by)
    if (sampling.presence_penalty or sampling.frequency_penalty) and row.ids:
        counts = Counter(row.ids)
        less = [sampling.presence_penalty + sampling.frequency_penalty * count for count in counts.values()]
        logits_V[tensor(list(counts))] -= tensor(less)
    if sampling.logit_bias:
        logits_V.index_add_(0, tensor([i for i, _ in sampling.logit_bias]), tensor([b for _, b in sampling.logit_bias]))
    if row.guide is not None:
        logits_V.masked_fill_(~row.guide.allowed(len(logits_V)).to(logits_V.device), float("-inf"))


def _tell(logits_BV: Tensor, rows: list[Row], chosen: list[int]) -> None:
    """Note how likely the tokens were, for rows that ask."""
    places = [place for place, row in enumerate(rows) if row.sampling.top_logprobs is not None]
    if not places:
        return
    # One row at a time: their log-probabilities together would be a second copy of the logits in float32.
    for place in places:
        row, logprobs_V = rows[place], logits_BV[place].float().log_softmax(-1)
        top = logprobs_V.topk(min(row.sampling.top_logprobs or 0, len(logprobs_V)))
        likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        row.told.append(Told(chosen[place], float(logprobs_V[chosen[place]]), likeliest))


def _drawn(logits_BV: Tensor, rows: list[Row]) -> Tensor:
    """Ids [B]: the inverse cumulative distribution at each row's own draw."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor([[value] for value in values], device=logits_BV.device)

    samplings = [row.sampling for row in rows]
    heat_B1, top_p_B1 = column([s.temperature for s in samplings]), column([s.top_p for s in samplings])
    probs_BV, order_BV = torch.softmax(logits_BV / heat_B1, -1).sort(-1, descending=True)
    cumulative_BV = probs_BV.cumsum(-1)
    if any(s.top_k for s in samplings):
        # top_p is a share of what top_k leaves.
        top_k_B1 = column([s.top_k or logits_BV.shape[1] for s in samplings]).long().clamp(max=logits_BV.shape[1])
        top_p_B1 = top_p_B1 * cumulative_BV.gather(-1, top_k_B1 - 1)
    # A token stays while the mass before it is under top_p: the first one always stays.
    kept_B1 = ((cumulative_BV - probs_BV) < top_p_B1).sum(-1, keepdim=True).clamp(min=1)  # top_p may round to 0
    if any(s.top_k for s in samplings):
        kept_B1 = torch.minimum(kept_B1, top_k_B1)
    if any(s.min_p or s.reshaped for s in samplings):
        least_B1 = probs_BV[:, :1] * column([s.min_p for s in samplings])
        # What a guide forbids has no mass, and must not be drawn by rounding either.
        kept_B1 = torch.minimum(kept_B1, ((probs_BV >= least_B1) & (probs_BV > 0)).sum(-1, keepdim=True))
    mass_B1 = cumulative_BV.gather(-1, kept_B1 - 1)
    draws_B1 = column([row.draws.random() for row in rows]) * mass_B1
    rank_B1 = torch.minimum((cumulative_BV <= draws_B1).sum(-1, keepdim=True), kept_B1 - 1)
    return order_BV.gather(-1, rank_B1).squeeze(-1)
