"""What a model points out in texts: words' tags, answers in a context, tokens behind a mask.

Evaluation and every answer that a package gives come from these functions. Self-contained (standard library, torch, its
neighbours `inputs.py` and `kinds.py`): the MLflow package holds a copy. Callers switch gradients off.
"""

# B rows, T tokens, C classes, K places, V vocabulary

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .inputs import Window
from .kinds import batches, logits_of, padded

OUTSIDE = "O"  # the tag of a word that belongs to nothing
MARKS = "BIESUL"  # what a tag such as B-person begins with, in all schemes
Tag = tuple[int, float]
"""A class's number and its probability."""


def outside_of(labels: Sequence[str]) -> str:
    """The tag of a word that was cut off."""
    return OUTSIDE if OUTSIDE in labels else labels[0]


def tags_at(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    places: Sequence[Sequence[int | None]],
    pad: int,
    tokens_per_batch: int,
) -> list[list[Tag | None]]:
    """The likeliest class at each of the `places` of every row of ids; None for a place None."""
    found: list[list[Tag | None]] = [[] for _ in rows]
    for part in batches([len(row) for row in rows], tokens_per_batch):
        shares_BTC = logits_of(model(**padded(model, [rows[index] for index in part], pad))).softmax(-1)
        most = shares_BTC.max(-1)
        for index, classes, shares in zip(part, most.indices.tolist(), most.values.tolist(), strict=True):
            found[index] = [None if at is None else (classes[at], shares[at]) for at in places[index]]
    return found


class Entity(NamedTuple):
    """Words that belong together. `start` and `end`: characters of the text; `score`: mean probability of its tags."""

    type: str
    start: int
    end: int
    score: float


def entities_of(
    tags: Sequence[str], shares: Sequence[float], spans: Sequence[tuple[int, int]], labels: Sequence[str]
) -> list[Entity]:
    """The entities of a row of words, as conlleval reads tags (I- after another type begins one). Where none of the
    model's `labels` has such a mark, every word whose tag is not O is one.
    """
    parted = [_parted(tag, any(_is_marked(label) for label in labels)) for tag in tags]
    found: list[list[int]] = []
    before = "", ""
    for number, (mark, kind) in enumerate(parted):
        if mark and kind == before[1] and mark in "IEL" and before[0] in "BI":
            found[-1].append(number)
        elif mark:
            found.append([number])
        before = mark, kind
    return [
        Entity(
            parted[words[0]][1],
            spans[words[0]][0],
            spans[words[-1]][1],
            math.fsum(shares[word] for word in words) / len(words),
        )
        for words in found
    ]


def _is_marked(tag: str) -> bool:
    return tag[:1] in tuple(MARKS) and tag[1:2] == "-" and len(tag) > 2


def _parted(tag: str, marked: bool) -> tuple[str, str]:
    """Mark and type; no mark: outside of everything."""
    if _is_marked(tag):
        return tag[0], tag[2:]
    return ("", "") if marked or tag == OUTSIDE else ("S", tag)


class Answer(NamedTuple):
    """An answer: its log-probability, the characters of its context, and the log-probability of "not here" (the least
    of all windows).
    """

    score: float = -math.inf
    start: int = 0
    end: int = 0
    nowhere: float = math.inf

    def or_else(self, other: "Answer") -> "Answer":
        """The better of both, over the windows of both."""
        better = other if other.score > self.score else self
        return better._replace(nowhere=min(self.nowhere, other.nowhere))


def answers_in(
    model: nn.Module, rows: Sequence[Sequence[Window]], longest: int, pad: int, tokens_per_batch: int
) -> list[Answer]:
    """The likeliest stretch of at most `longest` tokens over all windows of each row."""
    places = [(index, window) for index, windows in enumerate(rows) for window in windows]
    best = [Answer()] * len(rows)
    for part in batches([len(window.ids) for _, window in places], tokens_per_batch):
        shown = [places[place] for place in part]
        for (index, _), answer in zip(shown, _in_batch(model, [it for _, it in shown], longest, pad), strict=True):
            best[index] = best[index].or_else(answer)
    return best


def _in_batch(model: nn.Module, windows: Sequence[Window], longest: int, pad: int) -> list[Answer]:
    inputs = padded(model, [window.ids for window in windows], pad, [window.parts for window in windows])
    logits_BT2 = logits_of(model(**inputs))
    row_BT = inputs["attention_mask"].bool()
    context_BT = torch.zeros_like(row_BT)
    for number, window in enumerate(windows):
        context_BT[number, : len(window.ids)] = torch.tensor([span is not None for span in window.spans])
    scores, firsts, lasts = (found_B.tolist() for found_B in best_spans(logits_BT2, row_BT, context_BT, longest))
    shares_BT2 = log_shares(logits_BT2, row_BT)
    answers = []
    for number, window in enumerate(windows):
        begin, end = window.spans[firsts[number]], window.spans[lasts[number]]
        stretch = (0, 0) if begin is None or end is None else (begin[0], end[1])
        nowhere = float(shares_BT2[number, window.nowhere].sum())
        answers.append(Answer(scores[number], stretch[0], stretch[1], nowhere))
    return answers


def best_spans(logits_BT2: Tensor, row_BT: Tensor, context_BT: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """(score [B], first token [B], last token [B]) of the likeliest answer of at most `longest` tokens of the context.

    Scores are log-probabilities among the row's tokens. `row_BT`, `context_BT` bool: no padding; the context's tokens.
    """
    shares_BT2 = log_shares(logits_BT2, row_BT).masked_fill(~context_BT.unsqueeze(-1), -torch.inf)
    scores_BTT = shares_BT2[:, :, None, 0] + shares_BT2[:, None, :, 1]
    length = scores_BTT.shape[1]
    allowed_TT = torch.ones(length, length, dtype=torch.bool, device=scores_BTT.device).triu().tril(longest - 1)
    score_B, place_B = scores_BTT.masked_fill(~allowed_TT, -torch.inf).flatten(1).max(1)
    return score_B, place_B // length, place_B % length


def log_shares(logits_BT2: Tensor, row_BT: Tensor) -> Tensor:
    """Log-probability of each token to be the first, or the last, of the answer; padding takes no part."""
    return logits_BT2.float().masked_fill(~row_BT.unsqueeze(-1), torch.finfo(torch.float32).min).log_softmax(1)


def logits_at(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    pad: int,
    tokens_per_batch: int,
) -> Iterator[tuple[int, Tensor]]:
    """(number of the row, logits [K, V] float32 on the CPU at its `places`), batch by batch."""
    for part in batches([len(row) for row in rows], tokens_per_batch):
        logits_BTV = model(**padded(model, [rows[index] for index in part], pad)).logits
        for number, index in enumerate(part):
            yield index, logits_BTV[number, list(places[index])].float().cpu()
