"""`letters` and `people`: the same everywhere, true to their labels, and tested in words that training does not use."""

import hashlib
import json
from itertools import combinations

import pytest

from ingot.data.synthetic import generate, letters, people

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize(("name", "digest"), [("letters", "23d1bc68a967dcf1"), ("people", "f4408dff31f71bf1")])
def test_rows_are_the_same_on_every_machine(name: str, digest: str) -> None:
    rows = list(generate(name, "test"))
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("split", SPLITS)
def test_letters_say_what_their_labels_say(split: str) -> None:
    rows = list(generate("letters", split))
    assert len(rows) == len({row["text"] for row in rows}) == letters.SIZES[split]
    for row in rows:
        told = [topic for topic, phrases in letters.PHRASES.items() if any(phrase in row["text"] for phrase in phrases)]
        assert row["labels"] == sorted(told)
    assert {len(row["labels"]) for row in rows} == {0, 1, 2, 3}


def test_no_phrase_stands_in_two_splits() -> None:
    for topic in letters.PHRASES:
        for one, other in combinations(SPLITS, 2):
            assert not {*letters.phrases_of(topic, one)} & {*letters.phrases_of(topic, other)}
        assert sum(len(letters.phrases_of(topic, split)) for split in SPLITS) == len(letters.PHRASES[topic])


@pytest.mark.parametrize("split", SPLITS)
def test_answers_stand_where_they_are_said_to(split: str) -> None:
    rows = list(generate("people", split))
    assert len(rows) == people.SIZES[split]
    for row in rows:
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start : start + len(text)] == text
    unanswered = sum(not row["answers"]["text"] for row in rows) / len(rows)
    assert 0.05 < unanswered < 0.2


def test_test_questions_are_worded_otherwise() -> None:
    for fact in people.FACTS.values():
        assert not {*fact.questions} & {*fact.tested}
    seen = {(row["question"], row["context"]) for row in generate("people", "train")}
    assert not [row for row in generate("people", "test") if (row["question"], row["context"]) in seen]
