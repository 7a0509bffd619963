"""Rows of train in test: what repeats is found, and what only looks alike is not."""

import random

import numpy as np
import pytest

from ingot.check.leakage import Texts, common_shingles, near_duplicates, no_leakage, shingles, similarity
from ingot.check.verdict import Status

SYLLABLES = ("ka", "to", "mi", "re", "lun", "ster", "vag", "o", "is", "ent", "ar", "phe")
WORDS = [f"{a}{b}{c}" for a in SYLLABLES for b in SYLLABLES[:4] for c in SYLLABLES]
SYSTEM = " ".join(random.Random(7).choices(WORDS, k=200))


def sentences(seed: int, count: int, length: int = 12) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=length)) + f" {draw.randrange(10**6)}" for _ in range(count)]


def judged(train: list[str], test: list[str]):
    texts = Texts(1000, 0)
    for part, rows in (("train", train), ("test", test)):
        for row in rows:
            texts.add(part, row)
    return no_leakage(texts)


def test_a_long_prompt_that_all_rows_share_makes_no_duplicates():
    train, test = ([f"system: {SYSTEM} user: {text}" for text in sentences(seed, 40)] for seed in (1, 2))
    assert judged(train, test).status is Status.passed
    almost = train[3] + "!"
    verdict = judged(train, [*test, almost])
    assert (verdict.facts["exact"], verdict.facts["near"]) == (0, 1)


def test_one_of_several_prompts_is_common_too():
    prompts = [" ".join(random.Random(seed).choices(WORDS, k=200)) for seed in range(3)]
    train, test = (
        [f"{prompts[n % 3]} {text}" for n, text in enumerate(sentences(seed, 60))] for seed in (1, 2)
    )  # fmt: skip
    assert judged(train, test).status is Status.passed


def test_rows_that_differ_in_common_words_only_are_not_alike():
    """A template's slots: what differs counts in full, however many rows have it."""
    train = [f"book a table for {n} at the {place}" for n in ("two", "three", "four") for place in WORDS[:50]]
    common = common_shingles(train)
    one, other = (shingles(f"book a table for {n} at the {WORDS[0]}") for n in ("two", "four"))
    assert similarity(one, other, common) < 0.9
    assert similarity(one, one, common) == 1.0


@pytest.mark.parametrize("n_train", [1, 2, 3, 20])
def test_few_rows(n_train):
    train = [f"system: {SYSTEM} user: {text}" for text in sentences(1, n_train)]
    test = [f"system: {SYSTEM} user: {text}" for text in sentences(2, 2)]
    assert judged(train, test).status is Status.passed
    assert judged(train, [*test, train[0]]).facts["exact"] == 1


def test_a_repeat_is_found_among_training_rows_that_are_not_kept():
    train, test = sentences(1, 3000, 3), sentences(2, 20, 3)
    texts = Texts(10, 0)
    for row in train:
        texts.add("train", row)
    for row in [*test[:5], *train[:5]]:
        texts.add("test", row)
    assert len(texts.kept["train"]) == 100
    assert no_leakage(texts).facts["exact"] == 5


def test_near_duplicates_are_those_of_comparing_all_pairs():
    draw = random.Random(3)
    train = sentences(1, 200)
    test = []
    for number in range(60):  # from hardly to much changed
        words = train[number].split()
        for _ in range(number % 4):
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        test.append(" ".join(words))
    common, sets = common_shingles(train), [shingles(text) for text in train]
    wanted = [n for n, text in enumerate(test) if max(similarity(shingles(text), it, common) for it in sets) >= 0.9]
    assert [match.test for match in near_duplicates(train, test)] == wanted
    assert 15 <= len(wanted) < 60


def test_shingles_are_bytes_without_case_and_blanks():
    assert np.array_equal(shingles("Grüße  an\nALLE"), shingles("grüsse an alle"))
    assert len(shingles("a")) == 1
    assert len(shingles("")) == 1
