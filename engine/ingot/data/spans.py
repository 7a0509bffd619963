"""question-answering: questions and contexts -> windows of tokens, and where in them the answer stands.

B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ingot.data.encoded import Encoded
from ingot.data.labeled import Asked
from ingot.data.loader import Batch, Drawn, collate
from ingot.data.turns import Tokenizer
from ingot.recipe import Data, Objective

Span = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A question with a stretch of its context. `spans[t]`: characters of the context at token t, None where there are
    none (the question, special tokens). `nowhere`: the token that stands for "not here", CLS or the first one. `parts`:
    tokens of the first and the second segment, where the model is told them apart.
    """

    ids: list[int]
    spans: list[Span | None]
    nowhere: int
    parts: tuple[int, ...]

    def tokens_of(self, start: int, end: int) -> Span | None:
        """First and last token of the context's characters `start` to `end`; None where they are not all here."""
        here = [(place, span) for place, span in enumerate(self.spans) if span is not None]
        if not here or here[0][1][0] > start or here[-1][1][1] < end:
            return None
        first = next(place for place, span in here if span[1] > start)
        last = next(place for place, span in reversed(here) if span[0] < end)
        return (first, last) if first <= last else None


def asked(
    rows: Sequence[Asked], tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    """Every window of every row, with the first and last token of its first answer.

    A window without the answer learns `nowhere` twice. A question that leaves no room for its context is a row without
    a target.
    """
    results = []
    for row, windows in zip(rows, windows_of(rows, tokenizer, data), strict=True):
        if not windows:
            ids = list(tokenizer(row.question)["input_ids"])[: data.max_tokens]
            results.append((Encoded(ids, [False] * len(ids), None, row.where), True))
        for window in windows:
            first, last = _answer(row, window)
            learned = [first <= place <= last for place in range(len(window.ids))]
            results.append((Encoded(window.ids, learned, [first, last], row.where, window.parts), False))
    return results


def _answer(row: Asked, window: Window) -> Span:
    if row.answers:
        text, start = row.answers[0]
        found = window.tokens_of(start, start + len(text))
        if found is not None:
            return found
    return window.nowhere, window.nowhere


def windows_of(rows: Sequence[Asked], tokenizer: Tokenizer, data: Data) -> list[list[Window]]:
    """The windows of each row, in order: at most `data.max_tokens` tokens, neighbours share `data.overlap_tokens`.

    None for a question that leaves no room. Where it leaves no more than the overlap, windows share half of the room.
    """
    specials = tokenizer.num_special_tokens_to_add(pair=True)
    questions = tokenizer([row.question for row in rows], add_special_tokens=False)["input_ids"]
    found: list[list[Window]] = [[] for _ in rows]
    by_overlap: dict[int, list[int]] = {}
    for number, question in enumerate(questions):
        room = data.max_tokens - len(question) - specials
        if room > 0:
            overlap = data.overlap_tokens if room > data.overlap_tokens else room // 2
            by_overlap.setdefault(overlap, []).append(number)
    for overlap, numbers in by_overlap.items():
        pairs = [rows[number] for number in numbers]
        encoded = tokenizer(
            [row.question for row in pairs],
            [row.context for row in pairs],
            truncation="only_second",
            max_length=data.max_tokens,
            stride=overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for place, number in enumerate(encoded["overflow_to_sample_mapping"]):
            found[numbers[number]].append(_window(encoded, place, rows[numbers[number]].context, tokenizer))
    return found


def _window(encoded: Any, place: int, context: str, tokenizer: Tokenizer) -> Window:
    ids = list(encoded["input_ids"][place])
    sides = encoded.sequence_ids(place)
    spans = [
        _inked(context, span) if side == 1 else None
        for side, span in zip(sides, encoded["offset_mapping"][place], strict=True)
    ]
    nowhere = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
    types = list(encoded["token_type_ids"][place]) if "token_type_ids" in encoded else []
    parts = (types.count(0), types.count(1)) if types == sorted(types) and set(types) == {0, 1} else ()
    return Window(ids, spans, nowhere, parts)


def _inked(context: str, span: Span) -> Span | None:
    """`span` without blanks before it, which some tokenizers count to the word's token; None where nothing is left."""
    start, end = span
    while start < end and context[start].isspace():
        start += 1
    return (start, end) if start < end else None


def collate_asked(
    rows: Sequence[Encoded], pad_id: int, *, flat: bool = False, multiple: int = 1, drawn: Drawn | None = None
) -> Batch:
    """Windows to a padded batch; where the tokenizer tells question and context apart, so does `types_BT`."""
    batch = collate(rows, pad_id, flat=flat, multiple=multiple)
    if not all(row.parts for row in rows):
        return batch
    types_BT = torch.zeros_like(batch.ids_BT)
    for number, row in enumerate(rows):
        types_BT[number, row.parts[0] : len(row.ids)] = 1
    return replace(batch, types_BT=types_BT)
