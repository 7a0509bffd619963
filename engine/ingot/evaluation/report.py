"""Scores as people and scripts read them."""

from typing import Any

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
        row = {"metric": name}
        row |= {title: with_interval(scores[name]) for title, scores in (("base", base), ("tuned", tuned)) if scores}
        if comparison is not None:
            paired = comparison.metrics[name]
            row["difference"] = f"{paired.difference:+.3f} [{paired.low:+.3f}, {paired.high:+.3f}]"
            row["p"] = p_text(paired.p_value if paired.mcnemar_p is None else paired.mcnemar_p)
        shown.append(row)
    return shown


def with_interval(score: Score) -> str:
    """`0.873 [0.840, 0.903]`, or one decimal for scores that are not shares."""
    digits = 3 if max(abs(score.low), abs(score.high)) <= 1 else 1
    return f"{score.value:.{digits}f} [{score.low:.{digits}f}, {score.high:.{digits}f}]"


def p_text(p: float) -> str:
    """`< 0.001` or three decimals."""
    return "< 0.001" if p <= 0.001 else f"{p:.3f}"
