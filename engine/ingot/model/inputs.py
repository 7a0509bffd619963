"""Texts -> the token ids that a model is trained on, measured with and asked with: one way for all three.

Self-contained (standard library): the MLflow package holds a copy. No transformers, so that data/ stays light.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

Tokenizer = Any  # transformers' fast tokenizer
Span = tuple[int, int]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prefix_of(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text of its own accord (a BOS, or nothing), learned by asking it."""
    bare, dressed = ids_of(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    return dressed[: next((n for n in range(len(dressed)) if dressed[n : n + len(bare)] == bare), 0)]


def with_prefix(ids: list[int], prefix: list[int]) -> list[int]:
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of all tokens that the tokenizer holds as special."""
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*tokenizer.all_special_ids, *added])


def text_ids(texts: Sequence[str], tokenizer: Tokenizer, longest: int | None) -> list[tuple[list[int], bool]]:
    """Ids of each text with special tokens, at most `longest` (None: all), and whether it was cut."""
    if not texts:
        return []
    results = []
    for text, ids in zip(texts, tokenizer(list(texts), verbose=False)["input_ids"], strict=True):
        was_cut = longest is not None and len(ids) > longest
        if was_cut:  # cut by the tokenizer, which keeps the closing special token ([SEP]) that a plain cut would lose
            ids = tokenizer(text, truncation=True, max_length=longest)["input_ids"]
        results.append((list(ids), was_cut))
    return results


# --- pairs of a prompt and its completion ---


def joined_text(prompt: str, completion: str) -> tuple[str, int]:
    """Prompt and completion as one text, and the character where the completion begins.

    One space is put between them where neither brings a blank of its own; spaces at the joint count as completion.
    """
    apart = prompt[-1:].isspace() or completion[:1].isspace()
    return prompt + ("" if apart else " ") + completion, len(prompt.rstrip(" "))


def whole_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text from its beginning to its end: the tokenizer's own prefix, once, and eos."""
    ids, eos = with_prefix(ids_of(tokenizer, text), prefix_of(tokenizer)), tokenizer.eos_token_id
    return ids if ids and ids[-1] == eos else [*ids, int(eos)]


# --- words ---


def word_spans(text: str) -> list[Span]:
    """Characters of every word of a text: what stands between blanks."""
    return [found.span() for found in re.finditer(r"\S+", text)]


def spans_of(words: Sequence[str]) -> list[Span]:
    """Characters of every word in the text of them with one blank between each two."""
    starts = [0, *accumulate(len(word) + 1 for word in words[:-1])]
    return [(start, start + len(word)) for start, word in zip(starts, words, strict=True)]


def first_tokens(
    texts: Sequence[str], words: Sequence[Sequence[Span]], tokenizer: Tokenizer, longest: int | None
) -> list[tuple[list[int], list[int | None], bool]]:
    """(ids, place of each word's first token, whether it was cut) of each text. `words`: characters of its words.

    The text is encoded as a whole, so training sees the very tokens that a user's text will give: byte-level tokenizers
    write a word without the blank before it with other tokens. A word's place is None where it was cut off, or where
    the tokenizer makes nothing of it (control characters).
    """
    found = tokenizer(list(texts), return_offsets_mapping=True, verbose=False)
    results = []
    for text, its, ids, spans in zip(texts, words, found["input_ids"], found["offset_mapping"], strict=True):
        was_cut = longest is not None and len(ids) > longest
        if was_cut:
            short = tokenizer(text, truncation=True, max_length=longest, return_offsets_mapping=True)
            ids, spans = short["input_ids"], short["offset_mapping"]
        results.append((list(ids), _places([start for start, _ in its], text, spans), was_cut))
    return results


def _places(starts: Sequence[int], text: str, spans: Sequence[Span]) -> list[int | None]:
    """The token with each word's first character. `spans`: characters of each token, (n, n) of a special one."""
    places: list[int | None] = [None] * len(starts)
    for place, (start, end) in enumerate(spans):
        while start < end and text[start].isspace():  # some tokenizers count the blank before a word to its token
            start += 1
        word = bisect_right(starts, start) - 1
        if start < end and places[word] is None:
            places[word] = place
    return places


# --- questions about a context ---


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


def windows_of(
    asked: Sequence[tuple[str, str]], tokenizer: Tokenizer, longest: int, overlap: int
) -> list[list[Window]]:
    """The windows of each (question, context), in order: at most `longest` tokens, neighbours share `overlap`.

    None for a question that leaves no room. Where it leaves no more than the overlap, windows share half of the room.
    """
    if not asked:
        return []
    specials = tokenizer.num_special_tokens_to_add(pair=True)
    questions = tokenizer([question for question, _ in asked], add_special_tokens=False)["input_ids"]
    found: list[list[Window]] = [[] for _ in asked]
    by_overlap: dict[int, list[int]] = {}
    for number, question in enumerate(questions):
        room = longest - len(question) - specials
        if room > 0:
            by_overlap.setdefault(overlap if room > overlap else room // 2, []).append(number)
    for shared, numbers in by_overlap.items():
        encoded = tokenizer(
            [asked[number][0] for number in numbers],
            [asked[number][1] for number in numbers],
            truncation="only_second",
            max_length=longest,
            stride=shared,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for place, number in enumerate(encoded["overflow_to_sample_mapping"]):
            found[numbers[number]].append(_window(encoded, place, asked[numbers[number]][1], tokenizer))
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


# --- sources of what a decoder writes ---


def source_ids(texts: Sequence[str], tokenizer: Tokenizer, longest: int | None) -> list[tuple[list[int], bool]]:
    """Ids of each text with the tokenizer's special tokens, at most `longest`, and whether it was cut.

    What is too long loses the end of its text, never the special tokens behind it.
    """
    if not texts:
        return []
    specials, found = special_ids(tokenizer), []
    for ids in tokenizer(list(texts))["input_ids"]:
        if longest is None or len(ids) <= longest:
            found.append((list(ids), False))
            continue
        n_closing = next((n for n, token in enumerate(reversed(ids)) if token not in specials), 0)
        kept = max(0, longest - n_closing)
        found.append(([*ids[:kept], *ids[len(ids) - n_closing :]][:longest], True))
    return found


def first_of_target(tokenizer: Tokenizer) -> int | None:
    """The special token that the tokenizer puts before every target, if there is one."""
    first = int(tokenizer(text_target="a")["input_ids"][0])
    return first if first in special_ids(tokenizer) else None
