"""Drawing rows by number: in proportion to strata (labels; in a mixture, labels of each source), equal inputs together.

Rows are known by their numbers in reading order. Two rows of one group have the same input; groups are numbered in the
order of their inputs' text, so the same rows in another order make the same draw.
"""

import random
from collections import Counter

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def draw(rows: Ints, groups: Ints, strata: Ints, wanted: int, seed: str) -> Ints:
    """Draw about `wanted` of `rows`, whole groups, in proportion to strata; in ascending order.

    `groups` and `strata` are of all rows. No stratum loses its last row, so the rest is never empty and knows every
    label.
    """
    if wanted == 0:
        return rows[:0]
    by_group = rows[np.argsort(groups[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(groups[by_group], prepend=-1)).tolist()
    ends = [*starts[1:], len(rows)]
    order = list(range(len(starts)))
    random.Random(seed).shuffle(order)
    members: list[int] = by_group.tolist()
    stratum_of: list[int] = strata.tolist()
    left = Counter(stratum_of[row] for row in members)
    quotas = _quotas(left, wanted)
    taken: set[int] = set()  # groups
    n_taken = 0

    def take(group: int, room: int) -> None:
        nonlocal n_taken
        inside = members[starts[group] : ends[group]]
        if len(inside) > room or group in taken:
            return
        lost = Counter(stratum_of[row] for row in inside)
        if all(left[stratum] > lost[stratum] for stratum in lost):
            taken.add(group)
            n_taken += len(inside)
            left.subtract(lost)
            quotas.subtract(lost)

    for group in order:
        take(group, room=quotas[stratum_of[members[starts[group]]]])
    for group in order:  # what the quotas left over: strata of a single row, groups larger than their quota
        take(group, room=wanted - n_taken)
    for group in sorted(order, key=lambda group: ends[group] - starts[group]):  # every group is larger than `wanted`
        if n_taken:
            break
        take(group, room=len(rows))
    return np.sort(np.array([row for group in taken for row in members[starts[group] : ends[group]]], dtype=np.int64))


def sample(rows: Ints, strata: Ints, wanted: int, seed: str) -> Ints:
    """`wanted` of `rows` in ascending order, one of every stratum before a second of any."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    stratum_of: list[int] = strata[rows].tolist()
    seen: set[int] = set()
    first: list[int] = []
    others: list[int] = []
    for place in order:
        (others if stratum_of[place] in seen else first).append(place)
        seen.add(stratum_of[place])
    return rows[np.sort(np.array([*first, *others][:wanted], dtype=np.int64))]


def _quotas(sizes: Counter[int], wanted: int) -> Counter[int]:
    """Share `wanted` rows among strata by size: whole parts first, then the largest remainders."""
    total = sizes.total()
    exact = {stratum: wanted * size / total for stratum, size in sizes.items()}
    quotas = Counter({stratum: int(value) for stratum, value in exact.items()})
    by_remainder = sorted(exact, key=lambda stratum: (quotas[stratum] - exact[stratum], stratum))
    quotas.update(by_remainder[: wanted - quotas.total()])
    return quotas
