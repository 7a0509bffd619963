"""How far two graders agree beyond chance (Cohen 1960; weights for ordered grades: Cohen 1968)."""

from collections.abc import Hashable, Sequence

import numpy as np


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable], order: Sequence[Hashable]) -> float | None:
    """Kappa of two graders of the same rows: 1 - observed / expected disagreement.

    `order`: all grades, the worst first; two grades disagree by the square of the distance between their places. For
    two grades that is plain kappa. None where both always give the same one: chance alone explains that.
    """
    place = {grade: number for number, grade in enumerate(order)}
    counts = np.zeros((len(order), len(order)))
    for a, b in zip(first, second, strict=True):
        counts[place[a], place[b]] += 1
    total = counts.sum()
    if not total:
        return None
    steps = np.arange(len(order))
    weights = (steps[:, None] - steps[None, :]) ** 2
    expected = float((weights * np.outer(counts.sum(1), counts.sum(0))).sum() / total)
    return None if expected == 0 else 1.0 - float((weights * counts).sum()) / expected
