"""A promotion policy judged on evaluations made by hand: each rule met, unmet and at its boundary, and how often a rule
errs where it must not.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.errors import IngotError, RecipeError
from ingot.evaluation.metrics import METRICS, OF_TASK, Statistic
from ingot.evaluation.pairing import NotComparable
from ingot.evaluation.promotion import decide
from ingot.evaluation.result import Evaluation, Score
from ingot.evaluation.samples import Sample
from ingot.evaluation.score_intervals import paired_interval, share_interval
from ingot.evaluation.verdict import BROKEN, HOLDS, TOO_FEW, UNDEFINED, Condition, Verdict, evidence_of, load_verdict
from ingot.recipe_evaluate import Promotion

EVIDENCE = {"tuned/test.json": "0"}


def evaluation(
    name: str,
    scores: Sequence[float],
    metric: str = "exact_match",
    *,
    weights: Sequence[float] | None = None,
    groups: Sequence[str] | None = None,
    language: Sequence[str] | None = None,
    **asked: Any,
) -> Evaluation:
    """Rows that scored `scores` by `metric`; `weights`: what else a row counts with (tokens of a likelihood)."""
    column = np.asarray(scores, dtype=float)
    rows = np.stack([column, np.ones_like(column) if weights is None else np.asarray(weights, dtype=float)], axis=1)
    found = Statistic(rows, METRICS[metric].value_of)
    samples = [
        Sample(
            id=f"r:{n}",
            document=f"{n:016x}",
            prompt=f"question {n}",
            references=["yes"],
            output={},
            prediction="yes",
            numbers={metric: row.tolist()},
            group=groups[n] if groups else None,
            slices={"language": language[n]} if language else {},
        )
        for n, row in enumerate(rows)
    ]
    kind = next(kind for kind, names in OF_TASK.items() if metric in names)
    score = Score(found.value(), 0.0, 1.0, len(rows), METRICS[metric].higher_is_better)
    about = {"model": {"fingerprint": f"of {name}"}}
    return Evaluation(name, "test", kind, {"task": "test", **asked}, about, {metric: score}, samples, {metric: found})


def shares(won: int, lost: int, both: int = 0, neither: int = 0) -> tuple[list[int], list[int]]:
    """Base and tuned rows: `won` that only the tuned model gets, `lost` that only the base model gets."""
    return [0] * won + [1] * (lost + both) + [0] * neither, [1] * won + [0] * lost + [1] * both + [0] * neither


def judged(
    rules: Any, base: Sequence[float] | None, tuned: Sequence[float], alpha: float = 0.025, **made: Any
) -> Verdict:
    policy = Promotion(rules=rules if isinstance(rules, list) else [rules], alpha=alpha)
    first = None if base is None else {"test": evaluation("base", base, **made)}
    return decide(policy, first, {"test": evaluation("tuned", tuned, **made)}, samples=1000, evidence=EVIDENCE)


def state(rule: dict[str, Any], base: Sequence[float] | None, tuned: Sequence[float], **made: Any) -> str:
    verdict = judged({"metric": made.get("metric", "exact_match"), **rule}, base, tuned, **made)
    [condition] = verdict.conditions
    assert verdict.granted is (condition.state == HOLDS)
    return condition.state


BETTER, NOT_WORSE = {"require": "better"}, {"require": "not_worse", "margin": 0.1}


@pytest.mark.parametrize(
    ("rule", "rows", "expected"),
    [
        (BETTER, shares(40, 5, 100, 55), HOLDS),
        (BETTER, shares(20, 18, 100, 62), BROKEN),
        (BETTER, shares(5, 40, 100, 55), BROKEN),
        # McNemar's exact p is 0.031 of six rows won and none lost, and 0.063 of five: held against 2 x 0.025.
        (BETTER, shares(6, 0, 194), HOLDS),
        (BETTER, shares(5, 0, 195), BROKEN),
        (BETTER | {"margin": 0.05}, shares(40, 5, 100, 55), HOLDS),
        (BETTER | {"margin": 0.12}, shares(40, 5, 100, 55), BROKEN),
        (NOT_WORSE, shares(20, 20, 100, 60), HOLDS),
        (NOT_WORSE, shares(20, 30, 100, 50), BROKEN),
        # Two hundred rows without a change show that fewer than 1.9 % get worse, and no less.
        (NOT_WORSE | {"margin": 0.019}, shares(0, 0, 200), HOLDS),
        (NOT_WORSE | {"margin": 0.018}, shares(0, 0, 200), BROKEN),
    ],
)
def test_rules_about_the_difference(rule: dict[str, Any], rows: Any, expected: str) -> None:
    assert state(rule, *rows) == expected


@pytest.mark.parametrize(
    ("value", "hits", "expected"), [(0.8, 180, HOLDS), (0.86, 180, BROKEN), (0.981, 200, HOLDS), (0.982, 200, BROKEN)]
)
def test_at_least_is_about_the_lower_end(value: float, hits: int, expected: str) -> None:
    """200 right ones of 200 show a share of 0.9811, not of 1."""
    assert state({"require": "at_least", "value": value}, None, [1] * hits + [0] * (200 - hits)) == expected


def test_the_boundary_itself() -> None:
    """A difference has to pass its limit, a score to reach it."""
    base, tuned = shares(40, 5, 100, 55)
    [there] = judged({"metric": "exact_match", "require": "better"}, base, tuned).conditions
    assert state(BETTER | {"margin": there.low}, base, tuned) == BROKEN
    assert state(BETTER | {"margin": np.nextafter(there.low, 0)}, base, tuned) == HOLDS
    [score] = judged({"metric": "exact_match", "require": "at_least", "value": 0.1}, None, tuned).conditions
    assert state({"require": "at_least", "value": score.low}, None, tuned) == HOLDS
    assert state({"require": "at_least", "value": np.nextafter(score.low, 1)}, None, tuned) == BROKEN


LOSS: dict[str, Any] = {"metric": "loss"}


@pytest.mark.parametrize(
    ("rule", "change", "expected"),
    [
        (BETTER, -0.5, HOLDS),
        (BETTER, 0.5, BROKEN),
        (BETTER | {"margin": 0.6}, -0.5, BROKEN),
        (NOT_WORSE, 0.02, HOLDS),
        (NOT_WORSE, 0.2, BROKEN),
        ({"require": "at_least", "value": 3.3}, 0.0, HOLDS),
        ({"require": "at_least", "value": 2.9}, 0.0, BROKEN),
    ],
)
def test_lower_is_better_turns_rules_round(rule: dict[str, Any], change: float, expected: str) -> None:
    noise = np.random.default_rng(0).normal(size=(2, 200))
    base, tuned = 3 + noise[0], 3 + noise[0] + change + 0.1 * noise[1]
    assert state(rule, base, tuned, **LOSS) == expected


def test_the_interval_has_the_level_of_alpha() -> None:
    noise = np.random.default_rng(1).normal(size=200)
    [wide] = judged(LOSS | BETTER, 3 + noise, np.full(200, 3), alpha=0.01, **LOSS).conditions
    [narrow] = judged(LOSS | BETTER, 3 + noise, np.full(200, 3), alpha=0.1, **LOSS).conditions
    spread = noise.std() / 200**0.5
    assert (wide.high - wide.low) / 2 == pytest.approx(2.326 * spread, rel=0.12)  # type: ignore[operator]
    assert (narrow.high - narrow.low) / 2 == pytest.approx(1.282 * spread, rel=0.12)  # type: ignore[operator]


def shares_at(generator: np.random.Generator, n: int, won: float, lost: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows drawn where a share `won` is got by the tuned model alone and a share `lost` by the base model alone."""
    drawn = generator.choice(4, size=n, p=[won, lost, 0.4, 0.6 - won - lost])
    return np.isin(drawn, (1, 2)).astype(float), np.isin(drawn, (0, 2)).astype(float)


