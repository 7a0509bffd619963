"""Intervals that cover, paired tests that see what unpaired ones miss, and exact tests against scipy."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy.stats import binomtest

from ingot.evaluation.metrics import METRICS, Statistic, row_mean
from ingot.evaluation.statistic import mean_of
from ingot.evaluation.statistics import (
    _draws,
    _resampled_values,
    cluster_numbers,
    detectable_change,
    detectable_difference,
    foreseen,
    interval,
    mcnemar_exact,
    paired,
    resamples_of,
)


def _resampled_sums(rows_NK: np.ndarray, samples: int, seed: int) -> np.ndarray:
    return _resampled_values([Statistic(rows_NK, lambda sums: sums)], samples, seed)[0]


def test_resampled_sums_are_sums_of_n_drawn_rows() -> None:
    rows_NK = np.eye(7)
    counts = _resampled_sums(rows_NK, 500, seed=0)
    assert counts.shape == (500, 7)
    assert (counts.sum(1) == 7).all()
    assert (counts == counts.round()).all()
    assert counts.var(0).mean() == pytest.approx(6 / 7, rel=0.15)  # multinomial: n p (1 - p)


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_NK = np.random.default_rng(1).normal(size=(50, 2))
    whole = _resampled_sums(rows_NK, 300, seed=5)
    monkeypatch.setattr("ingot.evaluation.statistics.NUMBERS_AT_ONCE", 120)
    assert (_resampled_sums(rows_NK, 300, seed=5) == whole).all()
    monkeypatch.setattr("ingot.evaluation.statistics.COUNTS_AT_ONCE", 170)
    assert np.allclose(_resampled_sums(rows_NK, 300, seed=5), whole, rtol=0, atol=1e-9)  # up to the order of summing


def test_an_interval_depends_on_the_seed_only() -> None:
    statistic = row_mean(np.random.default_rng(0).normal(size=80).tolist())
    assert interval(statistic, 300, 0.95, seed=1) == interval(statistic, 300, 0.95, seed=1)
    assert interval(statistic, 300, 0.95, seed=1) != interval(statistic, 300, 0.95, seed=2)


def test_the_interval_of_a_mean_is_that_of_the_normal_theory() -> None:
    scores = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = interval(row_mean(scores.tolist()), 4000, 0.90)
    half = 1.645 * scores.std() / np.sqrt(400)
    assert low == pytest.approx(scores.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(scores.mean() + half, abs=0.15 * half)


def test_confidence_widens_the_interval() -> None:
    statistic = row_mean(np.random.default_rng(0).normal(size=80).tolist())
    low_80, high_80 = interval(statistic, 1000, 0.80)
    low_99, high_99 = interval(statistic, 1000, 0.99)
    assert low_99 < low_80 < statistic.value() < high_80 < high_99


def test_constant_scores_have_no_width() -> None:
    assert interval(row_mean([0.25] * 9), 100, 0.95) == (0.25, 0.25)


def test_a_95_percent_interval_of_a_share_covers_about_95_percent() -> None:
    draw, truth, covered, runs = np.random.default_rng(0), 0.7, 0, 400
    for run in range(runs):
        low, high = interval(row_mean((draw.random(150) < truth).astype(float).tolist()), 400, 0.95, seed=run)
        covered += low <= truth <= high
    assert (
        0.91 <= covered / runs <= 0.98
    )  # 0.95 with three standard errors of 400 runs, and the percentile method's bias


def test_identical_models_differ_by_nothing() -> None:
    scores = np.random.default_rng(0).random(60).tolist()
    result = paired(row_mean(scores), row_mean(scores), 200, 0.95)
    assert (result.difference, result.low, result.high, result.p_value, result.n) == (0.0, 0.0, 0.0, 1.0, 60)
    assert result.mcnemar_p is None


def test_identical_models_of_a_corpus_metric_differ_by_nothing() -> None:
    truth = ["a", "b", "c", "a"] * 10
    predicted = ["a", "b", "a", "c"] * 10
    statistic = METRICS["f1_macro"].compute(predicted, [[t] for t in truth])
    result = paired(statistic, statistic, 200, 0.95)
    assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_a_clear_improvement_is_found_and_its_sign_is_tuned_minus_base() -> None:
    base, tuned = [0.0] * 40 + [1.0] * 10, [1.0] * 45 + [0.0] * 5
    result = paired(row_mean(base), row_mean(tuned), 1000, 0.95)
    assert result.difference == pytest.approx(0.7)
    assert 0.4 < result.low < 0.7 < result.high < 1.0
    assert result.p_value < 0.01
    assert result.mcnemar_p == pytest.approx(binomtest(5, 45).pvalue, rel=1e-9)
    worse = paired(row_mean(tuned), row_mean(base), 1000, 0.95)
    assert worse.difference == pytest.approx(-0.7)
    assert worse.high < 0
    assert worse.p_value < 0.01


def test_a_p_value_claims_no_more_than_its_resamples_can_show() -> None:
    base, tuned = row_mean([0.1] * 30), row_mean(np.linspace(0.2, 0.5, 30).tolist())
    assert paired(base, tuned, 100, 0.95).p_value == pytest.approx(2 / 101)
    assert paired(tuned, base, 999, 0.95).p_value == pytest.approx(2 / 1000)


def test_models_measured_on_other_rows_are_not_paired() -> None:
    with pytest.raises(ValueError, match="same rows"):
        paired(row_mean([0.1] * 30), row_mean([0.1] * 29), 100, 0.95)


def test_pairing_cancels_what_rows_share() -> None:
    # Rows are very different in difficulty, and the tuned model is a little better on every one of them.
    difficulty = np.random.default_rng(0).normal(0.0, 5.0, size=100)
    gain = np.random.default_rng(1).normal(0.3, 0.2, size=100)
    base, tuned = row_mean(difficulty.tolist()), row_mean((difficulty + gain).tolist())
    result = paired(base, tuned, 1000, 0.95)
    assert result.p_value < 0.01
    assert result.high - result.low < 0.2
    (low_a, high_a), (low_b, _) = interval(base, 1000, 0.95), interval(tuned, 1000, 0.95)
    assert low_b < high_a
    assert high_a - low_a > 1.0


def test_no_true_difference_is_rarely_called_one() -> None:
    draw, runs = np.random.default_rng(0), 300
    found = 0
    for run in range(runs):
        base, tuned = draw.normal(size=100), draw.normal(size=100)
        found += paired(row_mean(base.tolist()), row_mean(tuned.tolist()), 400, 0.95, seed=run).p_value <= 0.05
    assert 0.01 <= found / runs <= 0.09


def test_mcnemar_is_for_zero_and_one_only() -> None:
    shares = row_mean([0.5, 1.0, 0.0])
    assert paired(shares, row_mean([1.0, 1.0, 0.0]), 100, 0.95).mcnemar_p is None
    sums = Statistic(np.ones((3, 2)), lambda s: s[..., 0] / s[..., 1])
    assert paired(sums, sums, 100, 0.95).mcnemar_p is None


@pytest.mark.parametrize(
    ("lost", "won"), [(0, 0), (0, 1), (1, 0), (0, 5), (3, 12), (12, 3), (7, 7), (40, 61), (900, 1100), (5000, 5200)]
)
def test_mcnemar_equals_the_binomial_test(lost: int, won: int) -> None:
    expected = binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar_exact(lost, won) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("n", "discordance", "points"),
    [
        (200, 0.1, 6.3),
        (200, 0.2, 8.9),
        (500, 0.1, 4.0),
        (500, 0.2, 5.6),
        (1319, 0.1, 2.4),
        (1319, 0.2, 3.5),
        (5000, 0.1, 1.3),
        (5000, 0.2, 1.8),
        (14042, 0.1, 0.75),
        (14042, 0.2, 1.1),
    ],
)
def test_detectable_difference_has_known_values(n: int, discordance: float, points: float) -> None:
    assert 100 * detectable_difference(n, discordance) == pytest.approx(points, abs=0.15)


def test_a_detectable_difference_is_detected_with_the_promised_power() -> None:
    n, discordance = 500, 0.2
    d = detectable_difference(n, discordance)
    draw = np.random.default_rng(0)
    won, lost, _ = draw.multinomial(n, [(discordance + d) / 2, (discordance - d) / 2, 1 - discordance], size=1500).T
    power = np.mean([mcnemar_exact(int(a), int(b)) < 0.05 for a, b in zip(lost, won, strict=True)])
    assert 0.72 <= power <= 0.84  # the exact test is a little more careful than the normal approximation


def test_a_set_too_small_to_see_any_difference_says_so() -> None:
    assert detectable_difference(10, 0.1) == math.inf  # one row of ten differs at all
    assert detectable_difference(100, 0.1) < 0.1


def test_a_larger_difference_than_the_discordance_is_asked_for_with_as_much() -> None:
    assert detectable_difference(10, 0.1, rising=True) == pytest.approx(0.66, abs=0.05)
    assert detectable_difference(500, 0.2, rising=True) == detectable_difference(500, 0.2)
    assert detectable_difference(3, 0.1, rising=True) == math.inf
    n, d = 200, detectable_difference(200, 0.0, rising=True)
    won = np.random.default_rng(0).binomial(n, d, size=1500)  # never worse
    assert 0.7 <= np.mean([mcnemar_exact(0, int(one)) < 0.05 for one in won]) <= 0.9


def test_a_detectable_change_is_detected_with_the_promised_power() -> None:
    error, draw = 0.3, np.random.default_rng(0)
    found = np.abs(draw.normal(detectable_change(error), error, size=20_000)) > 1.959964 * error
    assert found.mean() == pytest.approx(0.8, abs=0.01)
    assert detectable_change(error, alpha=0.01) > detectable_change(error)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((200,), "200 rows cannot see less than 6.2 points (discordance assumed 10 %, 80 % power, alpha 0.05)"),
        ((1,), "1 row cannot see any difference (discordance"),
        ((200, 50), "200 rows of 50 groups cannot see less than 6.2 points, or less than 15 points where a group"),
    ],
)
def test_what_rows_cannot_see_is_said_with_its_assumptions(given: tuple[int, ...], said: str) -> None:
    assert foreseen(*given).startswith(said)
    assert foreseen(200, share=False).startswith("200 rows cannot see less than 0.2 standard deviations of the rows'")


def test_paired_models_may_know_different_classes() -> None:
    references = [["a"], ["b"]] * 30
    base = METRICS["f1_macro"].compute(["c", "d"] * 30, references)
    tuned = METRICS["f1_macro"].compute(["a", "b"] * 30, references)
    assert base.rows.shape[1] != tuned.rows.shape[1]
    assert paired(base, tuned, 100, 0.95).difference == 1.0


def test_memory_does_not_grow_with_rows_times_samples() -> None:
    rows_NK = np.ones((100_000, 2))
    tracemalloc.start()
    sums = _resampled_sums(rows_NK, 60, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (sums == 100_000).all()
    assert peak < 30e6  # all counts at once would be 48 MB here, and 800 MB for 1,000 samples


# --- metrics that no sums give ---


def median_of(rows_NK: np.ndarray, counts_SN: np.ndarray) -> np.ndarray:
    return np.asarray([np.median(np.repeat(rows_NK[:, 0], counts.astype(int))) for counts in counts_SN])


def test_a_metric_without_sums_sees_the_draws_themselves() -> None:
    column = np.random.default_rng(0).normal(size=61)
    statistic = Statistic(column[:, None], median_of, whole=True)
    assert statistic.value() == np.median(column)
    assert statistic.per_row() is None
    drawn = np.concatenate([counts.copy() for counts in _draws(61, 200, seed=3)])
    medians = [np.median(np.repeat(column, counts.astype(int))) for counts in drawn]
    assert interval(statistic, 200, 0.9, seed=3) == pytest.approx(np.quantile(medians, [0.05, 0.95]))
    better = Statistic(column[:, None] + 1.0, median_of, whole=True)
    result = paired(statistic, better, 200, 0.95)
    assert (result.difference, result.low, result.high) == pytest.approx((1.0, 1.0, 1.0))
    assert result.p_value == pytest.approx(2 / 201)


def test_draws_on_which_a_metric_is_undefined_take_no_part() -> None:
    rows = np.asarray([[0.0], [1.0], [1.0]])

    def undefined_without_the_first(rows_NK: np.ndarray, counts_SN: np.ndarray) -> np.ndarray:
        return np.where(counts_SN[:, 0] > 0, counts_SN @ rows_NK[:, 0] / 3, np.nan)

    statistic = Statistic(rows, undefined_without_the_first, whole=True)
    low, high = interval(statistic, 400, 0.95)
    assert 0.0 <= low < high <= 2 / 3 + 1e-12  # all three ones would be a draw without the first
    same = paired(statistic, statistic, 400, 0.95)
    assert (same.difference, same.p_value) == (0.0, 1.0)
    better = Statistic(rows + 1.0, lambda rows_NK, counts_SN: statistic.value_of(rows, counts_SN) + 1.0, whole=True)
    defined = sum(int((counts[:, 0] > 0).sum()) for counts in _draws(3, 400, seed=0))
    assert 100 < defined < 400
    assert paired(statistic, better, 400, 0.95).p_value == pytest.approx(2 / (defined + 1))


def test_time_of_a_metric_without_sums_is_bounded() -> None:
    large = Statistic(np.ones((100_000, 78)), median_of, whole=True)
    assert resamples_of(large, 1000) == 256
    assert resamples_of(Statistic(large.rows, mean_of), 1000) == 1000
    assert resamples_of(Statistic(np.ones((500, 3)), median_of, whole=True), 1000) == 1000


# --- rows that depend on each other ---


def clustered_changes(draw: np.random.Generator, clusters: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Changes of rows whose clusters, of 2 to 9 rows, share much of them; their true mean is 0."""
    cluster_N = np.repeat(np.arange(clusters), draw.integers(2, 10, clusters))
    return draw.normal(size=clusters)[cluster_N] + draw.normal(size=len(cluster_N)), cluster_N


