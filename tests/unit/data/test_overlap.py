"""What rows have in common: estimates beside exact counts, and pairs that bands must not miss."""

import numpy as np
import pytest

from ingot.data.overlap import (
    Known,
    MinHash,
    Stretches,
    distinct,
    distinct_counts,
    rows_per_band,
    similarity,
    stretches,
    too_many,
)

NONE = np.zeros(0, dtype=np.uint64)
Sets = list["np.ndarray"]


def pair(draw: np.random.Generator, size: int, jaccard: float) -> Sets:
    """Two sets of random numbers, `size` in all, with this index."""
    numbers = draw.integers(0, 1 << 63, size, dtype=np.uint64)
    shared = round(size * jaccard)
    middle = shared + (size - shared) // 2
    return [np.unique(numbers[:middle]), np.unique(np.concatenate([numbers[:shared], numbers[middle:]]))]


def signatures(hashing: MinHash, sets: Sets) -> "np.ndarray":
    begins = np.cumsum([0, *map(len, sets)])[:-1]
    return hashing.signatures(np.concatenate(sets), begins)


def test_signatures_estimate_jaccards_index() -> None:
    draw, hashing = np.random.default_rng(0), MinHash(128, 4)
    errors = []
    for jaccard in np.linspace(0, 1, 21):
        for size in (20, 200, 1000):
            one, other = pair(draw, size, jaccard)
            exact = similarity(one, other, NONE)
            first, second = signatures(hashing, [one, other])
            errors.append((first == second).mean() - exact)
    errors = np.array(errors)
    assert np.abs(errors).max() < 4.5 * 0.5 / np.sqrt(128)  # the widest standard deviation is at one half
    assert abs(errors.mean()) < 0.01


def test_signatures_do_not_depend_on_what_stands_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, hashing = np.random.default_rng(1), MinHash(128, 4)
    sets = [draw.integers(0, 1 << 63, size, dtype=np.uint64) for size in (1, 5, 3, 90, 2, 64, 1)]
    together = signatures(hashing, sets)
    expected = [signatures(hashing, [one])[0] for one in sets]
    assert np.array_equal(together, expected)
    monkeypatch.setattr("ingot.data.overlap.AT_ONCE", 128 * 7)  # parts that end within sets
    assert np.array_equal(signatures(hashing, sets), expected)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_bands_miss_hardly_a_pair_at_the_threshold(threshold: float) -> None:
    draw = np.random.default_rng(2)
    hashing = MinHash(128, rows_per_band(128, threshold))
    missed = candidates = 0
    for _ in range(500):
        one, other = hashing.buckets(signatures(hashing, pair(draw, 200, threshold)))
        missed += not (one == other).any()
        one, other = hashing.buckets(signatures(hashing, pair(draw, 200, threshold / 4)))
        candidates += (one == other).any()
    assert missed <= 3  # one in a thousand is promised
    assert candidates < 400  # and strangers are left apart, or bands would be for nothing
    assert rows_per_band(128, threshold) >= 2 > rows_per_band(128, 0.1)


def test_what_is_common_counts_as_no_likeness() -> None:
    one, other = np.arange(10, dtype=np.uint64), np.arange(2, 12, dtype=np.uint64)
    assert similarity(one, other, NONE) == 8 / 12
    assert similarity(one, other, np.arange(2, 8, dtype=np.uint64)) == 2 / 6
    assert similarity(one, other, np.arange(12, dtype=np.uint64)) == 0
    assert [too_many(rows) for rows in (1, 4, 40, 1000)] == [1, 2, 10, 100]


def test_stretches_are_runs_of_words_within_a_text() -> None:
    hashes = np.array([1, 2, 3, 4, 1, 2, 3, 9, 9], dtype=np.uint64)
    begins, ends = np.array([0, 4, 7, 7]), np.array([4, 7, 7, 9])
    found = stretches(hashes, begins, ends, 3, short=False)
    assert found.owner.tolist() == [0, 0, 1]
    assert found.hashes[0] == found.hashes[2] != found.hashes[1]
    found = stretches(hashes, begins, ends, 3, short=True)
    assert found.owner.tolist() == [0, 0, 1, 3]


def test_known_hashes_are_found_among_strangers() -> None:
    draw = np.random.default_rng(3)
    mine, others = draw.integers(0, 1 << 63, 5000, dtype=np.uint64), draw.integers(0, 1 << 63, 20000, dtype=np.uint64)
    known = Known(mine)
    mixed = np.concatenate([others, mine[::2]])
    places, numbers = known.find(mixed)
    assert places.tolist() == list(range(20000, 22500))
    assert np.array_equal(known.values[numbers], mine[::2])
    assert [it.tolist() for it in Known(NONE).find(mixed)] == [[], []]


def test_distinct_stretches_are_counted_text_by_text() -> None:
    draw = np.random.default_rng(4)
    owner = np.sort(draw.integers(0, 30, 2000))
    values = draw.integers(0, 1 << 63, 40, dtype=np.uint64)[draw.integers(0, 40, 2000)]
    expected = [len(np.unique(values[owner == text])) for text in range(31)]
    assert distinct_counts(Stretches(values, owner), 31).tolist() == expected
    assert np.bincount(distinct(Stretches(values, owner)).owner, minlength=31).tolist() == expected
