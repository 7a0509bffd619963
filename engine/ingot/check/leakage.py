"""Rows that stand in both train and test, exactly or nearly: a score on them measures memory.

Near duplicates are found with MinHash (Broder 1997) in bands (Leskovec et al. 2020, chapter 3) over character shingles
and confirmed by their exact Jaccard similarity, so that none is reported that is not one.
"""

import random
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .verdict import Status, Verdict

SHINGLE = 5  # characters
NEAR = 0.9  # Jaccard similarity from which two rows are near duplicates
BANDS, ROWS_PER_BAND = 16, 4  # finds a pair of similarity 0.9 with probability 1 - 5e-8
TRAIN_ROWS = 10  # training rows that are kept for each test row
LEAKED_SHARE = 0.01  # public benchmarks of short questions have 0.2 to 0.5 % (banking77)
LISTED = 3
PRIME = (1 << 31) - 1

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Match:
    """A test row and the training row that it repeats. `similarity`: Jaccard, of their shingles."""

    test: int
    train: int
    similarity: float


def near_duplicates(train: Sequence[str], test: Sequence[str]) -> list[Match]:
    """For each text of `test` that has one, its most similar text of `train` with a similarity of at least NEAR."""
    draw = np.random.default_rng(0)
    factors = draw.integers(1, PRIME, BANDS * ROWS_PER_BAND, dtype=np.int64)
    offsets = draw.integers(0, PRIME, BANDS * ROWS_PER_BAND, dtype=np.int64)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    sets = [shingles(text) for text in train]
    for number, found in enumerate(sets):
        for key in _bands(found, factors, offsets):
            buckets[key].append(number)
    matches = []
    for number, text in enumerate(test):
        found = shingles(text)
        candidates = {other for key in _bands(found, factors, offsets) for other in buckets.get(key, ())}
        best = max(((jaccard(found, sets[other]), -other) for other in candidates), default=(0.0, 0))
        if best[0] >= NEAR:
            matches.append(Match(number, -best[1], best[0]))
    return matches


def shingles(text: str) -> frozenset[int]:
    """Hashes of every stretch of SHINGLE characters, blanks and case aside; of the whole text where it is shorter."""
    plain = " ".join(text.casefold().split()).encode()
    return frozenset(zlib.crc32(plain[i : i + SHINGLE]) & PRIME for i in range(max(1, len(plain) - SHINGLE + 1)))


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """Size of the intersection over size of the union."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def _bands(found: Iterable[int], factors: Ints, offsets: Ints) -> list[tuple[int, bytes]]:
    """Keys of the buckets that a set falls into."""
    values = np.fromiter(found, dtype=np.int64)
    # Factors and values are below 2**31, so that products stay below 2**62.
    minima = ((values[:, None] * factors + offsets) % PRIME).min(axis=0)
    return [(band, part.tobytes()) for band, part in enumerate(minima.reshape(BANDS, ROWS_PER_BAND))]


class Texts:
    """What rows of train and test ask; of very many a share is kept, drawn with `seed` (Vitter 1985, algorithm R).

    `measured`: whether the recipe measures anything on the test rows.
    """

    def __init__(self, limit: int, seed: int, *, measured: bool = True) -> None:
        self.measured = measured
        self._limits = {"train": TRAIN_ROWS * limit, "test": limit}
        self._draw = random.Random(f"leakage {seed}")
        self.seen: dict[str, int] = {"train": 0, "test": 0}
        self.kept: dict[str, list[str]] = {"train": [], "test": []}

    def add(self, part: str, text: str) -> None:
        """Take a row of `part`."""
        kept, limit = self.kept[part], self._limits[part]
        self.seen[part] += 1
        if len(kept) < limit:
            kept.append(text)
        elif (place := self._draw.randrange(self.seen[part])) < limit:
            kept[place] = text

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
    train = list(dict.fromkeys(texts.kept["train"]))
    known = set(train)
    exact = [text for text in test if text in known]
    near = near_duplicates(train, [text for text in test if text not in known])
    share = (len(exact) + len(near)) / len(test)
    because = f"{len(exact):,} of {len(test):,} test rows also stand in train, {len(near):,} more nearly ({share:.1%})"
    shown = [text[:80] for text in exact[:LISTED]] + [train[match.train][:80] for match in near[:LISTED]]
    facts = {"exact": len(exact), "near": len(near), "test": len(test), "share": share, "first": shown}
    if share > LEAKED_SHARE:
        fix = "take these rows out of data.train or data.test: a score on them measures memory"
        return Verdict(name, Status.failed, f"{because}, such as {shown[0]!r}", fix, facts)
    return Verdict(name, Status.passed, because, facts=facts)
