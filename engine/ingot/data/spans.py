"""question-answering: questions and contexts -> windows of tokens, and where in them the answer stands.

B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ingot.data.encoded import Encoded
from ingot.data.labeled import Asked
from ingot.data.loader import Batch, Drawn, collate
from ingot.data.turns import Tokenizer
from ingot.model.inputs import Span, Window, windows_of
from ingot.recipe import Data, Objective


def asked(
    rows: Sequence[Asked], tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    """Every window of every row, with the first and last token of its first answer.

    A window without the answer learns `nowhere` twice. A question that leaves no room for its context is a row without
    a target.
    """
    results = []
    for row, windows in zip(rows, _windows_of(rows, tokenizer, data), strict=True):
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


def _windows_of(rows: Sequence[Asked], tokenizer: Tokenizer, data: Data) -> list[list[Window]]:
    return windows_of([(row.question, row.context) for row in rows], tokenizer, data.max_tokens, data.overlap_tokens)


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