def losses_at(generator: np.random.Generator, n: int, change: float) -> tuple[np.ndarray, np.ndarray]:
    base = generator.gamma(2.0, size=n)
    return base, base + change + generator.normal(size=n)


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        (NOT_WORSE, lambda draw: shares_at(draw, 150, 0.05, 0.15)),
        (BETTER | {"margin": 0.1}, lambda draw: shares_at(draw, 150, 0.15, 0.05)),
        (NOT_WORSE, lambda draw: losses_at(draw, 150, 0.1)),
        (BETTER | {"margin": 0.1}, lambda draw: losses_at(draw, 150, -0.1)),
    ],
)
def test_a_model_at_the_boundary_passes_as_often_as_alpha_says(rule: dict[str, Any], rows: Callable[..., Any]) -> None:
    """alpha = 0.1 of 250 draws: a standard error of 0.019."""
    draw, made = np.random.default_rng(5), LOSS if rows(np.random.default_rng(0))[0].max() > 1 else {}
    policy = Promotion(rules=[{"metric": "exact_match", **made, **rule}], alpha=0.1)
    passed = 0
    for _ in range(250):
        base, tuned = (evaluation(name, it, **made) for name, it in zip(("a", "b"), rows(draw), strict=True))
        passed += decide(policy, {"test": base}, {"test": tuned}, samples=200, evidence={}).granted
    assert 0.05 < passed / 250 < 0.15


