"""Scores as people and scripts read them."""

from typing import Any

from ingot.evaluation.metrics import METRICS
from ingot.evaluation.runner import Comparison, Score

Scores = dict[str, Score]


def metrics_json(scores: Scores) -> dict[str, Any]:
    """`{"accuracy": {"value": 0.91, "interval": [0.90, 0.92], "n": 3080, ...details}}`."""
    return {
        name: {"value": score.value, "interval": [score.low, score.high], "n": score.n, **score.details}
        for name, score in scores.items()
    }


def table(base: Scores | None, tuned: Scores | None, comparison: Comparison | None) -> list[dict[str, str]]:
    """One row a metric; the columns base, tuned, difference and p stand only where they were measured."""
    shown = []
    for name in tuned or base or {}:
        decimals = METRICS[name].decimals
        row = {"metric": name}
        for title, scores in (("base", base), ("tuned", tuned)):
            if scores:
                score = scores[name]
                row[title] = with_interval(score.value, score.low, score.high, decimals)
        if comparison is not None:
            paired = comparison.metrics[name]
            row["difference"] = with_interval(paired.difference, paired.low, paired.high, decimals, sign="+")
            row["p"] = p_text(paired.p_value if paired.mcnemar_p is None else paired.mcnemar_p)
        shown.append(row)
    return shown


def with_interval(value: float, low: float, high: float, decimals: int, sign: str = "-") -> str:
    """`0.873 [0.840, 0.903]`; with `sign` "+", positive numbers carry one. Zero never reads "-0.000"."""
    text, left, right = (f"{number:{sign}z.{decimals}f}" for number in (value, low, high))
    return f"{text} [{left}, {right}]"


def p_text(p: float) -> str:
    """`< 0.001` or three decimals."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
