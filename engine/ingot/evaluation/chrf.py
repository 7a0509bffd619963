"""chrF (Popović 2015): F-score of character n-grams, 0 to 100. chrF++ (Popović 2017): of words' n-grams too.

N rows, K numbers per row.
"""

import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ingot.evaluation.statistic import Array

ORDERS = 6
BETA = 2  # recall counts beta times as much as precision


def chrf_counts(predictions: Sequence[str], references: Sequence[Sequence[str]], words: int = 0) -> Array:
    """[N, K]: n-grams of the prediction, of the reference that fits it best, and of both, for every n from 1 to 6 of
    characters, and from 1 to `words` of words.
    """
    rows = []
    for prediction, texts in zip(predictions, references, strict=True):
        candidates = np.asarray([_counts(prediction, text, words) for text in texts], dtype=np.float64)
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


def _counts(prediction: str, reference: str, words: int) -> list[int]:
    found, wanted = (_all_ngrams(text, words) for text in (prediction, reference))
    # sacrebleu counts no n-grams of the prediction for an order that the reference has none of.
    return [
        *(one.total() if other else 0 for one, other in zip(found, wanted, strict=True)),
        *(other.total() for other in wanted),
        *((one & other).total() for one, other in zip(found, wanted, strict=True)),
    ]


def _all_ngrams(text: str, words: int) -> list[Counter[Sequence[str]]]:
    """Of characters without blanks, then of words."""
    units: list[tuple[Sequence[str], int]] = [("".join(text.split()), ORDERS), (tuple(_words(text)), words)]
    return [
        Counter(unit[start : start + n] for start in range(len(unit) - n + 1))
        for unit, orders in units
        for n in range(1, orders + 1)
    ]


def _words(text: str) -> list[str]:
    """Words with one sign of punctuation, at the end or else at the beginning, as a word of its own."""
    parts: list[str] = []
    for word in text.split():
        if len(word) > 1 and word[-1] in string.punctuation:
            parts += [word[:-1], word[-1]]
        elif len(word) > 1 and word[0] in string.punctuation:
            parts += [word[0], word[1:]]
        else:
            parts.append(word)
    return parts