def test_models_that_are_the_same_pass_better_no_more_often_than_alpha() -> None:
    draw = np.random.default_rng(6)
    pairs = [shares_at(draw, 150, 0.05, 0.05) for _ in range(250)]
    passed = sum(judged({"metric": "exact_match"}, *pair, alpha=0.1).granted for pair in pairs)
    assert 0 < passed / 250 < 0.14


def test_one_rule_that_fails_is_enough() -> None:
    """A model that breaks one rule of three passes no more often for the other two: no alpha is shared out."""
    base, tuned = shares(40, 5, 100, 55)
    rules = [{"metric": "exact_match"}, {"metric": "exact_match", "require": "at_least", "value": 0.9}]
    verdict = judged(rules, base, tuned)
    assert [it.state for it in verdict.conditions] == [HOLDS, BROKEN]
    assert not verdict.granted
    assert verdict.sentence == (
        "The policy is not met: 1 of 2 conditions does not hold: exact_match of test: at least 0.9; "
        f"{verdict.conditions[1].found}."
    )
    assert judged(rules[:1] * 3, base, tuned).sentence == "The policy is met: all 3 conditions hold."


def test_slices_must_hold_each_and_small_ones_are_named() -> None:
    base, tuned = shares(60, 0, 60, 0)
    both = ["de"] * 50 + ["en"] * 10 + ["en"] * 50 + ["fr"] * 10
    rule = {"metric": "exact_match", "slices": ["language"], "min_rows": 50}
    verdict = judged(rule, base, tuned, language=both)
    found = {it.slice: (it.state, it.n, it.decides) for it in verdict.conditions}
    assert found == {
        None: (HOLDS, 120, True),
        "language = en": (HOLDS, 60, True),
        "language = de": (HOLDS, 50, True),
        "language = fr": (TOO_FEW, 10, False),
    }
    assert verdict.granted
    assert verdict.sentence == "The policy is met: all 3 conditions hold; 1 slice of too few rows left out."
    # Rows 60 to 119 are those that both models get: nothing got better there.
    worse = judged(rule, base, tuned, language=["de"] * 60 + ["en"] * 60)
    assert {it.slice: it.state for it in worse.conditions} == {
        None: HOLDS,
        "language = de": HOLDS,
        "language = en": BROKEN,
    }
    assert not worse.granted


@pytest.mark.parametrize(("language", "n"), [(["de"] * 60 + ["en"] * 60, 60), (None, 0)])
def test_a_field_without_a_slice_of_enough_rows_is_not_shown(language: list[str] | None, n: int) -> None:
    rule = {"metric": "exact_match", "slices": ["language"], "min_rows": 100}
    verdict = judged(rule, *shares(60, 0, 60), language=language)
    last = verdict.conditions[-1]
    assert (last.slice, last.state, last.n, last.decides) == ("language", TOO_FEW, n, True)
    assert not verdict.granted
    assert verdict.sentence.endswith(
        f"exact_match of test, language: difference above 0; {n} rows, not enough rows"
        f"{'; 2 slices of too few rows left out' if language else ''}."
    )


def test_too_few_rows_decide_nothing() -> None:
    [found] = judged({"metric": "exact_match"}, *shares(60, 0, 39)).conditions
    assert (found.state, found.measured) == (TOO_FEW, None)
    assert state(BETTER | {"min_rows": 99}, *shares(60, 0, 39)) == HOLDS


