"""Scores as people and scripts read them."""

from typing import Any

from ingot.evaluation.compare import SLICE_ROWS, Comparison, Difference
from ingot.evaluation.metrics import METRICS
from ingot.evaluation.result import Score

Scores = dict[str, Score]
FEW_CLUSTERS = 10
NAMED = 5  # left-out slices that are named


def metrics_json(scores: Scores) -> dict[str, Any]:
    """`{"accuracy": {"value": 0.91, "interval": [0.90, 0.92], "n": 3080, ...details}}`."""
    return {
        name: {"value": score.value, "interval": [score.low, score.high], "n": score.n, **score.details}
        for name, score in scores.items()
    }


def notes_of(found: Comparison) -> list[str]:
    """What a reader of the differences must know: what was resampled, which rows and slices were left out, how many
    tests p-values are adjusted for.
    """
    first, second = found.names
    notes = []
    for task, (ours, theirs) in found.left_out.items():
        kept = next(it.paired.n for it in found.differences if it.task == task)
        notes.append(
            f"{task}: {kept:,} rows that both have; {ours:,} of {first} and {theirs:,} of {second} are left out"
        )
    for task, (n, clusters) in _clusters(found).items():
        said = f"{task}: {n:,} rows of {clusters:,} groups: whole groups are resampled, not rows"
        said += "; McNemar's test takes rows as independent and is not made"
        few = f"; so few groups (under {FEW_CLUSTERS}) make intervals too narrow"
        notes.append(said + (few if clusters < FEW_CLUSTERS else ""))
    for task, small in found.small.items():
        names = ", ".join(f"{name} ({n})" for name, n in list(small.items())[:NAMED])
        more = f" and {len(small) - NAMED} more" if len(small) > NAMED else ""
        too = f"slices of under {SLICE_ROWS} rows, of one group or without a defined metric"
        notes.append(f"{task}: {too} are left out: {names}{more}")
    return notes


def _clusters(found: Comparison) -> dict[str, tuple[int, int]]:
    return {it.task: (it.paired.n, it.clusters) for it in found.differences if it.clusters and it.slice is None}


def table(base: Scores | None, tuned: Scores | None, differences: dict[str, Difference] | None) -> list[dict[str, str]]:
    """One row a metric; the columns base, tuned, difference and p stand only where they were measured."""
    shown = []
    for name in tuned or base or {}:
        decimals = METRICS[name].decimals
        row = {"metric": name}
        for title, scores in (("base", base), ("tuned", tuned)):
            if scores:
                score = scores[name]
                row[title] = with_interval(score.value, score.low, score.high, decimals)
        if differences is not None:
            paired = differences[name].paired
            row["difference"] = with_interval(paired.difference, paired.low, paired.high, decimals, sign="+")
            row["p"] = p_text(differences[name].p_value)
        shown.append(row)
    return shown


def with_interval(value: float, low: float, high: float, decimals: int, sign: str = "-") -> str:
    """`0.873 [0.840, 0.903]`; with `sign` "+", positive numbers carry one. Zero never reads "-0.000"."""
    text, left, right = (f"{number:{sign}z.{decimals}f}" for number in (value, low, high))
    return f"{text} [{left}, {right}]"


def p_text(p: float) -> str:
    """`< 0.001` or three decimals."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
