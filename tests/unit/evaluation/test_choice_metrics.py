"""Multiple choice and perplexity against lm-evaluation-harness' own functions."""

import math
from typing import Any

import numpy as np
import pytest

from ingot.errors import IngotError
from ingot.evaluation.choice_metrics import statistics_of_choices
from ingot.evaluation.likelihood_metrics import statistics_of_documents
from ingot.evaluation.metrics import OF_TASK, statistic_of

TEXTS = ["Paris", "東京都", "😀 yes", "a much longer answer than the others", "No", "no", "1,000", " "]


def drawn(n: int, seed: int) -> tuple[list[list[float]], list[list[str]], list[int], list[list[float]]]:
    """Likelihoods, choices (2 to 5 a row), right places, likelihoods without the question."""
    draw = np.random.default_rng(seed)
    choices = [list(draw.choice(TEXTS, size=draw.integers(2, 6), replace=False)) for _ in range(n)]
    scores = [[float(-draw.exponential(2.0) * len(text)) for text in texts] for texts in choices]
    alone = [[float(-draw.exponential(2.0) * len(text)) for text in texts] for texts in choices]
    return scores, choices, [int(draw.integers(len(texts))) for texts in choices], alone


def harness(scores: list[float], choices: list[str], gold: int, alone: list[float]) -> dict[str, Any]:
    """What a task of lm-evaluation-harness makes of one row."""
    task_class = pytest.importorskip("lm_eval.api.task").ConfigurableTask
    names = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "brier_score")
    task = object.__new__(task_class)
    task.OUTPUT_TYPE, task.multiple_input, task.multiple_target = "multiple_choice", 0, 0
    task._metric_fn_list = dict.fromkeys(names)
    task._config = type("Config", (), {"metric_list": [], "process_results": None})()
    task.doc_to_choice, task.doc_to_target = lambda doc: choices, lambda doc: gold
    results: dict[str, Any] = task.process_results({}, [(score, False) for score in [*scores, *alone]])
    return results


@pytest.mark.parametrize("seed", range(3))
def test_choices_are_scored_as_the_harness_does(seed: int) -> None:
    rows = drawn(60, seed)
    theirs = [harness(*row) for row in zip(*rows, strict=True)]
    scores, choices, gold, alone = rows
    compute = statistics_of_choices(scores, choices, gold, alone)
    assert set(compute) == set(OF_TASK["multiple-choice"])
    brier = pytest.importorskip("lm_eval.api.metrics").brier_score
    for name in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info"):
        assert compute[name]().per_row() == [row[name] for row in theirs]
        assert compute[name]().value() == pytest.approx(np.mean([row[name] for row in theirs]))
    squares = [brier([row["brier_score"]]) for row in theirs]
    assert compute["brier"]().per_row() == pytest.approx(squares, abs=1e-12)
    values = [compute[name]().value() for name in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")]
    assert len(set(values)) > 2  # the normalisations tell apart


def test_calibration_of_choices_is_of_the_softmax() -> None:
    scores = [[math.log(0.7), math.log(0.3)], [math.log(0.7), math.log(0.3)], [math.log(0.8), math.log(0.2)]]
    statistic = statistics_of_choices(scores, [["a", "b"]] * 3, [0, 1, 0])["ece"]()
    # 0.7 twice and right once, 0.8 once and right: bins of their own.
    assert statistic.value() == pytest.approx((2 * abs(0.7 - 0.5) + abs(0.8 - 1.0)) / 3)
    assert statistic_of("ece", statistic.rows).value() == statistic.value()


def test_several_right_choices() -> None:
    compute = statistics_of_choices([[-1.0, -2.0, -3.0]] * 2, [["a", "b", "c"]] * 2, [[0, 2], [1]])
    assert compute["acc"]().per_row() == [1.0, 0.0]
    with pytest.raises(IngotError, match="row 0: brier and ece are for one right choice"):
        compute["brier"]()


def test_among_equals_the_first_is_chosen() -> None:
    assert statistics_of_choices([[-1.0, -1.0]], [["aa", "b"]], [0])["acc"]().value() == 1.0


@pytest.mark.parametrize(
    ("scores", "choices", "gold", "reason"),
    [
        ([[-1.0]], [["a", "b"]], [0], "row 0: 1 likelihoods of 2 choices"),
        ([[-1.0, float("nan")]], [["a", "b"]], [0], "row 0: likelihoods are not finite"),
        ([[-1.0, -2.0]] * 2, [["a", "b"]] * 2, [0, 2], r"row 1: the right choice \[2\] is none of 2"),
        ([[-1.0, -2.0]], [["a", "b"]], [-1], "the right choice"),
    ],
)
def test_choices_that_do_not_fit(scores: Any, choices: Any, gold: Any, reason: str) -> None:
    with pytest.raises(IngotError, match=reason):
        statistics_of_choices(scores, choices, gold)


def test_an_empty_choice_has_no_length() -> None:
    compute = statistics_of_choices([[-1.0, -2.0]], [["", "b"]], [0])
    assert compute["acc"]().value() == 1.0
    with pytest.raises(IngotError, match="a choice is empty"):
        compute["acc_norm"]()


def test_without_the_unconditional_there_is_no_mutual_information() -> None:
    assert "acc_mutual_info" not in statistics_of_choices([[-1.0, -2.0]], [["a", "b"]], [0])


def test_documents_are_weighted_by_their_size_as_the_harness_does() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    task = pytest.importorskip("lm_eval.api.task").PerplexityTask
    texts = ["One two  three.\n", "  東京 😀", "a", "word " * 200]
    sums, tokens = [30.5, 12.25, 4.0, 900.0], [9, 6, 2, 260]
    compute = statistics_of_documents(sums, tokens, texts)
    words = [(-s, task.count_words(text)) for s, text in zip(sums, texts, strict=True)]
    sizes = [(-s, task.count_bytes(text)) for s, text in zip(sums, texts, strict=True)]
    assert compute["word_perplexity"]().value() == pytest.approx(metrics.weighted_perplexity(words), rel=1e-12)
    assert compute["byte_perplexity"]().value() == pytest.approx(metrics.weighted_perplexity(sizes), rel=1e-12)
    assert compute["bits_per_byte"]().value() == pytest.approx(metrics.bits_per_byte(sizes), rel=1e-12)
    assert compute["loss"]().value() == pytest.approx(sum(sums) / sum(tokens))
    assert compute["perplexity"]().value() == pytest.approx(math.exp(sum(sums) / sum(tokens)))
    for name in compute:
        assert statistic_of(name, compute[name]().rows).value() == compute[name]().value()


def test_a_document_with_nothing_to_predict() -> None:
    with pytest.raises(IngotError, match="row 1 has no token to predict"):
        statistics_of_documents([1.0, 0.0], [3, 0])
    assert set(statistics_of_documents([1.0], [3])) == {"perplexity", "loss"}