def test_rows_of_one_group_count_as_one() -> None:
    """Thirty passages of ten questions each, won or lost as a whole: ten lost ones more are no certain loss."""
    base, tuned = shares(120, 70, 110)
    groups = [str(row // 10) for row in range(300)]
    assert state(BETTER, base, tuned) == HOLDS
    [found] = judged({"metric": "exact_match"}, base, tuned, groups=groups).conditions
    assert (found.state, found.groups) == (BROKEN, 30)
    assert found.rows == "300 rows in 30 groups"
    assert state(BETTER, base, tuned, groups=[str(row // 20) for row in range(300)]) == TOO_FEW


def test_a_slice_on_which_nothing_is_defined_is_not_shown() -> None:
    """The loss of rows without a token: no number, and no condition that holds."""
    weights, language = [1.0] * 120 + [0.0] * 120, ["de"] * 120 + ["fr"] * 120
    rule = {"metric": "loss", "require": "at_least", "value": 9, "slices": ["language"]}
    verdict = judged(rule, None, weights, metric="loss", weights=weights, language=language)
    assert [it.state for it in verdict.conditions] == [HOLDS, HOLDS, UNDEFINED]
    assert not verdict.granted


def test_a_verdict_comes_back_from_its_file(tmp_path: Path) -> None:
    verdict = judged(
        [{"metric": "exact_match"}, {"metric": "exact_match", "require": "at_least", "value": 0.5}], *shares(60, 0, 60)
    )
    verdict.save(tmp_path)
    assert load_verdict(tmp_path) == verdict
    assert load_verdict(tmp_path).digest == verdict.digest  # type: ignore[union-attr]
    assert (verdict.model, verdict.evidence) == ("of tuned", EVIDENCE)
    assert load_verdict(tmp_path / "elsewhere") is None
    assert replace(verdict, granted=False).digest != verdict.digest
    shown = verdict.for_page("Overridden by X.")
    assert shown.sentence == f"{verdict.sentence} Overridden by X."
    assert shown.conditions[0].text == f"{verdict.conditions[0].wanted}; {verdict.conditions[0].found}; holds"
    for damaged in ("{", "[]", '{"format": 2}', '{"format": 1}'):
        (tmp_path / "verdict.json").write_text(damaged)
        with pytest.raises(IngotError, match=r"verdict\.json is damaged .* evaluate again"):
            load_verdict(tmp_path)


def test_evidence_is_what_the_rules_need(tmp_path: Path) -> None:
    for name in ("base/test.json", "tuned/test.json", "tuned/test.parquet", "tuned/other.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    alone = Promotion(rules=[{"metric": "acc", "require": "at_least", "value": 1}])
    assert list(evidence_of(tmp_path, alone)) == ["tuned/test.json", "tuned/test.parquet"]
    before = evidence_of(tmp_path, Promotion(rules=[{"metric": "acc"}]))
    assert list(before) == ["base/test.json", "tuned/test.json", "tuned/test.parquet"]
    (tmp_path / "base" / "test.json").write_text("changed")
    after = evidence_of(tmp_path, Promotion(rules=[{"metric": "acc"}]))
    assert {name for name in before if before[name] != after[name]} == {"base/test.json"}


def test_what_cannot_be_judged_is_refused() -> None:
    policy = Promotion(rules=[{"metric": "exact_match"}])
    tuned = {"test": evaluation("tuned", [1] * 100)}
    asked = {"test": evaluation("base", [1] * 100, max_new_tokens=7)}
    with pytest.raises(NotComparable, match="max_new_tokens = 7"):
        decide(policy, asked, tuned, samples=200, evidence={})
    with pytest.raises(RecipeError, match="the base model was not measured"):
        decide(policy, None, tuned, samples=200, evidence={})
    with pytest.raises(RecipeError, match=r"'bleu': it was not measured on test"):
        decide(Promotion(rules=[{"metric": "bleu"}]), tuned, tuned, samples=200, evidence={})


def test_conditions_read_as_sentences() -> None:
    made = Condition("test", "perplexity", "not_worse", 0.5, 300, HOLDS, 0.2, 0.1, 0.3, "language = de")
    assert f"{made.wanted}; {made.found}" == (
        "perplexity of test, language = de: difference below 0.5; +0.20 [+0.10, +0.30] on 300 rows"
    )
    lower = Condition("other", "loss", "at_least", 2.0, 1, HOLDS, 1.5, 1.25, 1.75)
    assert f"{lower.wanted}; {lower.found}" == "loss of other: at most 2; 1.500 [1.250, 1.750] on 1 row"


@pytest.mark.parametrize(
    ("won", "lost", "n"), [(0, 0, 50), (9, 2, 40), (0, 7, 30), (1, 0, 200), (30, 0, 30), (60, 55, 300)]
)
def test_the_paired_interval_is_where_the_score_test_ends(won: int, lost: int, n: int) -> None:
    """Both ends against a score statistic whose nuisance share is found by a search over the likelihood."""
    from scipy.optimize import minimize_scalar
    from scipy.special import xlogy

    def statistic(difference: float) -> float:
        def surprise(share: float) -> float:
            parts = (won, share + difference), (lost, share), (n - won - lost, 1 - 2 * share - difference)
            return -sum(float(xlogy(count, max(it, 1e-300))) for count, it in parts)

        room = (max(0.0, -difference), (1 - difference) / 2)
        share = minimize_scalar(surprise, bounds=room, method="bounded", options={"xatol": 1e-12}).x
        return float((won - lost - n * difference) / (n * (2 * share + difference - difference**2)) ** 0.5)

    low, high = paired_interval(won, lost, n, 1.96)
    assert low < (won - lost) / n or won - lost == -n
    assert statistic(low) == pytest.approx(1.96, abs=2e-3)
    if high < 1:
        assert statistic(high) == pytest.approx(-1.96, abs=2e-3)


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (20, 20), (7, 30), (150, 300)])
def test_the_share_interval_is_wilsons(hits: int, n: int) -> None:
    from scipy.stats import binomtest

    wilson = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert share_interval(hits, n, 1.959963985) == pytest.approx((wilson.low, wilson.high), abs=1e-9)
