import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from ingot.data.draw import draw, sample


def plainly(rows: list[tuple[str, str]], wanted: int, seed: str) -> list[int]:
    """The draw of the first release, over rows of (input, label): shipped test scores are of the rows that it drew."""
    groups = defaultdict(list)
    for index, (text, _) in enumerate(rows):
        groups[text].append(index)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    left = Counter(label for _, label in rows)
    exact = {label: wanted * size / left.total() for label, size in left.items()}
    quotas = Counter({label: int(value) for label, value in exact.items()})
    quotas.update(sorted(exact, key=lambda label: (quotas[label] - exact[label], label))[: wanted - quotas.total()])
    drawn = set()

    def take(key, room):
        members = groups[key]
        lost = Counter(rows[index][1] for index in members)
        if len(members) <= room and members[0] not in drawn and all(left[label] > lost[label] for label in lost):
            drawn.update(members)
            left.subtract(lost)
            quotas.subtract(lost)

    for key in order:
        take(key, quotas[rows[groups[key][0]][1]])
    for key in order:
        take(key, wanted - len(drawn))
    for key in sorted(order, key=lambda key: len(groups[key])):
        if not drawn:
            take(key, len(rows))
    return sorted(drawn)


@pytest.mark.parametrize("seed", range(120))
def test_rows_are_drawn_as_ever(seed):
    random_ = random.Random(seed)
    n = random_.choice([1, 5, 40, 300])
    words = "ab" if random_.random() < 0.2 else "abcdéßzZ"
    rows = [("".join(random_.choices(words, k=random_.choice([1, 3]))), random_.choice("xxxyz")) for _ in range(n)]
    inputs, labels = sorted({text for text, _ in rows}), sorted({label for _, label in rows})
    groups = np.array([inputs.index(text) for text, _ in rows])
    strata = np.array([labels.index(label) for _, label in rows])
    for wanted in (0, 1, n // 10, n // 2):
        found = draw(np.arange(n), groups, strata, wanted, f"{seed} test")
        assert found.tolist() == (plainly(rows, wanted, f"{seed} test") if wanted else [])


def test_what_is_drawn_from_a_part_stays_in_it():
    rows = np.arange(50, 150, 2)
    groups, strata = np.arange(200), np.zeros(200, dtype=np.int64)
    found = draw(rows, groups, strata, 10, "0")
    assert len(found) == 10
    assert set(found) <= set(rows)
    kept = sample(rows, strata, 7, "0")
    assert len(kept) == 7
    assert set(kept) <= set(rows)
    assert kept.tolist() == sorted(kept)


def test_a_sample_has_one_of_every_stratum_before_a_second_of_any():
    strata = np.array([0] * 95 + [1, 2, 3, 4, 5])
    for seed in range(5):
        found = sample(np.arange(100), strata, 6, str(seed))
        assert sorted(strata[found]) == [0, 1, 2, 3, 4, 5]
        assert set(strata[sample(np.arange(100), strata, 50, str(seed))]) == {0, 1, 2, 3, 4, 5}
