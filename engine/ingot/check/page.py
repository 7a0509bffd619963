"""The gate's report as one HTML file: nothing is loaded from elsewhere, no script runs, rows are escaped.

Sizes here are shares of a picture's width or height; the template turns them into SVG.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ingot import pages
from ingot.pages import visible

from .verdict import Report, Status

BINS = 32
TICKS = 4
TEMPLATE = Path(__file__).with_name("report.html.jinja")
SYMBOLS = {Status.passed: "✓", Status.failed: "✗", Status.warned: "!", Status.waived: "!", Status.not_applicable: "–"}


def render(report: Report) -> str:
    """The whole page as text."""
    evidence, statuses = report.evidence, [verdict.status for verdict in report.verdicts]
    return pages.render(
        TEMPLATE,
        {"fact": _fact, "lines": _lines},
        report=report,
        headline=headline(report),
        symbols=SYMBOLS,
        tally=[(status, statuses.count(status)) for status in Status if status in statuses],
        warned=[verdict for verdict in report.verdicts if verdict.status is Status.warned],
        waived=[verdict for verdict in report.verdicts if verdict.status is Status.waived],
        histogram=histogram(evidence.trainable),
        packing=packing(evidence.packs, evidence.pack_tokens),
    )


def headline(report: Report) -> str:
    """How it ended, in a few words."""
    failed, waived = len(report.failures), sum(verdict.status is Status.waived for verdict in report.verdicts)
    if failed:
        return f"{failed} proof{'s' if failed > 1 else ''} failed"
    return f"Passed, {waived} waived" if waived else "Passed"


def histogram(counts: Sequence[int]) -> dict[str, Any] | None:
    """Bars over the trainable tokens of each row, with marks; None without rows.

    The axis begins at 0 unless all rows are in its upper half. An integer n stands at the middle of [n, n + 1).
    """
    if not counts:
        return None
    values = np.asarray(counts)
    low, high = int(values.min()), int(values.max())
    start = 0 if low <= high // 2 else low
    width = max(1, math.ceil((high - start + 1) / BINS))
    n_bins = math.ceil((high - start + 1) / width)
    span = n_bins * width
    found = np.bincount((values - start) // width, minlength=n_bins).tolist()
    zeros = int((values == 0).sum())
    # As the proof `trainable-tokens` measures them. Those that fall together share a mark.
    p5, median = np.percentile(values, [5, 50]).tolist()
    marks: dict[float, str] = {}
    for name, value in (("minimum", low), ("5th percentile", p5), ("median", median)):
        marks[value] = f"{marks[value]}, {name}" if value in marks else name
    y_ticks = ticks(0, max(found))
    bars = [
        {
            "x": i / n_bins,
            "width": 1 / n_bins,
            "height": n / max(found),
            "rows": n,
            "first": start + i * width,
            "last": start + (i + 1) * width - 1,
            "empty": bool(zeros and i == 0),
        }
        for i, n in enumerate(found)
    ]
    return {
        "bars": [bar for bar in bars if bar["rows"]],
        "marks": [
            {"name": name, "value": f"{value:,g}", "x": (value + 0.5 - start) / span} for value, name in marks.items()
        ],
        "x_ticks": [(tick, (tick + 0.5 - start) / span) for tick in ticks(start, start + span - 1)],
        "y_ticks": [(tick, tick / max(found)) for tick in y_ticks],
        "rows": len(counts),
        "zeros": zeros,
        "maximum": high,
    }


def packing(packs: Sequence[Sequence[int]], capacity: int) -> dict[str, Any] | None:
    """A stacked bar for each pack; None without packs. `capacity`: tokens that one may hold, 0 if there is no limit."""
    if not packs:
        return None
    used = [sum(pack) for pack in packs]
    full = max(capacity, *used)
    bars = []
    for pack, total in zip(packs, used, strict=True):
        starts = np.cumsum([0, *pack[:-1]]).tolist()
        rows = [{"x": at / full, "width": n / full, "tokens": n} for at, n in zip(starts, pack, strict=True)]
        bars.append({"rows": rows, "tokens": total, "end": total / full})
    shares = [total / (capacity or full) for total in used]
    return {
        "bars": bars,
        "capacity": capacity or full,
        "limit": (capacity or full) / full,
        "x_ticks": [(tick, tick / full) for tick in ticks(0, full)],
        "average": sum(shares) / len(shares),
        "emptiest": min(shares),
        "rows": sum(map(len, packs)),
        "pitch": min(26, max(12, 160 // len(packs))),  # few packs are drawn thicker; in the template's units
    }


def ticks(low: int, high: int) -> list[int]:
    """About TICKS round numbers from `low` to `high`, at least one apart."""
    rough = max(1.0, (high - low) / TICKS)
    power = 10 ** math.floor(math.log10(rough))
    step = next(int(factor * power) for factor in (1, 2, 5, 10) if factor * power >= rough)
    return list(range(math.ceil(low / step) * step, high + 1, step))


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, indent=1 if isinstance(value, Mapping) else None, default=str)


def _lines(text: str) -> list[str]:
    """`text` line by line, what cannot be seen made visible."""
    return visible(text).split("\n")
