"""Intervals and paired tests by resampling rows (Efron & Tibshirani 1993), and what a test set of a size can see."""

# S resamples, N rows, C clusters of rows, U what is drawn (rows, or clusters of them), K numbers per row

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ingot.evaluation.statistic import Array, Statistic

COUNTS_AT_ONCE = 2_000_000  # 16 MB
NUMBERS_AT_ONCE = 65_536
NUMBERS_AT_MOST = 2_000_000_000  # draws x rows x numbers per row
EXPECTED_DISCORDANCE = 0.1  # share of rows on which two models disagree, before it is known


@dataclass(frozen=True)
class Paired:
    """Tuned minus base on the same rows: the difference, its interval, and a two-sided p-value.

    `mcnemar_p` is McNemar's exact test, for scores of independent rows that are 0 or 1; None otherwise.
    `standard_error`: of the difference, from the resamples; None in files from before it was kept.
    """

    difference: float
    low: float
    high: float
    p_value: float
    mcnemar_p: float | None
    n: int
    standard_error: float | None = None


def _draws(n: int, samples: int, seed: int, width: int = 0) -> Iterator[Array]:
    """How often each of `n` rows is in each of `samples` draws with replacement, some draws at a time [..., N].

    The draws depend on (seed, samples, n) only. `width`: numbers that a draw will take, where they are more than `n`.
    """
    generator, at_once = np.random.default_rng(seed), max(1, NUMBERS_AT_ONCE // n)
    buffer_SN = np.empty((min(samples, max(1, COUNTS_AT_ONCE // max(n, width))), n))
    for start in range(0, samples, len(buffer_SN)):
        counts_SN = buffer_SN[: samples - start]
        for first in range(0, len(counts_SN), at_once):
            # Five times as fast as a multinomial draw of 100,000 rows; of few rows, several draws are counted in one.
            some_SN = counts_SN[first : first + at_once]
            numbers_SN = generator.integers(0, n, some_SN.shape) + n * np.arange(len(some_SN))[:, None]
            some_SN[:] = np.bincount(numbers_SN.ravel(), minlength=some_SN.size).reshape(some_SN.shape)
        yield counts_SN


def cluster_numbers(groups: Sequence[str | None]) -> Array | None:
    """The cluster of every row [N] int, 0 to C - 1: rows of one group are one, a row without a group is its own. None
    where every row stands alone.
    """
    numbers: dict[object, int] = {}
    own = [numbers.setdefault(row if group is None else group, len(numbers)) for row, group in enumerate(groups)]
    return np.asarray(own) if len(numbers) < len(own) else None


def _cluster_sums(rows_NK: Array, cluster_N: Array) -> Array:
    """Sums [C, K] of the rows of each cluster."""
    sums_CK = np.zeros((int(cluster_N.max()) + 1, rows_NK.shape[1]))
    np.add.at(sums_CK, cluster_N, rows_NK)
    return sums_CK


def resamples_of(statistic: Statistic, samples: int) -> int:
    """How many draws are made where `samples` are asked for: fewer, but at least 100, of a metric without sums on many
    rows. Its time grows with draws x rows x numbers: half a minute for the most that are taken (2 to 14 ns each).
    """
    return min(samples, max(100, int(NUMBERS_AT_MOST // statistic.rows.size))) if statistic.whole else samples


def _resampled_values(
    sides: Sequence[Statistic], samples: int, seed: int, cluster_N: Array | None = None
) -> list[Array]:
    """Values [S] of each of `sides` on the same `samples` draws of the rows, or of whole clusters of them."""
    n = len(sides[0].rows)
    units = n if cluster_N is None else int(cluster_N.max()) + 1
    rows = [it.rows if it.whole or cluster_N is None else _cluster_sums(it.rows, cluster_N) for it in sides]
    found: list[list[Array]] = [[] for _ in sides]
    for counts_SU in _draws(units, samples, seed, width=n):
        for side, own_UK, parts in zip(sides, rows, found, strict=True):
            if side.whole:
                parts.append(side.value_of(own_UK, counts_SU if cluster_N is None else counts_SU[:, cluster_N]))
            else:
                parts.append(counts_SU @ own_UK)
    together = [np.concatenate(parts) for parts in found]
    return [it if side.whole else side.value_of(it) for side, it in zip(sides, together, strict=True)]


def interval(
    statistic: Statistic, samples: int, confidence: float, seed: int = 0, cluster_N: Array | None = None
) -> tuple[float, float]:
    """Percentile bootstrap interval of the metric, over the draws on which it is defined. `cluster_N`: as `paired`."""
    [values_S] = _resampled_values([statistic], resamples_of(statistic, samples), seed, cluster_N)
    return _quantiles(values_S, confidence)


def paired(
    base: Statistic,
    tuned: Statistic,
    samples: int,
    confidence: float,
    seed: int = 0,
    cluster_N: Array | None = None,
) -> Paired:
    """Compare two models on the same rows: both are resampled by the same draws, so what rows share cancels out.

    The p-value is twice the smaller share of resampled differences on either side of 0, counting the measured rows
    themselves as one more resample: it is never below 2 / (samples + 1) (Davison & Hinkley 1997, section 4.2).

    `cluster_N` [N] int: the cluster, 0 to C - 1, of every row. Rows of one cluster depend on each other, so whole
    clusters are drawn (section 3.8), and McNemar's test, which takes rows as independent, is not made.
    """
    if len(base.rows) != len(tuned.rows):
        raise ValueError(f"{len(base.rows)} rows against {len(tuned.rows)}: a paired test needs the same rows")
    samples = min(resamples_of(side, samples) for side in (base, tuned))
    base_S, tuned_S = _resampled_values([base, tuned], samples, seed, cluster_N)
    differences_S = tuned_S - base_S
    differences_S = differences_S[~np.isnan(differences_S)]  # draws on which the metric is undefined
    low, high = _quantiles(differences_S, confidence)
    tail = min((differences_S <= 0).sum(), (differences_S >= 0).sum())
    p_value = min(1.0, 2.0 * (float(tail) + 1.0) / (len(differences_S) + 1.0))
    exact = mcnemar_of(base, tuned) if cluster_N is None else None
    spread = float(differences_S.std(ddof=1)) if len(differences_S) > 1 else None
    return Paired(tuned.value() - base.value(), low, high, p_value, exact, len(base.rows), spread)


def mcnemar_of(base: Statistic, tuned: Statistic) -> float | None:
    """`mcnemar_exact` of two models' rows; None where rows have other scores than 0 and 1."""
    a, b = base.per_row(), tuned.per_row()
    if a is None or b is None or not {*a, *b} <= {0.0, 1.0}:
        return None
    lost = sum(x > y for x, y in zip(a, b, strict=True))
    won = sum(x < y for x, y in zip(a, b, strict=True))
    return mcnemar_exact(lost, won)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in order: the chance of any false finding stays below alpha (Holm 1979)."""
    adjusted, highest, count = [0.0] * len(p_values), 0.0, len(p_values)
    for place, index in enumerate(sorted(range(count), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (count - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def mcnemar_exact(lost: int, won: int) -> float:
    """Two-sided exact binomial test that rows lost and rows won are equally likely (McNemar 1947)."""
    n, k = lost + won, min(lost, won)
    # In logarithms: the plain sum of binomials over 2^n overflows from n = 1,024 on.
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2.0 * sum(map(math.exp, logs)))


def detectable_difference(
    n: int, discordance: float = 0.2, power: float = 0.8, alpha: float = 0.05, *, rising: bool = False
) -> float:
    """Smallest true difference of two shares that a paired test on `n` rows finds with `power`.

    `discordance`: share of rows on which the two models disagree; the difference cannot be larger, so a set that is too
    small to see even that gives infinity. `rising`: a larger difference is asked for with as much discordance as it
    needs. Normal approximation of McNemar's test (Connor 1987).
    """
    z_alpha, z_power = _quantiles_of_normal(alpha, power)
    most = 1.0 if rising else discordance

    def seen(difference: float) -> bool:
        disagreeing = max(discordance, difference)
        spread = math.sqrt(max(disagreeing - difference**2, 0.0))
        return math.sqrt(n) * difference >= z_alpha * math.sqrt(disagreeing) + z_power * spread

    if not seen(most):
        return math.inf
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if seen(middle) else (middle, high)
    return high


def detectable_change(standard_error: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true difference that a two-sided test finds with `power`, of a difference with this standard error
    (normal approximation; Bloom 1995), in the metric's own unit.
    """
    return sum(_quantiles_of_normal(alpha, power)) * standard_error


def foreseen(n: int, clusters: int | None = None, *, share: bool = True, alpha: float = 0.05) -> str:
    """What a paired test on `n` rows, of `clusters` groups, will not see, as the end of a sentence with its
    assumptions. `share`: a metric is a share of rows; else its unit is what the rows' changes spread by.
    """

    unit = "points" if share else "standard deviations of the rows' changes"

    def least(independent: int) -> str:
        if not share:
            return f"less than {detectable_change(1 / math.sqrt(independent), alpha=alpha):.2g} {unit}"
        found = 100 * detectable_difference(independent, EXPECTED_DISCORDANCE, alpha=alpha, rising=True)
        if not math.isfinite(found):
            return "any difference"
        return f"less than {found:.0f} {unit}" if found >= 10 else f"less than {found:.2g} {unit}"

    rows = f"{n:,} {'rows' if n > 1 else 'row'}"
    seen = f"{rows} cannot see {least(n)}"
    if clusters is not None:
        seen = f"{rows} of {clusters:,} groups cannot see {least(n)}, or {least(clusters)} where a group changes alike"
    assumed = [f"discordance assumed {100 * EXPECTED_DISCORDANCE:.0f} %"] if share else []
    return f"{seen} ({', '.join([*assumed, '80 % power', f'alpha {alpha:g}'])})"


def _quantiles_of_normal(alpha: float, power: float) -> tuple[float, float]:
    return NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)


def _quantiles(values_S: Array, confidence: float) -> tuple[float, float]:
    edge = (1.0 - confidence) / 2.0
    low, high = np.nanquantile(values_S, [edge, 1.0 - edge])
    return float(low), float(high)
