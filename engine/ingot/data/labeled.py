"""Rows with something to point out in a text: its class, its labels, its words' tags, or the answer to a question."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ingot.data.fields import Unusable, checked, parsed, text_of, value_of
from ingot.data.sources import Row
from ingot.recipe import Data


@dataclass(frozen=True)
class Labeled:
    """A text and the name of its class."""

    text: str
    label: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class MultiLabeled:
    """A text and the names of its labels, sorted; there may be none."""

    text: str
    labels: tuple[str, ...]
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Tagged:
    """Words, and a tag for each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    where: str = field(default="", compare=False)

    @property
    def text(self) -> str:
        """The words with blanks between them."""
        return " ".join(self.words)


@dataclass(frozen=True)
class Asked:
    """A question about a context. `answers`: (text, character of the context where it begins), or none.

    Training learns the first one.
    """

    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    where: str = field(default="", compare=False)


def labeled(row: Row, data: Data) -> Labeled:
    """The columns `text` and `label`."""
    label = _label(value_of(row, data, "label"), "label")
    return Labeled(text_of(value_of(row, data, "text"), "text"), label, row.where)


def multi_labeled(row: Row, data: Data) -> MultiLabeled:
    """The columns `text` and `labels`: a list, or a list as JSON."""
    found = parsed(value_of(row, data, "labels"), "labels")
    if not isinstance(found, list):
        raise Unusable(f"labels must be a list, this is {_kind(found)}")
    names = sorted({_label(value, f"labels[{number}]") for number, value in enumerate(found)})
    return MultiLabeled(text_of(value_of(row, data, "text"), "text"), tuple(names), row.where)


def tagged(row: Row, data: Data) -> Tagged:
    """The columns `tokens` and `tags`: lists of one length, or lists as JSON."""
    words, tags = (parsed(value_of(row, data, name), name) for name in ("tokens", "tags"))
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise Unusable("tokens must be a list of words")
    if not isinstance(tags, list) or len(tags) != len(words):
        raise Unusable(f"tags must be a list of {len(words)} tags, one for each of tokens")
    names = tuple(_label(tag, f"tags[{number}]") for number, tag in enumerate(tags))
    return Tagged(tuple(checked(word, "tokens") for word in words), names, row.where)


def asked(row: Row, data: Data) -> Asked:
    """The columns `question`, `context` and `answers`: {"text": [...], "answer_start": [...]}, as SQuAD writes them."""
    context = checked(_text(row, data, "context"), "context")
    found = parsed(value_of(row, data, "answers"), "answers")
    texts, starts = (found.get("text"), found.get("answer_start")) if isinstance(found, Mapping) else (None, None)
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise Unusable('answers must be {"text": [...], "answer_start": [...]} with lists of one length')
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool) or not text.strip():
            raise Unusable("answers.text must be texts and answers.answer_start integers")
        if start < 0 or context[start : start + len(text)] != text:
            raise Unusable(f"answers: {text!r} does not stand at character {start} of the context")
    return Asked(_text(row, data, "question"), context, tuple(zip(texts, starts, strict=True)), row.where)


def _text(row: Row, data: Data, name: str) -> str:
    return text_of(value_of(row, data, name), name)


def _label(value: Any, name: str) -> str:
    if isinstance(value, float | bool) or not isinstance(value, str | int):
        raise Unusable(f"{name} must be text or an integer, this is {_kind(value)}")
    if not str(value).strip():
        raise Unusable(f"{name} is empty")
    return checked(str(value), name)


def _kind(value: Any) -> str:
    return "empty" if value is None else type(value).__name__
