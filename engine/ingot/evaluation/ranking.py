"""Areas under curves: how well scores order the rows that have a class before those that do not.

S resamples, N rows, C classes, G different scores among the rows that have the class, highest first. No sums over rows
give them, so a resample is how often each row was drawn: rows are sorted, and every draw is counted along that order.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from ingot.evaluation.statistic import Array, Statistic

NUMBERS_AT_ONCE = 4_000_000  # 32 MB
Area = Callable[[Array, Array, Array, Array], Array]


def roc_area(hits_GS: Array, tried_GS: Array, equal_GS: Array, rows_S: Array) -> Array:
    """Area under the ROC curve [S]: the share of pairs of a positive and a negative in right order, ties half.

    Positives that have the score, rows that have it or more, rows that have it, all rows. NaN without either kind.
    """
    positives_S = hits_GS.sum(0)
    negatives_S = rows_S - positives_S
    below_GS = negatives_S - (tried_GS - np.cumsum(hits_GS, axis=0))
    ordered_S = (hits_GS * (below_GS + 0.5 * (equal_GS - hits_GS))).sum(0)
    return _share(ordered_S, positives_S * negatives_S)


def average_precision(hits_GS: Array, tried_GS: Array, equal_GS: Array, rows_S: Array) -> Array:
    """Sum over scores, highest first, of precision there x recall gained there [S]. NaN without a positive."""
    found_GS = np.cumsum(hits_GS, axis=0)
    precision_GS = np.divide(found_GS, tried_GS, out=np.zeros_like(found_GS), where=tried_GS > 0)
    return _share((precision_GS * hits_GS).sum(0), hits_GS.sum(0))


def _share(part_S: Array, whole_S: Array) -> Array:
    found: Array = np.divide(part_S, whole_S, out=np.full(part_S.shape, np.nan), where=whole_S > 0)
    return found


def _area(area: Area, scores_M: Array, real_M: Array, counts_NS: Array) -> Array:
    """`scores_M`, `real_M`: of every row, or of every class of every row, row after row."""
    order_M = np.argsort(-scores_M, kind="stable")
    sorted_M, place_P = scores_M[order_M], np.flatnonzero(real_M[order_M])
    if not len(place_P):
        return np.full(counts_NS.shape[1], np.nan)
    first_P = np.searchsorted(-sorted_M, -sorted_M[place_P], side="left")
    last_P = np.searchsorted(-sorted_M, -sorted_M[place_P], side="right") - 1
    groups_G = np.flatnonzero(np.concatenate([[True], first_P[1:] != first_P[:-1]]))
    first_G, last_G = first_P[groups_G], last_P[groups_G]
    row_M = order_M // (len(scores_M) // len(counts_NS))
    found, step = [], max(1, NUMBERS_AT_ONCE // len(scores_M))
    for start in range(0, counts_NS.shape[1], step):
        drawn_MS = counts_NS[:, start : start + step][row_M]
        hits_GS = np.add.reduceat(drawn_MS[place_P], groups_G, axis=0)
        own_GS = drawn_MS[first_G]
        np.cumsum(drawn_MS, axis=0, out=drawn_MS)
        tried_GS = drawn_MS[last_G]
        equal_GS = tried_GS - (drawn_MS[first_G] - own_GS)
        found.append(area(hits_GS, tried_GS, equal_GS, drawn_MS[-1]))
    return np.concatenate(found)


def _averaged(area: Area, average: str, rows_NK: Array, counts_SN: Array) -> Array:
    """`rows_NK`: scores and truth (0 or 1) of every class, [N, 2C]. A class that a draw has not, or on which it has
    nothing else, is no class of it; NaN where none is left.
    """
    scores_NC, real_NC = np.split(rows_NK, 2, axis=1)
    counts_NS = np.ascontiguousarray(counts_SN.T, dtype=np.float64)  # draws side by side: ten times as fast
    if average == "micro":
        return _area(area, scores_NC.ravel(), real_NC.ravel(), counts_NS)
    each_CS = np.stack([_area(area, *column, counts_NS) for column in zip(scores_NC.T, real_NC.T, strict=True)])
    weights_CS = real_NC.T @ counts_NS if average == "weighted" else np.ones_like(each_CS)
    weights_CS = np.where(np.isnan(each_CS), 0.0, weights_CS)
    return _share((np.nan_to_num(each_CS) * weights_CS).sum(0), weights_CS.sum(0))


RANKINGS: dict[str, Callable[[Array, Array], Array]] = {
    f"{name}_{average}": partial(_averaged, area, average)
    for name, area in (("AUC", roc_area), ("average_precision_score", average_precision))
    for average in ("macro", "weighted", "micro", "binary")
}
"""AUC_macro ... average_precision_score_binary -> its value from rows [N, 2C] and draws [S, N]."""


def ranking(name: str, scores_NC: Array, real_NC: Array) -> Statistic:
    """A metric of RANKINGS: `scores_NC` are higher where a class is likelier, `real_NC` is 1 where it is true."""
    return Statistic(np.concatenate([scores_NC, real_NC], axis=1), RANKINGS[name], whole=True)
