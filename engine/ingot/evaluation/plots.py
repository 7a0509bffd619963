"""The run's picture: loss while training, scores before and after. The only file that imports matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from ingot.evaluation.metrics import METRICS, Metric
from ingot.evaluation.result import Score

matplotlib.use("Agg")  # no display on a cluster
from matplotlib import pyplot as plt

# Okabe & Ito's palette: told apart with every kind of colour vision.
GREY, BLUE, ORANGE, INK, RULE = "#a3a3a3", "#0072b2", "#d55e00", "#333333", "#e5e5e5"
STYLE: dict[str, Any] = {
    "font.size": 17,  # still 12 pixels high when a page shows the picture at half its width
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.borderaxespad": 0.2,
    "legend.borderpad": 0.0,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.2,
    "legend.handletextpad": 0.4,
}
CROWDED = 5  # metrics in one panel from which on its labels are smaller and shorter
Points = Sequence[tuple[int, float]]
Side = tuple[str, str, dict[str, Score]]
"""A model's name, its colour, its scores."""


class Course(NamedTuple):
    """A metric while the model trained: (step, value, low, high), the base model as step 0; the step that was taken.
    `name`: METRIC, TASK/METRIC or either with @EXTRACT.
    """

    name: str
    points: Sequence[tuple[int, float, float, float]]
    chosen: int

    @property
    def metric(self) -> Metric:
        """What the vocabulary says about it."""
        return METRICS[self.name.rpartition("/")[2].partition("@")[0]]


def run_picture(
    train: Points,
    validation: Points,
    base: dict[str, Score] | None,
    tuned: dict[str, Score],
    path: Path,
    title: str,
    course: Course | None = None,
) -> None:
    """Write a PNG of 1600 x 640 pixels: the loss curve, and a bar before and after for each metric with its interval;
    between them `course`, where a metric was measured on the way.

    Shares (0 to 1) stand in one panel; any other metric gets a panel of its own, since its scale is another.
    """
    shares = [name for name in tuned if METRICS[name].unit_interval]
    groups = [group for group in (shares, *([name] for name in tuned if name not in shares)) if group]
    sides: list[Side] = [("base", GREY, base)] if base else []
    sides.append(("tuned", BLUE, tuned))
    widths = [0.7 + len(group) for group in groups]
    curve = max(3.4, 0.45 * sum(widths))  # a loss curve narrower than its legend would leave a gap
    widths = [curve] * (1 if course is None else 2) + widths
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(widths), figsize=(16, 6.4), dpi=100, width_ratios=widths, layout="constrained"
        )
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        figure.suptitle(title, x=0.012, ha="left", fontsize=21, fontweight="bold")
        _losses(axes[0], train, validation, columns=3 if course is None else 2)  # of a legend that is no wider
        if course is not None:
            _course(axes[1], course)
        bars = axes[-len(groups) :]
        for axis, group in zip(bars, groups, strict=True):
            _bars(axis, group, sides)
        _legend(bars[0])
        figure.savefig(path)
        plt.close(figure)


def _legend(axis: Any, columns: int = 3) -> None:
    """Above the panel, where no line and no bar can be."""
    handles, _ = axis.get_legend_handles_labels()
    if handles:
        axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02), ncols=min(columns, len(handles)), fontsize=16)


def _losses(axis: Any, train: Points, validation: Points, columns: int) -> None:
    if train:
        steps, losses = zip(*train, strict=True)
        axis.plot(steps, losses, color=GREY, linewidth=1.0, alpha=0.7, label="training")
        dot = "o" if len(steps) == 1 else None  # one point makes no line
        axis.plot(steps, _smoothed(losses), marker=dot, color=BLUE, linewidth=3.0, label="smoothed")
    if validation:
        axis.plot(*zip(*validation, strict=True), "o-", color=ORANGE, markersize=7, linewidth=1.5, label="validation")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss (nats per target)")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(axis, columns)


def _course(axis: Any, course: Course) -> None:
    steps, values, lows, highs = zip(*course.points, strict=True)
    if steps[0] == 0:
        axis.axhline(values[0], color=GREY, linewidth=2.0, linestyle="--", label="base")
    axis.fill_between(steps, lows, highs, color=BLUE, alpha=0.15, linewidth=0)
    axis.plot(steps, values, "o-", color=BLUE, markersize=7, linewidth=2.0)
    taken = [(step, value) for step, value in zip(steps, values, strict=True) if step == course.chosen]
    if taken:
        label = f"taken: step {course.chosen}"
        axis.plot(*taken[0], "o", markersize=14, fillstyle="none", markeredgewidth=2.5, color=ORANGE, label=label)
    top = 1.0 if course.metric.unit_interval else max(*values, *highs)
    axis.set_ylim(min(0.0, *lows), top * 1.05 or 1.0)
    axis.set_xlabel("optimizer step" if "/" in course.name else "optimizer step (validation rows)")
    axis.set_ylabel(course.name)
    axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(axis)


def _smoothed(losses: Sequence[float]) -> Sequence[float]:
    """Mean over the steps around each, about a twentieth of the run in all; centred, so that it does not lag behind."""
    window = np.ones(len(losses) // 20 | 1)  # odd
    return (np.convolve(losses, window, "same") / np.convolve(np.ones(len(losses)), window, "same")).tolist()


def _bars(axis: Any, names: Sequence[str], sides: Sequence[Side]) -> None:
    width = 0.42  # a side alone is no wider
    crowded = len(names) >= CROWDED
    for place, (side, colour, scores) in enumerate(sides):
        shown = [scores[name] for name in names]
        x = [index + (place - (len(sides) - 1) / 2) * width for index in range(len(names))]
        values = [score.value for score in shown]
        # A bootstrap interval of a skewed metric can leave its value outside; an error bar has no negative length.
        reach = [[max(0.0, s.value - s.low) for s in shown], [max(0.0, s.high - s.value) for s in shown]]
        axis.bar(x, values, width * 0.94, color=colour, label=side)
        axis.errorbar(x, values, reach, fmt="none", ecolor=INK, elinewidth=1.5, capsize=5, capthick=1.5)
        for name, position, score in zip(names, x, shown, strict=True):
            text = f"{score.value:.{METRICS[name].decimals - crowded}f}"
            _above(axis, position, max(score.value, score.high), text, 12 if crowded else 17)
    top = (
        1.0 if METRICS[names[0]].unit_interval else max(max(s[n].value, s[n].high) for _, _, s in sides for n in names)
    )
    axis.set_ylim(0, top * 1.1 or 1.0)  # room for the label of the highest bar
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.set_xticks(range(len(names)), [_tick(name) for name in names])
    axis.tick_params(axis="x", length=0, labelsize=12 if crowded else 17)


def _above(axis: Any, x: float, y: float, text: str, size: int) -> None:
    axis.annotate(text, (x, y), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=size)


def _tick(name: str) -> str:
    """A metric's name in short lines, and which way is better where it is not up."""
    return name.replace("_", "\n") + ("" if METRICS[name].higher_is_better else "\n(lower is better)")
