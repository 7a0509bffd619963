"""What counts as the same answer."""

from typing import Any

import pytest

from ingot.conformance.case import TOLERANCE, difference

RECORD = {"label": "good", "probability": 0.75, "tags": ["a", {"score": 1.0}], "count": 3}


def test_float_noise_is_no_difference() -> None:
    apart, reason = difference(RECORD, RECORD | {"probability": 0.75 + TOLERANCE / 2})
    assert reason == "" and 0.0 < apart < TOLERANCE
    assert difference(1.0, 1) == (0.0, "")  # JSON has no other way to say 1.0


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_equal_numbers_without_a_difference_are_equal(value: str) -> None:
    assert difference(float(value), float(value)) == (0.0, "")
    assert difference(float(value), 1.0) == difference(1.0, float(value)) == (float("inf"), " differs by inf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"probability": 0.75 + 2 * TOLERANCE}, "probability differs by 2e-05"),
        ({"probability": float("nan")}, "probability differs by inf"),
        ({"probability": "0.75"}, "probability is of type str"),
        ({"label": "goof"}, r"label differs from character 3 on \(4 characters instead of 4\)"),
        ({"label": "goo"}, "from character 3"),
        ({"count": 4}, "count"),
        ({"count": True}, "count"),
        ({"tags": ["a"]}, "tags has 1 entries instead of 2"),
        ({"tags": ["a", {"score": 2.0}]}, r"tags\[1\]\.score differs by 1"),
        ({"extra": 1}, "also has 'extra'"),
    ],
)
def test_anything_else_is(change: dict[str, Any], said: str) -> None:
    _, reason = difference(RECORD, RECORD | change)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(reason)


def test_a_missing_column_is_named() -> None:
    assert difference(RECORD, {"label": "good"})[1] == "the answer lacks 'probability'"


def test_no_answer_is_told() -> None:
    _, reason = difference({"output_string": "the secret prompt"}, {"output_string": "the secret answer"})
    assert "secret" not in reason
