"""The picture: its size, its panels, and that nothing in a run's course makes it fail."""

import itertools
from pathlib import Path

import pytest
from matplotlib import image, pyplot

from ingot.evaluation.plots import _smoothed, run_picture
from ingot.evaluation.runner import Score

TRAIN = [(step, 2.0 * 0.99**step) for step in range(1, 200)]
VALIDATION = [(50, 1.3), (100, 0.8), (199, 0.4)]


def score(value: float, *, half: float = 0.03, better: bool = True) -> Score:
    return Score(value, value - half, value + half, 100, better)


SHARES = {"accuracy": score(0.5), "f1_macro": score(0.45)}
BETTER = {"accuracy": score(0.9), "f1_macro": score(0.88)}


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        (SHARES, BETTER),
        (None, BETTER),
        ({"perplexity": score(90.0, better=False)}, {"perplexity": score(12.0, better=False)}),
        ({"bleu": score(3.0), "rougeL": score(0.2)}, {"bleu": score(40.0), "rougeL": score(0.6)}),
    ],
    ids=["shares", "no base", "perplexity", "two scales"],
)
def test_a_picture_of_1600_by_640(base: dict[str, Score] | None, tuned: dict[str, Score], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    run_picture(TRAIN, VALIDATION, base, tuned, path, "a run")
    height, width = image.imread(path).shape[:2]
    assert (width, height) == (1600, 640)
    assert pyplot.get_fignums() == []  # nothing stays open in a long-lived process


@pytest.mark.parametrize(
    ("train", "validation"),
    [([], []), (TRAIN[:1], []), (TRAIN[:3], VALIDATION[:1])],
    ids=["nothing", "one step", "three steps"],
)
def test_short_runs_are_drawn(
    train: list[tuple[int, float]], validation: list[tuple[int, float]], tmp_path: Path
) -> None:
    run_picture(train, validation, SHARES, BETTER, tmp_path / "picture.png", "short")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_an_interval_that_misses_its_value_is_drawn(tmp_path: Path) -> None:
    # Percentile intervals of a biased statistic (BLEU, macro F1) may lie beside the value.
    beside = {"f1_macro": Score(0.5, 0.52, 0.6, 100, True)}
    run_picture(TRAIN, [], beside, beside, tmp_path / "picture.png", "beside")
    assert (tmp_path / "picture.png").is_file()


def test_every_metric_is_drawn_once_with_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    save = pyplot.Figure.savefig

    def spy(figure: pyplot.Figure, *args: object, **kwargs: object) -> None:
        seen.extend([[text.get_text() for text in axis.texts] for axis in figure.axes])
        save(figure, *args, **kwargs)

    monkeypatch.setattr(pyplot.Figure, "savefig", spy)
    base = {"rougeL": score(0.2), "bleu": score(3.0), "exact_match": score(0.1)}
    tuned = {"rougeL": score(0.6), "bleu": score(40.0), "exact_match": score(0.3)}
    run_picture(TRAIN, VALIDATION, base, tuned, tmp_path / "picture.png", "labels")
    assert seen == [[], ["0.200", "0.100", "0.600", "0.300"], ["3.0", "40.0"]]


def test_smoothing_keeps_a_constant_and_follows_a_trend() -> None:
    assert _smoothed([]) == []
    assert _smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    falling = [float(100 - i) for i in range(100)]
    smooth = _smoothed(falling)
    assert smooth[0] == 100.0
    assert all(a > b for a, b in itertools.pairwise(smooth))
    assert abs(smooth[-1] - falling[-1]) < 6
