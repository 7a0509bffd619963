"""How scores are written for people and for scripts."""

import pytest

from ingot.evaluation.compare import Difference
from ingot.evaluation.report import metrics_json, p_text, table, with_interval
from ingot.evaluation.result import Score
from ingot.evaluation.statistics import Paired


def score(value: float, low: float, high: float, **details: object) -> Score:
    return Score(value, low, high, 50, True, details)


@pytest.mark.parametrize(
    ("numbers", "decimals", "sign", "text"),
    [
        ((0.8734, 0.84, 0.9031), 3, "-", "0.873 [0.840, 0.903]"),
        ((1.0, 1.0, 1.0), 3, "-", "1.000 [1.000, 1.000]"),
        ((41.26, 39.0, 43.54), 1, "-", "41.3 [39.0, 43.5]"),
        ((0.2, -0.00001, 0.4), 3, "+", "+0.200 [+0.000, +0.400]"),
        ((-0.2, -0.4, -0.00001), 3, "-", "-0.200 [-0.400, 0.000]"),
    ],
)
def test_a_number_with_its_interval(numbers: tuple[float, float, float], decimals: int, sign: str, text: str) -> None:
    assert with_interval(*numbers, decimals, sign) == text


def test_each_metric_has_its_decimals() -> None:
    base = {"bleu": score(3.04, 2.0, 4.0), "perplexity": score(12.341, 12.0, 13.0), "rougeL": score(0.1234, 0.1, 0.2)}
    assert [row["base"] for row in table(base, None, None)] == [
        "3.0 [2.0, 4.0]",
        "12.34 [12.00, 13.00]",
        "0.123 [0.100, 0.200]",
    ]


@pytest.mark.parametrize(
    ("p", "text"), [(1.0, "1.000"), (0.0312, "0.031"), (0.001, "0.001"), (0.0004, "< 0.001"), (0.0, "< 0.001")]
)
def test_p_values(p: float, text: str) -> None:
    assert p_text(p) == text


def test_metrics_json() -> None:
    assert metrics_json({"bleu": score(40.0, 38.0, 42.0, signature="nrefs:1")}) == {
        "bleu": {"value": 40.0, "interval": [38.0, 42.0], "n": 50, "signature": "nrefs:1"}
    }


def test_a_table_shows_the_test_that_decides() -> None:
    base, tuned = {"accuracy": score(0.5, 0.4, 0.6)}, {"accuracy": score(0.7, 0.6, 0.8)}
    found = Difference("test", "accuracy", Paired(0.2, 0.1, 0.3, 0.5, 0.012, 50), True, 0.012, 0.024)
    assert table(base, tuned, {"accuracy": found}) == [
        {
            "metric": "accuracy",
            "base": "0.500 [0.400, 0.600]",
            "tuned": "0.700 [0.600, 0.800]",
            "difference": "+0.200 [+0.100, +0.300]",
            "p": "0.012",
        }
    ]


def test_a_table_has_only_what_was_measured() -> None:
    scores = {"accuracy": score(0.5, 0.4, 0.6), "f1_macro": score(0.4, 0.3, 0.5)}
    assert [list(row) for row in table(None, scores, None)] == [["metric", "tuned"]] * 2
    assert [list(row) for row in table(scores, None, None)] == [["metric", "base"]] * 2
    assert table(None, None, None) == []
