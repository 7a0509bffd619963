"""Probabilities beside what happened: logarithmic loss, Brier score, calibration error.

N rows, C classes, M bins.
"""

import numpy as np

from ingot.evaluation.statistic import Array, Statistic, row_mean

BINS = 15
_EDGES = np.linspace(0.0, 1.0, BINS + 1)


def log_loss(probabilities_NC: Array, right_N: Array) -> Statistic:
    """Mean of -log p of the right class in nats; p is kept this far from 0 and 1: 2.2e-16."""
    eps = np.finfo(np.float64).eps
    right = probabilities_NC[np.arange(len(right_N)), right_N]
    return row_mean(-np.log(np.clip(right, eps, 1 - eps)))


def brier(probabilities_NC: Array, right_N: Array) -> Statistic:
    """Mean over rows of the squared distance from probabilities to truth, summed over classes: 0 to 2 (Brier 1950)."""
    return row_mean(((probabilities_NC - np.eye(probabilities_NC.shape[1])[right_N]) ** 2).sum(1))


def calibration(confidence_N: Array, right_N: Array) -> Statistic:
    """Expected calibration error over 15 bins of equal width (Guo et al. 2017, equation 3)."""
    return Statistic(bin_counts(confidence_N, right_N), ece_of, {"bins": BINS})


def bin_counts(confidence_N: Array, right_N: Array) -> Array:
    """[N, 3M]: whether the row is in each bin, its confidence there, whether it is right there. A bin holds its upper
    edge.
    """
    bin_N = np.clip(np.searchsorted(_EDGES, confidence_N, side="left") - 1, 0, BINS - 1)
    inside_NM = np.eye(BINS)[bin_N]
    parts = [inside_NM, inside_NM * np.asarray(confidence_N)[:, None], inside_NM * np.asarray(right_N)[:, None]]
    return np.concatenate(parts, axis=1)


def ece_of(sums: Array) -> Array:
    """Sums [..., 3M] -> the gaps between confidence and share of right rows, weighted by rows."""
    count, confidence, right = np.split(sums, 3, axis=-1)
    error: Array = np.abs(confidence - right).sum(-1) / count.sum(-1)
    return error


def reliability(sums: Array) -> list[tuple[int, float, float]]:
    """Sums [3M] of `bin_counts` -> (rows, mean confidence, share of right rows) of every bin that has rows: a picture
    of calibration.
    """
    bins = np.stack(np.split(sums, 3), axis=1).tolist()
    return [(int(count), confidence / count, right / count) for count, confidence, right in bins if count]
