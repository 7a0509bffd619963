"""The run's picture: loss while training, scores before and after. The only file that imports matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from ingot.evaluation.metrics import METRICS
from ingot.evaluation.runner import Score

matplotlib.use("Agg")  # no display on a cluster
from matplotlib import pyplot as plt

# Okabe & Ito's palette: told apart with every kind of colour vision.
GREY, BLUE, ORANGE, INK = "#9a9a9a", "#0072b2", "#d55e00", "#333333"
STYLE: dict[str, Any] = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
}
Points = Sequence[tuple[int, float]]


def run_picture(
    train: Points, validation: Points, base: dict[str, Score] | None, tuned: dict[str, Score], path: Path, title: str
) -> None:
    """Write a PNG of 1600 x 640 pixels: the loss curve, and a bar before and after for each metric with its interval.

    Shares (0 to 1) stand in one panel; any other metric gets a panel of its own, since its scale is another.
    """
    shares = [name for name in tuned if METRICS[name].unit_interval]
    others = [name for name in tuned if not METRICS[name].unit_interval]
    groups = ([shares] if shares else []) + [[name] for name in others]
    widths = [2.6, *(0.5 + 0.9 * len(group) for group in groups)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(widths), figsize=(16, 6.4), dpi=100, width_ratios=widths, constrained_layout=True
        )
        figure.suptitle(title, fontsize=16, fontweight="bold")
        _losses(axes[0], train, validation)
        for axis, group in zip(axes[1:], groups, strict=True):
            _bars(axis, group, base, tuned)
        axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 1.10), ncols=2)
        figure.savefig(path)
        plt.close(figure)


def _losses(axis: Any, train: Points, validation: Points) -> None:
    steps, losses = zip(*train, strict=True) if train else ((), ())
    axis.plot(steps, losses, color=GREY, linewidth=0.8, alpha=0.7, label="training, each step")
    axis.plot(steps, _smoothed(losses), color=BLUE, linewidth=2.0, label="training, smoothed")
    if validation:
        axis.plot(*zip(*validation, strict=True), "o-", color=ORANGE, markersize=6, linewidth=1, label="validation")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss (nats per target)")
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", color="#e5e5e5")
    axis.legend(frameon=False)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the run, corrected for its start (Kingma & Ba 2015, section 3)."""
    keep = 1.0 - 1.0 / max(1.0, len(losses) / 20)
    mean, shown = 0.0, []
    for number, loss in enumerate(losses, start=1):
        mean = keep * mean + (1.0 - keep) * loss
        shown.append(mean / (1.0 - keep**number))
    return shown


def _bars(axis: Any, names: Sequence[str], base: dict[str, Score] | None, tuned: dict[str, Score]) -> None:
    sides = [("base", base, GREY), ("tuned", tuned, BLUE)] if base else [("tuned", tuned, BLUE)]
    width = 0.8 / len(sides)
    top = 1.0 if METRICS[names[0]].unit_interval else max(scores[n].high for _, scores, _ in sides for n in names) * 1.1
    for place, (label, scores, colour) in enumerate(sides):
        x = [index + (place - (len(sides) - 1) / 2) * width for index in range(len(names))]
        shown = [scores[name] for name in names]
        spread = [[max(0.0, s.value - s.low) for s in shown], [max(0.0, s.high - s.value) for s in shown]]
        axis.bar(x, [s.value for s in shown], width * 0.94, color=colour, label=label)
        axis.errorbar(x, [s.value for s in shown], spread, fmt="none", ecolor=INK, elinewidth=1.2, capsize=4)
        for position, score in zip(x, shown, strict=True):
            axis.annotate(
                f"{score.value:.3f}" if top <= 1 else f"{score.value:.1f}",
                (position, max(score.value, score.high)),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=11,
            )
    axis.set_xticks(range(len(names)), [name.replace("_", "\n", 1).replace("_", " ") for name in names])
    axis.set_ylim(0, top * 1.06)
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="y", color="#e5e5e5")
    axis.set_axisbelow(True)
    if not METRICS[names[0]].higher_is_better:
        axis.set_title("lower is better", fontsize=11)
