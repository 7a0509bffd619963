"""Precision, recall and F1 from sums of hits, predictions and references, and their averages over classes.

C classes. What is 0 / 0 is 0, as scikit-learn and seqeval have it.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from ingot.evaluation.statistic import Array, ratio


def precision_of(sums: Array) -> Array:
    """Share of what was predicted that is right; sums are (right, predicted, real)."""
    return ratio(sums, 0, 1)


def recall_of(sums: Array) -> Array:
    """Share of what is real that is found."""
    return ratio(sums, 0, 2)


def f1_of(sums: Array) -> Array:
    """Harmonic mean of precision and recall."""
    both = np.stack([2 * sums[..., 0], sums[..., 1] + sums[..., 2]], axis=-1)
    return ratio(both, 0, 1)


def parts_of(sums: Array) -> tuple[Array, Array, Array]:
    """Hits, predictions and references [..., C] of every class."""
    hits, predicted, real = np.split(sums, 3, axis=-1)
    return hits, predicted, real


def mean_by(each: Array, weights: Array) -> Array:
    """Mean over classes by weights."""
    return ratio(np.stack([(each * weights).sum(-1), weights.sum(-1)], axis=-1), 0, 1)


def each_of(score: Callable[[Array], Array], sums: Array) -> Array:
    """Score [..., C] of every class by itself."""
    return score(np.stack(parts_of(sums), axis=-1))


def macro(score: Callable[[Array], Array], sums: Array) -> Array:
    """Mean over the classes that occur: a class that a resample lost is no class of it."""
    _, predicted, real = parts_of(sums)
    return mean_by(each_of(score, sums), ((predicted + real) > 0).astype(np.float64))


def weighted(score: Callable[[Array], Array], sums: Array) -> Array:
    """Mean over classes, weighted by references."""
    return mean_by(each_of(score, sums), parts_of(sums)[2])


def micro(score: Callable[[Array], Array], sums: Array) -> Array:
    """Score of all classes' hits, predictions and references together."""
    return score(np.stack([part.sum(-1) for part in parts_of(sums)], axis=-1))


SCORES = {"f1": f1_of, "precision": precision_of, "recall": recall_of}
AVERAGES = {"macro": macro, "weighted": weighted, "micro": micro}
BY_AVERAGE: dict[str, Callable[[Array], Array]] = {
    f"{name}_{average}": partial(mean, score) for name, score in SCORES.items() for average, mean in AVERAGES.items()
}
"""f1_macro ... recall_micro -> its value from sums."""
