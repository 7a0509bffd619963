"""Rows that stand in both train and test, exactly or nearly: a score on them measures memory.

Near duplicates are found with MinHash (Broder 1997) in bands (Leskovec et al. 2020, chapter 3) over character shingles
and confirmed one by one. What many training rows hold (a system prompt, the words of a prompt template) counts as no
likeness: two rows are near where what they alone share is large beside all in which they differ.
"""

import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ingot.data.overlap import MinHash, digest, own, similarity, too_many
from ingot.data.words import Ints

from .verdict import Status, Verdict

SHINGLE = 5  # bytes: five fit into an integer, so that no two of them are taken for one
NEAR = 0.9  # similarity from which two rows are near duplicates
BANDS, ROWS_PER_BAND = 16, 4  # finds a pair of similarity 0.9 with probability 1 - 5e-8
CANDIDATES = 20  # training rows that are compared with a test row: those that share most bands
SURVEYED = 1000  # training rows in which common shingles are counted
TRAIN_ROWS = 10  # training rows that are kept for each test row
LEAKED_SHARE = 0.01  # public benchmarks of short questions have 0.2 to 0.5 % (banking77)
LISTED = 3


@dataclass(frozen=True)
class Match:
    """A test row and the training row that it repeats. `similarity`: as `similarity` tells it."""

    test: int
    train: int
    similarity: float


def near_duplicates(train: Sequence[str], test: Sequence[str]) -> list[Match]:
    """For each text of `test` that has one, its most similar text of `train` with a similarity of at least NEAR.

    Holds the signatures of all rows and the shingles of one, so memory does not depend on how long rows are.
    """
    hashing, common = MinHash(BANDS * ROWS_PER_BAND, ROWS_PER_BAND), common_shingles(train)
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, text in enumerate(train):
        for key in _bands(own(shingles(text), common), hashing):
            buckets[key].append(number)
    matches = []
    for number, text in enumerate(test):
        found = shingles(text)
        votes = Counter(other for key in _bands(own(found, common), hashing) for other in buckets.get(key, ()))
        likely = [other for other, _ in votes.most_common(CANDIDATES)]
        best = max(((similarity(found, shingles(train[other]), common), -other) for other in likely), default=(0.0, 0))
        if best[0] >= NEAR:
            matches.append(Match(number, -best[1], best[0]))
    return matches


def shingles(text: str) -> Ints:
    """Every stretch of SHINGLE bytes as a number, sorted, blanks and case aside; the whole text where it is shorter."""
    plain = np.frombuffer(" ".join(text.casefold().split()).encode().ljust(SHINGLE, b"\0"), dtype=np.uint8)
    n, found = len(plain) - SHINGLE + 1, np.zeros(len(plain) - SHINGLE + 1, dtype=np.uint64)
    for place in range(SHINGLE):
        found = (found << np.uint64(8)) | plain[place : place + n]
    return np.unique(found)


def common_shingles(texts: Sequence[str]) -> Ints:
    """Shingles of more of `texts` than `too_many` allows."""
    step = max(1, len(texts) // SURVEYED)
    surveyed = texts[::step]
    if not surveyed:
        return np.zeros(0, dtype=np.uint64)
    values, counts = np.unique(np.concatenate([shingles(text) for text in surveyed]), return_counts=True)
    return values[counts > too_many(len(surveyed))]


def _bands(found: Ints, hashing: MinHash) -> list[tuple[int, int]]:
    """The bucket of each band that a set falls into; an empty one falls into none."""
    if not len(found):
        return []
    return list(enumerate(hashing.buckets(hashing.signatures(found, np.zeros(1, dtype=np.int64)))[0].tolist()))


class Texts:
    """What rows of train and test ask; of very many a share is kept, drawn with `seed` (Vitter 1985, algorithm R).

    Of every training row a digest is kept (8 bytes), so that exact repeats are found among all of them. `measured`:
    whether the recipe measures anything on the test rows.
    """

    def __init__(self, limit: int, seed: int, *, measured: bool = True) -> None:
        self.measured = measured
        self._limits = {"train": TRAIN_ROWS * limit, "test": limit}
        self._draw = random.Random(f"leakage {seed}")
        self.seen: dict[str, int] = {"train": 0, "test": 0}
        self.kept: dict[str, list[str]] = {"train": [], "test": []}
        self._digests = array("Q")

    def add(self, part: str, text: str) -> None:
        """Take a row of `part`."""
        kept, limit = self.kept[part], self._limits[part]
        self.seen[part] += 1
        if part == "train":
            self._digests.append(digest(text))
        if len(kept) < limit:
            kept.append(text)
        elif (place := self._draw.randrange(self.seen[part])) < limit:
            kept[place] = text

    def repeated(self) -> list[bool]:
        """Of each kept test row whether a training row asks the same."""
        asked = np.array([digest(text) for text in self.kept["test"]], dtype=np.uint64)
        return list(np.isin(asked, np.frombuffer(self._digests, dtype=np.uint64)))

    @property
    def sampled(self) -> str:
        """How many of how many."""
        parts = [f"{len(self.kept[part]):,} of {self.seen[part]:,} {part} rows" for part in ("train", "test")]
        return f"duplicates: {' and '.join(parts)}"


def no_leakage(texts: Texts) -> Verdict:
    """Few test rows ask what a training row asks."""
    name, test = "no-leakage", texts.kept["test"]
    if not texts.measured:
        return Verdict(name, Status.not_applicable, "nothing is measured on the test rows: evaluate.enabled is false")
    if not test or not texts.kept["train"]:
        return Verdict(name, Status.not_applicable, "there is no test row" if not test else "there is no training row")
    train, repeated = list(dict.fromkeys(texts.kept["train"])), texts.repeated()
    exact = [text for text, is_repeated in zip(test, repeated, strict=True) if is_repeated]
    rest = [text for text, is_repeated in zip(test, repeated, strict=True) if not is_repeated]
    near = near_duplicates(train, rest) if len(train) > 1 else []  # one row does not show what is common to all
    share = (len(exact) + len(near)) / len(test)
    because = f"{len(exact):,} of {len(test):,} test rows also stand in train, {len(near):,} more nearly ({share:.1%})"
    shown = [text[:80] for text in exact[:LISTED]] + [train[match.train][:80] for match in near[:LISTED]]
    facts = {"exact": len(exact), "near": len(near), "test": len(test), "share": share, "first": shown}
    if share > LEAKED_SHARE:
        fix = "take these rows out of data.train or data.test: a score on them measures memory"
        return Verdict(name, Status.failed, f"{because}, such as {shown[0]!r}", fix, facts)
    return Verdict(name, Status.passed, because, facts=facts)
