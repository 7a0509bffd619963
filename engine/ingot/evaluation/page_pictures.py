"""The report's pictures as numbers: places are percents of a picture's width or height, the template draws them.

Percents, so that a picture is as wide as the page allows while its text keeps its size, on a phone as on a desk.
"""

# N rows, C classes

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 24
RELIABILITY_BINS = 10
MAX_CLASSES = 20  # more do not fit a picture: the largest confusions are listed
MAX_CONFUSIONS = 12


@dataclass(frozen=True)
class Interval:
    """A difference to draw: `label` what of, `sign` 1 better, -1 worse, 0 neither shown, `text` in figures."""

    label: str
    panel: str
    value: float
    low: float
    high: float
    sign: int
    text: str


@dataclass(frozen=True)
class Bin:
    """Rows whose confidence is in [low, high): how many, their mean confidence, the share of them that is right."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers from `low` to `high`."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / wanted * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def forest(intervals: Sequence[Interval]) -> list[dict[str, Any]]:
    """A panel a scale, each with the line of no difference: intervals of one `panel` share a unit and a direction."""
    panels = []
    for name in dict.fromkeys(interval.panel for interval in intervals):
        shown = [interval for interval in intervals if interval.panel == name]
        low = min(0.0, *(min(one.low, one.value) for one in shown))
        high = max(0.0, *(max(one.high, one.value) for one in shown))
        margin = (high - low) * 0.06 or 1.0  # all at 0: a line in the middle
        low, high = low - margin, high + margin

        def place(value: float, low: float = low, high: float = high) -> float:
            return 100 * (value - low) / (high - low)

        panels.append(
            {
                "name": name,
                "zero": place(0.0),
                "ticks": [(_tick(tick), place(tick)) for tick in ticks(low, high, 6) if 4 < place(tick) < 96],
                "rows": [
                    {"one": one, "low": place(one.low), "high": place(one.high), "at": place(one.value)}
                    for one in shown
                ],
            }
        )
    return panels


def reliability(confidences: Sequence[float], right: Sequence[bool]) -> list[Bin]:
    """Bins of equal width over confidence (Guo et al. 2017, section 2); empty ones are left out."""
    values, hits = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    places = np.minimum((values * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    bins = []
    for place in np.unique(places).tolist():
        inside = places == place
        edges = place / RELIABILITY_BINS, (place + 1) / RELIABILITY_BINS
        bins.append(Bin(*edges, int(inside.sum()), float(values[inside].mean()), float(hits[inside].mean())))
    return bins


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: mean gap of confidence and accuracy, weighted by rows (Guo et al. 2017, eq. 3)."""
    return sum(one.n * abs(one.accuracy - one.confidence) for one in bins) / sum(one.n for one in bins)


def confusion(pairs: Counter[tuple[str, str]]) -> dict[str, Any]:
    """Counts of (real class, answered class) -> a matrix of at most MAX_CLASSES classes, and the largest confusions.

    A cell's `share` is of the rows of its real class.
    """
    classes = sorted({name for pair in pairs for name in pair})
    of_class: Counter[str] = Counter()
    for (real, _), n in pairs.items():
        of_class[real] += n
    mistakes = sorted(((n, pair) for pair, n in pairs.items() if pair[0] != pair[1]), key=lambda one: (-one[0], one[1]))
    cells = [
        {"row": y, "column": x, "n": n, "share": n / of_class[real], "real": real, "said": said}
        for y, real in enumerate(classes)
        for x, said in enumerate(classes)
        if (n := pairs.get((real, said), 0))
    ]
    return {
        "classes": classes,
        "cells": cells if len(classes) <= MAX_CLASSES else [],
        "mistakes": [
            {"real": real, "said": said, "n": n, "share": n / of_class[real]}
            for n, (real, said) in mistakes[:MAX_CONFUSIONS]
        ],
        "n_mistakes": sum(n for n, _ in mistakes),
        "n": sum(pairs.values()),
    }


def histogram(series: Mapping[str, Sequence[int]]) -> dict[str, Any] | None:
    """Bars of whole numbers, all series over the same bins; None where there is no number. Heights are percents."""
    given = {name: np.asarray(values) for name, values in series.items() if len(values)}
    if not given:
        return None
    # The longest hundredth shares the last bin: one runaway answer would press all the others into the first.
    low = min(int(values.min()) for values in given.values())
    high = max(int(values.max()) for values in given.values())
    top = max(low, max(math.ceil(np.percentile(values, 99)) for values in given.values()))
    low = 0 if low <= top / 2 else low
    width = max(1, math.ceil((top - low + 1) / BINS))
    n_bins = math.ceil((top - low + 1) / width)
    counts = {
        name: np.bincount(np.minimum((values - low) // width, n_bins - 1), minlength=n_bins)
        for name, values in given.items()
    }
    tallest = max(float(found.max() / found.sum()) for found in counts.values())
    end = low + n_bins * width
    bars = [
        {
            "series": place,
            "x": 100 * (index + (0.08 + 0.84 * place / len(counts))) / n_bins,
            "width": 100 * 0.84 / len(counts) / n_bins,
            "height": 100 * n / found.sum() / tallest,
            "title": f"{name}: {n:,} rows, {_range(low + index * width, width, index == n_bins - 1, high)}",
        }
        for place, (name, found) in enumerate(counts.items())
        for index, n in enumerate(found.tolist())
        if n
    ]
    return {
        "bars": bars,
        "x_ticks": [
            (f"{tick:,.0f}", 100 * (tick + 0.5 - low) / (end - low))
            for tick in ticks(low, end - 1, 4)
            if tick == int(tick)
        ],
        "y_ticks": [(f"{100 * tick:.3g} %", 100 * tick / tallest) for tick in ticks(0, tallest, 3) if tick],
        "series": [
            {
                "name": name,
                "median": float(np.median(values)),
                "mean": float(values.mean()),
                "longest": int(values.max()),
            }
            for name, values in given.items()
        ],
        "overflow": end - 1 if high >= end else None,
    }


def columns(values: Iterable[float]) -> tuple[float, float] | None:
    """Median and 95th percentile; None without values."""
    array = np.asarray(list(values), dtype=np.float64)
    return (float(np.median(array)), float(np.percentile(array, 95))) if len(array) else None


def _tick(value: float) -> str:
    return f"{value:+.6g}" if value else "0"


def _range(first: int, width: int, last: bool, high: int) -> str:
    end = max(high, first + width - 1) if last else first + width - 1
    return f"{first:,}" if end == first else f"{first:,} to {end:,}"
