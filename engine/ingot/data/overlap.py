"""What two rows have in common: hashes of whole texts, stretches of words, MinHash, and what counts as no likeness.

Behind the trust gate's proof that train and test are apart and behind the scores without shared rows.

S stretches, E sets of them, H hashes of a signature.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ingot.data.words import Ints, Places, span_hashes

COMMON_SHARE, COMMON_ROWS = 0.1, 10  # a stretch in more training rows than these is common
MISSED = 1e-3  # at most this share of pairs at the threshold is not compared
BITS_PER_HASH = 16  # of the filter before a search: one in 16 strangers is looked for in vain
AT_ONCE = 1 << 21  # hashes of signatures that are in memory: 16 MB


def digest(text: str) -> int:
    """A hash of 64 bits: 10^9 texts beside 10^5 others are taken for one of them with probability 5e-6."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def too_many(rows: int) -> float:
    """In more than so many of `rows` training rows, a stretch is common: of a system prompt, of a template.

    More than COMMON_SHARE of them, and more than COMMON_ROWS or, of few rows, half of them.
    """
    return max(COMMON_SHARE * rows, min(COMMON_ROWS, rows / 2), 1)


def own(found: Ints, common: Ints) -> Ints:
    """`found` without what is common; both sorted, each number once."""
    return np.setdiff1d(found, common, assume_unique=True) if len(common) else found


def similarity(one: Ints, other: Ints, common: Ints) -> float:
    """Number of stretches that both and few others have, over these and all that only one of both has.

    Without common ones it is Jaccard's index. All sorted, each number once.
    """
    shared = np.intersect1d(one, other, assume_unique=True)
    apart = len(one) + len(other) - 2 * len(shared)
    counted = len(own(shared, common))
    return counted / (counted + apart) if counted else 0.0


class MinHash:
    """Signatures whose share of equal places estimates Jaccard's index (Broder 1997), in bands that find pairs without
    comparing all (Leskovec et al. 2020, chapter 3). `count` hashes; the same for the same `seed`.
    """

    def __init__(self, count: int, rows_per_band: int, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        factors, offsets = draw.integers(0, 1 << 63, (2, count), dtype=np.uint64)
        self._factors, self._offsets = factors | np.uint64(1), offsets
        self.count, self._rows = count, rows_per_band

    def signatures(self, hashes_S: Ints, begins_E: Places) -> NDArray[np.uint32]:
        """The smallest of each hash [E, H] over several sets, each from its begin to the next one; none is empty."""
        found = np.full((len(begins_E), self.count), np.iinfo(np.uint32).max, dtype=np.uint32)
        step = max(1, AT_ONCE // self.count)
        for start in range(0, len(hashes_S), step):
            part = hashes_S[start : start + step, None]
            with np.errstate(over="ignore"):  # multiplication modulo 2**64 (Dietzfelbinger et al. 1997), its upper half
                hashed = (part * self._factors + self._offsets) >> np.uint64(32)
            first = int(np.searchsorted(begins_E, start, side="right")) - 1  # goes on from the part before
            last = int(np.searchsorted(begins_E, start + len(part)))
            least = np.minimum.reduceat(hashed, np.maximum(begins_E[first:last] - start, 0), axis=0)
            found[first:last] = np.minimum(found[first:last], least)
        return found

    def buckets(self, signatures: NDArray[np.uint32]) -> Ints:
        """Of signatures [..., H] the bucket of each band [..., bands]: sets that share one are worth comparing."""
        bands = signatures.reshape(*signatures.shape[:-1], -1, self._rows).astype(np.uint64)
        found = np.zeros(bands.shape[:-1], dtype=np.uint64)
        for place in range(self._rows):
            found = (found ^ bands[..., place]) * np.uint64(0x9E3779B97F4A7C15)
            found ^= found >> np.uint64(29)
        return found


def rows_per_band(count: int, threshold: float) -> int:
    """The most rows of a band with which a pair of similarity `threshold` shares one of them but for MISSED."""
    for rows in (16, 8, 4, 2):
        if count % rows == 0 and (1 - threshold**rows) ** (count // rows) <= MISSED:
            return rows
    return 1


class Stretches(NamedTuple):
    """Runs of words: `hashes` [S], and of which text each is, `owner` [S], ascending."""

    hashes: Ints
    owner: Places


def stretches(hashes: Ints, begins: Places, ends: Places, n: int, *, short: bool) -> Stretches:
    """All runs of `n` words in texts that are `hashes[begins[i]:ends[i]]`; of a shorter text, all of it if `short`."""
    lengths = ends - begins
    counts = np.maximum(lengths - n + 1, (lengths > 0) if short else 0)
    owner = np.repeat(np.arange(len(begins)), counts)
    first = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts) + begins[owner]
    return Stretches(span_hashes(hashes, first, np.minimum(first + n, ends[owner])), owner)


def distinct(found: Stretches) -> Stretches:
    """Each stretch of a text once, sorted within the text."""
    order = np.lexsort((found.hashes, found.owner))
    hashes, owner = found.hashes[order], found.owner[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    return Stretches(hashes[new], owner[new])


def distinct_counts(found: Stretches, texts: int) -> Places:
    """How many different stretches each of `texts` texts has."""
    if texts > 1 << 20:
        return np.bincount(distinct(found).owner, minlength=texts)
    # Owner and 44 bits of the hash in one number: one sort is five times as fast as one by two keys.
    keys = (found.owner.astype(np.uint64) << np.uint64(44)) | (found.hashes >> np.uint64(20))
    keys.sort()
    new = np.ones(len(keys), dtype=bool)
    new[1:] = keys[1:] != keys[:-1]
    return np.bincount((keys[new] >> np.uint64(44)).astype(np.int64), minlength=texts)


class Known:
    """A set of hashes that very many others are looked up in. `values`: sorted, each once."""

    def __init__(self, hashes: Ints) -> None:
        self.values: Ints = np.unique(hashes)
        size = 1 << max(16, (BITS_PER_HASH * len(self.values)).bit_length())
        self._mask = np.uint64(size - 1)
        self._filter = np.zeros(size, dtype=bool)
        self._filter[self.values & self._mask] = True

    def find(self, hashes: Ints) -> tuple[Places, Places]:
        """Places in `hashes` of those that are known, and their places in `values`."""
        likely = np.flatnonzero(self._filter[hashes & self._mask])
        places = np.searchsorted(self.values, hashes[likely])
        places = np.minimum(places, max(0, len(self.values) - 1))
        known = self.values[places] == hashes[likely] if len(self.values) else np.zeros(0, dtype=bool)
        return likely[known], places[known]
