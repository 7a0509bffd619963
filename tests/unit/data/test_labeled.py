"""Rows of files as labels, tags and questions: what is read, and the reason why the rest is not."""

import re
from typing import Any

import pytest

from ingot.data.example import classes_of, to_example
from ingot.data.labeled import Asked, MultiLabeled, Tagged
from ingot.data.sources import BadRow, Row
from ingot.recipe import Data, Objective

SEVERAL, TAGS, POINT = (
    Objective(task=task) for task in ("multi-label-classification", "token-classification", "question-answering")
)
DATA = Data(train="f")


def read(objective: Objective, **values: Any) -> Any:
    return to_example(Row(values, "f:1"), DATA, objective)


def test_label_sets() -> None:
    assert read(SEVERAL, text="x", labels=["b", "a", "b", 3]) == MultiLabeled("x", ("3", "a", "b"))
    assert read(SEVERAL, text="x", labels='["b"]') == MultiLabeled("x", ("b",))  # a cell of a CSV file
    none = read(SEVERAL, text="x", labels=[])
    assert none == MultiLabeled("x", ())
    assert (classes_of(none), classes_of(read(SEVERAL, text="x", labels=["b", "a"]))) == ((), ("a", "b"))


def test_tags() -> None:
    row = read(TAGS, tokens=["New", "York"], tags=["B", "I"])
    assert (row, row.text) == (Tagged(("New", "York"), ("B", "I")), "New York")
    assert read(TAGS, tokens='["New"]', tags='["B"]') == Tagged(("New",), ("B",))
    assert classes_of(read(TAGS, tokens=["a", "b", "c"], tags=["O", "B", "O"])) == ("B", "O")


def test_questions() -> None:
    answers = {"text": ["Rome", "Rome"], "answer_start": [0, 9]}
    row = read(POINT, question="Where?", context="Rome, in Rome", answers=answers)
    assert row == Asked("Where?", "Rome, in Rome", (("Rome", 0), ("Rome", 9)))
    none = read(POINT, question="Where?", context="Rome", answers={"text": [], "answer_start": []})
    assert none.answers == ()


@pytest.mark.parametrize(
    ("objective", "values", "reason"),
    [
        (SEVERAL, {"labels": "a"}, "labels is not JSON"),
        (SEVERAL, {"labels": {"a": 1}}, "labels must be a list, this is dict"),
        (SEVERAL, {"labels": None}, "labels must be a list, this is empty"),
        (SEVERAL, {"labels": ["a", 1.5]}, r"labels\[1\] must be text or an integer, this is float"),
        (SEVERAL, {"labels": ["a", " "]}, r"labels\[1\] is empty"),
        (TAGS, {"tokens": "no list", "tags": ["O"]}, "tokens is not JSON"),
        (TAGS, {"tokens": "[" * 100_000, "tags": ["O"]}, "tokens is not JSON: nested too deeply"),
        (TAGS, {"tokens": [], "tags": []}, "tokens must be a list of words"),
        (TAGS, {"tokens": ["a", " "], "tags": ["O", "O"]}, "tokens must be a list of words"),
        (TAGS, {"tokens": ["a", "b"], "tags": ["O"]}, "tags must be a list of 2 tags"),
        (TAGS, {"tokens": ["a"], "tags": [None]}, r"tags\[0\] must be text"),
        (POINT, {"answers": ["Rome"]}, "answers must be"),
        (POINT, {"answers": {"text": ["Rome"], "answer_start": []}}, "lists of one length"),
        (POINT, {"answers": {"text": ["Rome"], "answer_start": [1]}}, "'Rome' does not stand at character 1"),
        (POINT, {"answers": {"text": ["Rome"], "answer_start": [-4]}}, "does not stand at character -4"),
        (POINT, {"answers": {"text": ["Rome"], "answer_start": [True]}}, "answers.answer_start integers"),
        (POINT, {"answers": {"text": [""], "answer_start": [0]}}, "answers.text must be texts"),
        (POINT, {"answers": {"text": [], "answer_start": []}, "question": " "}, "question is empty"),
    ],
)
def test_what_cannot_be_used_has_a_reason(objective: Objective, values: dict[str, Any], reason: str) -> None:
    row = to_example(Row({"text": "x", "question": "Where?", "context": "Rome", **values}, "f:1"), DATA, objective)
    assert isinstance(row, BadRow)

    assert re.search(reason, row.reason), row.reason
