"""chrF (Popović 2015): F-score of character n-grams, 0 to 100.

N rows, K numbers per row.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

ORDERS = 6
BETA = 2  # recall counts beta times as much as precision
Array = np.ndarray[Any, np.dtype[Any]]


def chrf_counts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
    """[N, K]: n-grams of the prediction, of the reference that fits it best, and of both, for every n from 1 to 6."""
    rows = []
    for prediction, texts in zip(predictions, references, strict=True):
        candidates = np.asarray([_counts(prediction, text) for text in texts], dtype=np.float64)
        rows.append(candidates[int(chrf_of(candidates).argmax())])
    return np.stack(rows)


def chrf_of(sums: Array) -> Array:
    """Counts [..., K] -> score [...]. Orders of which one side has no n-gram do not count (sacrebleu's default)."""
    predicted, real, both = np.split(sums, 3, axis=-1)
    counted = (predicted > 0) & (real > 0)
    n_orders = counted.sum(-1)
    precision = np.divide(both, predicted, out=np.zeros_like(both), where=counted).sum(-1)
    recall = np.divide(both, real, out=np.zeros_like(both), where=counted).sum(-1)
    precision, recall = (np.divide(x, n_orders, out=np.zeros_like(x), where=n_orders > 0) for x in (precision, recall))
    weighted = BETA**2 * precision + recall
    score: Array = np.divide(
        100 * (1 + BETA**2) * precision * recall, weighted, out=np.zeros_like(weighted), where=weighted > 0
    )
    return score


def _counts(prediction: str, reference: str) -> list[int]:
    found, wanted = ("".join(text.split()) for text in (prediction, reference))
    pairs = [(_ngrams(found, n), _ngrams(wanted, n)) for n in range(1, ORDERS + 1)]
    return [
        *(one.total() for one, _ in pairs),
        *(other.total() for _, other in pairs),
        *((one & other).total() for one, other in pairs),
    ]


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))
