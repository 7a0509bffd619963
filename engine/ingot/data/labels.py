"""Rows whose class, labels or tags are learned -> ids and labels. Each encoder gives a row, and whether it was cut."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from ingot.data.encoded import IGNORE, Encoded
from ingot.data.labeled import Labeled, MultiLabeled, Tagged
from ingot.data.loader import Batch, Drawn, line, padded
from ingot.data.turns import Tokenizer
from ingot.errors import DataError
from ingot.recipe import Data, Objective
from ingot.registry import nearest

Span = tuple[int, int]


def labeled(
    rows: Sequence[Labeled], tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    """The text with its special tokens, and the number of its class."""
    index = {label: number for number, label in enumerate(labels)}
    results = []
    for row, (ids, was_cut) in zip(rows, _texts([row.text for row in rows], tokenizer, data), strict=True):
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
    for row, (ids, was_cut) in zip(rows, _texts([row.text for row in rows], tokenizer, data), strict=True):
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
    for row, (ids, firsts, was_cut) in zip(rows, first_tokens(rows, tokenizer, data), strict=True):
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


def first_tokens(
    rows: Sequence[Tagged], tokenizer: Tokenizer, data: Data
) -> list[tuple[list[int], list[int | None], bool]]:
    """(ids, place of each word's first token, whether it was cut) of each row.

    The text is encoded as a whole, so training sees the very tokens that a user's text will give: byte-level tokenizers
    write a word without the blank before it with other tokens. A word's place is None where it was cut off, or where
    the tokenizer makes nothing of it (control characters).
    """
    texts = [row.text for row in rows]
    found = tokenizer(texts, return_offsets_mapping=True)
    results = []
    for row, text, ids, spans in zip(rows, texts, found["input_ids"], found["offset_mapping"], strict=True):
        was_cut = len(ids) > data.max_tokens
        if was_cut:
            short = tokenizer(text, truncation=True, max_length=data.max_tokens, return_offsets_mapping=True)
            ids, spans = short["input_ids"], short["offset_mapping"]
        results.append((list(ids), _places(row.words, text, spans), was_cut))
    return results


def _places(words: Sequence[str], text: str, spans: Sequence[Span]) -> list[int | None]:
    """The token with each word's first character. `spans`: characters of each token, (n, n) of a special one."""
    starts = [0, *accumulate(len(word) + 1 for word in words[:-1])]  # in the text: words with a blank between them
    places: list[int | None] = [None] * len(words)
    for place, (start, end) in enumerate(spans):
        while start < end and text[start].isspace():  # some tokenizers count the blank before a word to its token
            start += 1
        word = bisect_right(starts, start) - 1
        if start < end and places[word] is None:
            places[word] = place
    return places


def _texts(texts: Sequence[str], tokenizer: Tokenizer, data: Data) -> list[tuple[list[int], bool]]:
    """Ids of each text with special tokens, at most `data.max_tokens`, and whether it was cut."""
    results = []
    for text, ids in zip(texts, tokenizer(list(texts))["input_ids"], strict=True):
        was_cut = len(ids) > data.max_tokens
        if was_cut:  # cut by the tokenizer, which keeps the closing special token ([SEP]) that a plain cut would lose
            ids = tokenizer(text, truncation=True, max_length=data.max_tokens)["input_ids"]
        results.append((list(ids), was_cut))
    return results


def _number(label: str, index: Mapping[str, int], where: str) -> int:
    if label not in index:
        raise DataError("label", label, f"training never saw this label; {nearest(label, index)}", where=where)
    return index[label]
