"""Texts as words: the same words have the same hashes, wherever they stand, in every script."""

import re

import numpy as np
import pytest

from ingot.data.words import plain, words


def hashes(text: str) -> list[int]:
    return words(plain([text])).hashes.tolist()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Where is my card?", 4),
        ("a check-in, an e-mail", 6),
        ("", 0),
        ("  \n\t", 0),
        ("?!…。", 0),
        ("你好，世界", 4),  # a character each
        ("ここはbankです", 6),
        ("สวัสดี", 6),
        ("हिन्दी भाषा", 2),  # marks belong to their letters
        ("한국어 문장", 2),
        ("3 + 4 = 7", 5),
        ("3 - 4 -1 5-2", 8),  # a minus before a number
        ("x * y / z %", 6),
        ("`code` 🙂", 2),
        ("half \ud800 of one", 3),
    ],
)
def test_words_of_many_scripts(text: str, count: int) -> None:
    assert len(hashes(text)) == count


def test_case_blanks_punctuation_and_width_do_not_matter() -> None:
    assert hashes("Ｗhere is MY ﬁne card?!") == hashes("where\n is my fine  card")
    assert hashes("STRASSE") == hashes("Straße")
    assert hashes("3 + 4") != hashes("3 - 4")
    assert plain(["Ｗhere\u3000is  it?", "a\0b"]) == ["where is it?", "a b"]


def test_a_word_has_one_hash_wherever_it_stands() -> None:
    """Beside Python's own words of real-looking ASCII texts, in one block and alone."""
    draw = np.random.default_rng(0)
    vocabulary = ["".join(draw.choice(list("abcdefgh"), draw.integers(1, 6))) for _ in range(300)]
    texts = [" ".join(draw.choice(vocabulary, draw.integers(0, 40))) for _ in range(50)]
    made = words(plain(texts))
    seen: dict[str, int] = {}
    for number, text in enumerate(texts):
        expected = re.findall(r"\w+", text)
        found = made.hashes[made.starts[number] : made.starts[number + 1]].tolist()
        assert len(found) == len(expected)
        assert found == hashes(text)
        for word, value in zip(expected, found, strict=True):
            assert seen.setdefault(word, value) == value
    assert len(set(seen.values())) == len(seen)
