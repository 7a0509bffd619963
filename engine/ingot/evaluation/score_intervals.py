"""Score intervals of shares, for decisions: they stay wide where all rows agree, and a bootstrap's shrink to nothing.

A hundred rows that all come out right resample to a hundred right ones: a bootstrap would call the share 1.0 for sure.
"""

import math
from collections.abc import Callable


def share_interval(hits: int, n: int, z: float) -> tuple[float, float]:
    """Interval of a share, `hits` of `n`, at `z` standard errors a side (Wilson 1927)."""
    share, weight = hits / n, z * z / n
    middle = (share + weight / 2) / (1 + weight)
    reach = z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    # Of all or none the end is 1 or 0; the root leaves it a rounding error away.
    low, high = max(0.0, middle - reach), min(1.0, middle + reach)
    return (low if hits else 0.0), (high if hits < n else 1.0)


def paired_interval(won: int, lost: int, n: int, z: float) -> tuple[float, float]:
    """Interval of the difference of two shares on the same `n` rows at `z` standard errors a side (Tango 1998,
    Statistics in Medicine 17, 891). Of the rows, `won` are right by the second model alone, `lost` by the first alone.

    Both ends are where its score statistic reaches z: the rows' standard error is that of the difference in question,
    not of the one that was measured.
    """
    difference = (won - lost) / n
    low = -1.0 if lost == n else _crossing(lambda it: _score(won, lost, n, it) - z, -1.0, difference)
    high = 1.0 if won == n else _crossing(lambda it: _score(won, lost, n, it) + z, difference, 1.0)
    return low, high


def _score(won: int, lost: int, n: int, difference: float) -> float:
    """Standard errors between what was measured and `difference`; falls as that grows."""
    # The likeliest share of lost rows where the true difference is `difference`: a root of a x^2 + b x + c.
    a, b = 2.0 * n, (2 * n - won + lost) * difference - won - lost
    c = -lost * difference * (1 - difference)
    share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = n * (2 * share + difference * (1 - difference))
    gap = won - lost - n * difference
    return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2
