"""How SQuAD compares an answer with the right ones."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ingot.evaluation.statistic import References, Statistic, TextMetric, row_mean, share_of

Score = Callable[[str, Sequence[str]], float]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain(text: str) -> str:
    """Small letters, without punctuation and articles, single blanks (Rajpurkar et al. 2016, section 6.1)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(prediction: str, references: Sequence[str]) -> float:
    """1 where the plain text is that of a reference."""
    return float(plain(prediction) in {plain(reference) for reference in references})


def word_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the bags of words, the best reference. Where there is no answer (""), saying so is 1 and a text is 0."""
    return max(_overlap(plain(prediction).split(), plain(reference).split()) for reference in references)


def _overlap(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


def squad(score: Score) -> TextMetric:
    """The metric that is the mean of `score` over all rows."""

    def compute(predictions: Sequence[str], references: References) -> Statistic:
        return row_mean([score(text, refs) for text, refs in zip(predictions, references, strict=True)])

    return compute


def squad_of(score: Score, *, answered: bool) -> TextMetric:
    """The metric that is the mean of `score` over the rows that have an answer, or over those that have none: HasAns
    and NoAns of Rajpurkar et al. 2018. Numbers per row: its score, and 1; both 0 for the other rows.
    """

    def compute(predictions: Sequence[str], references: References) -> Statistic:
        rows = [
            (score(text, refs), 1.0) if has_answer(refs) == answered else (0.0, 0.0)
            for text, refs in zip(predictions, references, strict=True)
        ]
        return Statistic(np.asarray(rows, dtype=np.float64), share_of)

    return compute


def none_of(*, answered: bool) -> Callable[..., str | None]:
    """What says why `squad_of` is undefined: there is no such row."""

    def reason(references: References) -> str | None:
        if any(has_answer(refs) == answered for refs in references):
            return None
        return f"no row has {'an' if answered else 'no'} answer"

    return reason


def has_answer(references: Sequence[str]) -> bool:
    """Whether a row has a right answer other than saying none."""
    return any(plain(text) for text in references)