def robust_error(changes_N: np.ndarray, cluster_N: np.ndarray) -> float:
    """Cluster-robust standard error of a mean (Liang & Zeger 1986), without correction for few clusters."""
    sums_C = np.bincount(cluster_N, weights=changes_N - changes_N.mean())
    return float(np.sqrt((sums_C**2).sum()) / len(changes_N))


def test_resampled_clusters_give_the_cluster_robust_error() -> None:
    changes_N, cluster_N = clustered_changes(np.random.default_rng(0), clusters=200)
    base = np.random.default_rng(1).normal(0.0, 9.0, size=len(changes_N))
    found = paired(row_mean(base), row_mean(base + changes_N), 3000, 0.95, cluster_N=cluster_N)
    error = robust_error(changes_N, cluster_N)
    assert found.standard_error == pytest.approx(error, rel=0.05)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.07)
    alone = paired(row_mean(base), row_mean(base + changes_N), 3000, 0.95)
    assert alone.standard_error == pytest.approx(changes_N.std() / np.sqrt(len(changes_N)), rel=0.05)
    assert alone.standard_error < 0.6 * error


def test_intervals_of_clustered_rows_cover_only_where_clusters_are_drawn() -> None:
    draw, runs = np.random.default_rng(0), 250
    covered, shown = {"clusters": 0, "rows": 0}, {"clusters": 0, "rows": 0}
    for run in range(runs):
        changes_N, cluster_N = clustered_changes(draw)
        nothing = row_mean(np.zeros(len(changes_N)))
        for unit, own in (("clusters", cluster_N), ("rows", None)):
            found = paired(nothing, row_mean(changes_N), 300, 0.95, seed=run, cluster_N=own)
            covered[unit] += found.low <= 0 <= found.high
            shown[unit] += found.p_value < 0.05
    assert 0.89 <= covered["clusters"] / runs <= 0.98  # 0.95 with three standard errors, and the percentile's bias
    assert shown["clusters"] / runs <= 0.10
    assert covered["rows"] / runs < 0.75
    assert shown["rows"] / runs > 0.25


