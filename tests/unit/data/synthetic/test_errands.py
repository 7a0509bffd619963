"""The generated letters: the same on every machine, no letter in two splits, and a line that says what is asked for."""

import hashlib
import re

import pytest

from ingot.data.synthetic import generate
from ingot.data.synthetic.errands import GIST, ORDER, SIZES


@pytest.fixture(scope="module")
def splits():
    return {split: list(generate("errands", split)) for split in SIZES}


def test_sizes_and_no_letter_twice(splits):
    assert {split: len(rows) for split, rows in splits.items()} == SIZES
    letters = [row["text"] for rows in splits.values() for row in rows]
    assert len(set(letters)) == len(letters)


def test_lines_name_one_to_three_things_in_order(splits):
    seen = set()
    for row in splits["test"]:
        parts = row["summary"].removesuffix(".").split(", ")
        assert [part.lower().startswith(when) for part, when in zip(parts, ORDER, strict=False)] == [True] * len(parts)
        named = [re.sub(rf"^({'|'.join(ORDER)}) ", "", part.lower()) for part in parts]
        assert len(set(named)) == len(named)
        seen.update(named)
    assert seen == {what.lower() for what in GIST.values()}


def test_the_letters_are_always_the_same(splits):
    text = "\n".join(row["text"] + row["summary"] for row in splits["validation"])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "359821d9c765ff81"
