"""Intervals that cover, paired tests that see what unpaired ones miss, and exact tests against scipy."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy.stats import binomtest

from ingot.evaluation.metrics import METRICS, Statistic, row_mean
from ingot.evaluation.statistics import _resampled_sums, detectable_difference, interval, mcnemar_exact, paired


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
