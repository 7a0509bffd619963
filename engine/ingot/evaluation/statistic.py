"""A metric as numbers per row and a function from them to its value, so that the value of any resample follows.

S resamples, N rows, K numbers per row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ingot.errors import IngotError

Array = np.ndarray[Any, np.dtype[Any]]
References = Sequence[Sequence[str]]
"""The right answers of every row, one or more each."""


@dataclass(frozen=True)
class Statistic:
    """Numbers per row, `rows` [N, K], and what makes the metric's value of them.

    `value_of` maps the rows' SUM [..., K] to the value [...]. Of a metric that no sums give (the area under a curve)
    `whole` is set, and `value_of` maps `rows` and how often each row was drawn, [S, N], to the values [S]; a draw on
    which the metric is undefined gives NaN.
    """

    rows: Array
    value_of: Callable[..., Array]
    details: dict[str, Any] = field(default_factory=dict)
    whole: bool = False

    def value(self) -> float:
        """The metric over all rows."""
        if self.whole:
            return float(self.value_of(self.rows, np.ones((1, len(self.rows))))[0])
        return float(self.value_of(self.rows.sum(0)))

    def per_row(self) -> list[float] | None:
        """Each row's own score where the metric is a mean of rows; None for corpus metrics."""
        return self.rows[:, 0].tolist() if self.value_of is mean_of else None


Compute = Mapping[str, Callable[[], Statistic]]
"""Metric -> what computes it; only the metrics that are wanted are."""

TextMetric = Callable[..., Statistic]
"""(predictions, references, **options of the metric) -> statistic."""


def not_from_text(predictions: Sequence[str], references: References, **options: Any) -> Statistic:
    """Stands in the table for what needs more of a model than a written answer."""
    raise IngotError(
        "this metric needs more than texts (likelihoods, probabilities, places): they do not come from written answers"
    )


def always_defined(references: References, **options: Any) -> str | None:
    """Stands in the table for metrics that any references allow."""
    return None


@dataclass(frozen=True)
class Metric:
    """A name, its exact definition (`doc`, one sentence for people), and how it is computed.

    `value_of`, `whole`: from numbers per row to the value, as `Statistic` has them; so stored numbers alone are enough.
    `compute`: from written answers, where that is possible. `undefined` returns why the metric cannot be measured
    against these references, or None when it can. `options`: keywords that both of them take.
    `unit_interval`: it lies between 0 and 1. `decimals`: how many people read.
    """

    name: str
    doc: str
    value_of: Callable[..., Array]
    compute: TextMetric = not_from_text
    undefined: Callable[..., str | None] = always_defined
    higher_is_better: bool = True
    unit_interval: bool = True
    decimals: int = 3
    whole: bool = False
    options: tuple[str, ...] = ()


def mean_of(sums: Array) -> Array:
    """Mean of a per-row score; rows are (score, 1)."""
    return sums[..., 0] / sums[..., 1]


def row_mean(scores: Sequence[float] | Array, **details: Any) -> Statistic:
    """A metric that is the mean of per-row scores."""
    column = np.asarray(scores, dtype=np.float64)
    return Statistic(np.stack([column, np.ones_like(column)], axis=1), mean_of, details)


def ratio(sums: Array, part: int, whole: int) -> Array:
    """`sums[..., part] / sums[..., whole]`; 0 where there is nothing."""
    wholes = sums[..., whole]
    found: Array = np.divide(sums[..., part], wholes, out=np.zeros(wholes.shape), where=wholes > 0)
    return found


def share_of(sums: Array) -> Array:
    """Rows are (hits, tries): weighted by tries, not the mean of rows."""
    return ratio(sums, 0, 1)
