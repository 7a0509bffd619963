"""Multiple choice by likelihood: which choice comes out first, and how sure the model is. lm-evaluation-harness'
definitions, held against it by the tests.

N rows; the number of choices may differ from row to row.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ingot.errors import IngotError
from ingot.evaluation.calibration import calibration
from ingot.evaluation.likelihood_metrics import bytes_in
from ingot.evaluation.statistic import Array, Compute, Statistic, row_mean

Likelihoods = Sequence[Sequence[float]]
"""Summed log-probability of every choice of every row, in nats."""


def statistics_of_choices(
    likelihoods: Likelihoods,
    choices: Sequence[Sequence[str]],
    gold: Sequence[int | Sequence[int]],
    unconditional: Likelihoods | None = None,
) -> Compute:
    """Every metric of multiple choice that the input allows.

    `choices`: their texts, without the blank that stands before them. `gold`: the place of the right one, or places of
    several. `unconditional`: likelihoods without the question before them, for acc_mutual_info. Brier and calibration
    are of the softmax over a row's likelihoods, and of rows with one right choice.
    Raises IngotError, naming the row, for likelihoods that are no numbers, or do not fit the choices.
    """
    right = [{places} if isinstance(places, int | np.integer) else set(places) for places in gold]
    scores = _rows(likelihoods, choices, "likelihoods")
    for row, (places, texts) in enumerate(zip(right, choices, strict=True)):
        if not places or not places <= set(range(len(texts))):
            raise IngotError(f"row {row}: the right choice {sorted(places)} is none of {len(texts)} choices")

    def by(length: Callable[[str], int]) -> Statistic:
        if empty := [row for row, texts in enumerate(choices) if not all(texts)]:
            raise IngotError(
                f"row {empty[0]}: a choice is empty, so its likelihood has no length to divide by; use acc"
            )
        lengths = [np.asarray([length(text) for text in texts], dtype=np.float64) for texts in choices]
        return _accuracy([score / size for score, size in zip(scores, lengths, strict=True)], right)

    compute: dict[str, Callable[[], Statistic]] = {
        "acc": lambda: _accuracy(scores, right),
        "acc_norm": lambda: by(len),
        "acc_bytes": lambda: by(bytes_in),
        "brier": lambda: row_mean([_brier(score, place) for score, place in _single(scores, right)]),
        "ece": lambda: _calibration(_single(scores, right)),
    }
    if unconditional is not None:
        alone = _rows(unconditional, choices, "unconditional likelihoods")
        gained = [score - own for score, own in zip(scores, alone, strict=True)]
        compute["acc_mutual_info"] = lambda: _accuracy(gained, right)
    return compute


def _rows(likelihoods: Likelihoods, choices: Sequence[Sequence[str]], what: str) -> list[Array]:
    rows = [np.asarray(row, dtype=np.float64) for row in likelihoods]
    for number, (row, texts) in enumerate(zip(rows, choices, strict=True)):
        if row.shape != (len(texts),):
            raise IngotError(f"row {number}: {row.size} {what} of {len(texts)} choices")
        if not np.isfinite(row).all():
            raise IngotError(f"row {number}: {what} are not finite: {row.tolist()}")
    return rows


def _accuracy(scores: Sequence[Array], right: Sequence[set[int]]) -> Statistic:
    return row_mean([float(int(score.argmax()) in places) for score, places in zip(scores, right, strict=True)])


def _single(scores: Sequence[Array], right: Sequence[set[int]]) -> list[tuple[Array, int]]:
    """Rows as (probabilities, the right place)."""
    if several := [row for row, places in enumerate(right) if len(places) > 1]:
        raise IngotError(f"row {several[0]}: brier and ece are for one right choice, and this row has several; use acc")
    return [(_softmax(score), next(iter(places))) for score, places in zip(scores, right, strict=True)]


def _softmax(score: Array) -> Array:
    powers: Array = np.exp(score - score.max())
    return powers / powers.sum()


def _brier(shares: Array, place: int) -> float:
    return float(((shares - np.eye(len(shares))[place]) ** 2).sum())


def _calibration(rows: Sequence[tuple[Array, int]]) -> Statistic:
    sure = np.asarray([shares.max() for shares, _ in rows])
    return calibration(sure, np.asarray([shares.argmax() == place for shares, place in rows]))
