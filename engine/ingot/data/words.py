"""Texts as words, and words as numbers: what overlap between rows is counted in, whatever the language.

A word is a run of letters, marks and digits; a symbol is one, and so is every character of a script that is written
without blanks (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan). Punctuation separates. All of a block of texts
is read at once by numpy: 22 ns a character, where a regular expression and a checksum a word take 48.

N characters or words, T words of all texts, S spans.
"""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.uint64]
Places = NDArray[np.int64]
GAP, INSIDE, ALONE, UNKNOWN = 0, 1, 2, 255
WITHOUT_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
OPERATORS = frozenset("*/%")  # punctuation to Unicode; `3 * 4` and `3 / 4` are different questions
FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(FACTOR, -1, 1 << 64)
_kinds: NDArray[np.uint8] = np.full(0x110000, UNKNOWN, dtype=np.uint8)  # of the code points met so far
_kinds[0] = GAP


class Words(NamedTuple):
    """Words of several texts: `hashes` [T], of which `starts[i]` to `starts[i + 1]` are those of text i."""

    hashes: Ints
    starts: Places


def plain(texts: Sequence[str]) -> list[str]:
    """Each text in the form in which repeats are equal: NFKC (Unicode Standard Annex 15), case folded, one blank where
    there are any.
    """
    folded = _folded("\0".join(texts)).split("\0")
    if len(folded) != len(texts):  # a text holds the separator itself
        folded = [_folded(text.replace("\0", " ")) for text in texts]
    return [" ".join(text.split()) for text in folded]


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def words(texts: Sequence[str]) -> Words:
    """The words of texts that `plain` made."""
    codes = np.frombuffer("".join(f"{text}\0" for text in texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kinds = _kinds_of(codes)
    _mark_minus(codes, kinds)
    inside, alone = kinds == INSIDE, kinds == ALONE
    begins = np.flatnonzero(alone | (inside & ~np.roll(inside, 1)))  # the last character, a zero, is a gap
    ends = np.flatnonzero(alone | (inside & ~np.roll(inside, -1))) + 1
    bounds = np.searchsorted(begins, np.flatnonzero(codes == 0))
    return Words(span_hashes(codes.astype(np.uint64), begins, ends), np.concatenate([[0], bounds]))


def span_hashes(values_N: Ints, begins_S: Places, ends_S: Places) -> Ints:
    """A hash [S] of each stretch of `values_N`, from its begin up to its end: a polynomial modulo 2**64 from sums over
    all that stands before (Karp & Rabin 1987), mixed by the end of splitmix64 (Steele et al. 2014).
    """
    powers, inverses = _powers(len(values_N))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(values_N * powers[: len(values_N)])])
    found: Ints = (sums[ends_S] - sums[begins_S]) * inverses[begins_S]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found ^= found >> np.uint64(shift)
        found *= np.uint64(factor)
    return found ^ (found >> np.uint64(31))


_held = (np.ones(1, dtype=np.uint64), np.ones(1, dtype=np.uint64))


def _powers(n: int) -> tuple[Ints, Ints]:
    """Powers of FACTOR and of its inverse, from 0 to `n` at least."""
    global _held
    if len(_held[0]) <= n:
        size = 1 << (n + 1).bit_length()
        made = []
        for factor in (FACTOR, _INVERSE):
            row = np.full(size, factor, dtype=np.uint64)
            row[0] = 1
            made.append(np.multiply.accumulate(row))
        _held = made[0], made[1]
    return _held


def _kinds_of(codes: NDArray[np.uint32]) -> NDArray[np.uint8]:
    kinds = _kinds[codes]
    new = codes[kinds == UNKNOWN]
    if len(new):
        for code in np.unique(new).tolist():
            _kinds[code] = _kind(chr(code))
        kinds = _kinds[codes]
    return kinds


def _kind(character: str) -> int:
    category = unicodedata.category(character)
    if category[0] == "S" or character in OPERATORS:
        return GAP if character == "`" else ALONE
    if category[0] not in "LMN":
        return GAP
    return ALONE if unicodedata.name(character, "").startswith(WITHOUT_BLANKS) else INSIDE


def _mark_minus(codes: NDArray[np.uint32], kinds: NDArray[np.uint8]) -> None:
    """A hyphen right before a number, or with one blank between, is a minus and a word of its own."""
    places = np.flatnonzero((codes == ord("-")) | (codes == 0x2212))
    for step in (1, 2):
        after = np.minimum(places + step, len(codes) - 1)
        is_digit = (codes[after] >= ord("0")) & (codes[after] <= ord("9"))
        between = codes[np.minimum(places + 1, len(codes) - 1)] == ord(" ") if step == 2 else True
        kinds[places[is_digit & between]] = ALONE