def test_mcnemar_is_not_for_rows_of_clusters() -> None:
    base, tuned = row_mean([0.0, 0.0, 1.0, 1.0] * 5), row_mean([1.0, 1.0, 1.0, 1.0] * 5)
    cluster_N = np.repeat(np.arange(10), 2)
    assert paired(base, tuned, 100, 0.95).mcnemar_p is not None
    assert paired(base, tuned, 100, 0.95, cluster_N=cluster_N).mcnemar_p is None


def test_clusters_of_a_metric_without_sums_are_drawn_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def spread(rows_NK: np.ndarray, counts_SN: np.ndarray) -> np.ndarray:
        seen.append(counts_SN.copy())
        return counts_SN @ rows_NK[:, 0] / counts_SN.sum(1)

    monkeypatch.setattr("ingot.evaluation.statistics.COUNTS_AT_ONCE", 70)
    cluster_N = np.asarray([0, 0, 0, 1, 2, 2, 3])
    rows = Statistic(np.arange(7.0)[:, None], spread, whole=True)
    low, high = interval(rows, 200, 0.95, seed=4, cluster_N=cluster_N)
    counts_SN = np.concatenate(seen)
    assert counts_SN.shape == (200, 7)
    assert max(map(len, seen)) <= 10  # by the rows that a draw takes, not by the clusters
    for rows_of in ([0, 1, 2], [4, 5]):
        assert (counts_SN[:, rows_of] == counts_SN[:, rows_of[:1]]).all()
    assert (counts_SN[:, [0, 3, 4, 6]].sum(1) == 4).all()
    sums = Statistic(np.stack([np.arange(7.0), np.ones(7)], axis=1), mean_of)
    assert interval(sums, 200, 0.95, seed=4, cluster_N=cluster_N) == pytest.approx((low, high))


def test_rows_without_a_group_stand_alone() -> None:
    found = cluster_numbers(["a", None, "b", "a", None, "0"])
    assert found is not None
    assert found.tolist() == [0, 1, 2, 0, 3, 4]
    assert cluster_numbers(["a", "b", None]) is None
    assert cluster_numbers([]) is None
