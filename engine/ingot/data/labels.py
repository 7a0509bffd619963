"""Rows whose class, labels or tags are learned -> ids and labels. Each encoder gives a row, and whether it was cut."""

from collections.abc import Mapping, Sequence

import torch

from ingot.data.encoded import IGNORE, Encoded
from ingot.data.labeled import Labeled, MultiLabeled, Tagged
from ingot.data.loader import Batch, Drawn, line, padded
from ingot.data.turns import Tokenizer
from ingot.errors import DataError
from ingot.model.inputs import first_tokens, spans_of, text_ids
from ingot.recipe import Data, Objective
from ingot.registry import nearest


def labeled(
    rows: Sequence[Labeled], tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    """The text with its special tokens, and the number of its class."""
    index = {label: number for number, label in enumerate(labels)}
    results = []
    for row, (ids, was_cut) in zip(rows, text_ids([row.text for row in rows], tokenizer, data.max_tokens), strict=True):
        number = _number(row.label, index, row.where)
        results.append((Encoded(ids, [False] * len(ids), [number], row.where), was_cut))
    return results


def multi_labeled(
    rows: Sequence[MultiLabeled], tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    """The text with its special tokens, and for every class a 1 where the row has it."""
    if not labels:
        raise DataError("data.train", "labels", "no training row has a label; there is nothing to learn")
    index = {label: number for number, label in enumerate(labels)}
    results = []
    for row, (ids, was_cut) in zip(rows, text_ids([row.text for row in rows], tokenizer, data.max_tokens), strict=True):
        present = {_number(label, index, row.where) for label in row.labels}
        flags = [int(number in present) for number in range(len(labels))]
        results.append((Encoded(ids, [False] * len(ids), flags, row.where), was_cut))
    return results


def tagged(
    rows: Sequence[Tagged], tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    """The words with blanks between them, and at the first token of each word the number of its tag.

    What has no word to name (later tokens of a word, special ones) is IGNORE. A row that keeps no word has no target.
    """
    index = {label: number for number, label in enumerate(labels)}
    results = []
    for row, (ids, firsts, was_cut) in zip(rows, _first_tokens(rows, tokenizer, data), strict=True):
        numbers = [_number(tag, index, row.where) for tag in row.tags]
        targets = [IGNORE] * len(ids)
        for number, place in zip(numbers, firsts, strict=True):
            if place is not None:
                targets[place] = number
        learned = [target != IGNORE for target in targets]
        results.append((Encoded(ids, learned, targets if any(learned) else None, row.where), was_cut))
    return results


def collate_tagged(
    rows: Sequence[Encoded], pad_id: int, *, flat: bool = False, multiple: int = 1, drawn: Drawn | None = None
) -> Batch:
    """Rows to a batch; `labels_BT` holds the tags where they stand, IGNORE elsewhere."""
    ids = [torch.tensor(row.ids) for row in rows]
    tags = [torch.tensor([IGNORE] * len(row.ids) if row.labels is None else list(row.labels)) for row in rows]
    parts = list(zip(ids, tags, strict=True))
    return line(parts, pad_id, multiple) if flat else padded(parts, pad_id)


def _first_tokens(
    rows: Sequence[Tagged], tokenizer: Tokenizer, data: Data
) -> list[tuple[list[int], list[int | None], bool]]:
    spans = [spans_of(row.words) for row in rows]
    return first_tokens([row.text for row in rows], spans, tokenizer, data.max_tokens)


def _number(label: str, index: Mapping[str, int], where: str) -> int:
    if label not in index:
        raise DataError("label", label, f"training never saw this label; {nearest(label, index)}", where=where)
    return index[label]
