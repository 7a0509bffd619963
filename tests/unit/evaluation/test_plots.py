"""The picture: its size, its panels, and that nothing in a run's course makes it fail."""

import itertools
from pathlib import Path

import pytest
from matplotlib import image, pyplot
from matplotlib.transforms import Bbox

from ingot.evaluation.plots import Course, _smoothed, run_picture
from ingot.evaluation.result import Score

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


NAMES = ("exact_match", "rouge1", "rouge2", "rougeL", "rougeLsum", "json_valid", "json_exact_match", "json_argument_f1")


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        (SHARES, BETTER),
        ({name: score(0.5) for name in NAMES}, {name: score(0.52) for name in NAMES}),
        ({name: score(0.5) for name in (*NAMES, "bleu")}, {name: score(0.97) for name in (*NAMES, "bleu")}),
        (None, {"perplexity": score(12.0, better=False), "loss": score(2.5, better=False)}),
        ({"perplexity": score(23456.7, half=900.0)}, {"perplexity": score(23500.1, half=900.0)}),
    ],
    ids=["two", "eight", "eight and bleu", "likelihoods", "long numbers"],
)
def test_no_text_covers_another_or_leaves_the_picture(
    base: dict[str, Score] | None, tuned: dict[str, Score], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes: list[tuple[str, Bbox]] = []

    def spy(figure: pyplot.Figure, path: Path) -> None:
        figure.canvas.draw()
        for axis in figure.axes:
            left, right = axis.get_xlim()
            ticks = [text for text in axis.get_xticklabels() if left <= text.get_position()[0] <= right]
            texts = [*axis.texts, *ticks, axis.xaxis.label]
            texts += axis.get_legend().get_texts() if axis.get_legend() else []
            boxes.extend((text.get_text(), text.get_window_extent()) for text in texts if text.get_text())
        boxes.append((figure.get_suptitle(), figure._suptitle.get_window_extent()))

    monkeypatch.setattr(pyplot.Figure, "savefig", spy)
    run_picture(TRAIN, VALIDATION, base, tuned, tmp_path / "picture.png", "a run")
    overlapping = [(a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2) if one.overlaps(two)]
    outside = [a for a, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > 1600 or box.y1 > 640]
    assert len(boxes) > 6
    assert (overlapping, outside) == ([], [])


def test_smoothing_keeps_a_constant_and_does_not_lag() -> None:
    assert _smoothed([2.5]) == [2.5]
    assert _smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    falling = [float(100 - i) for i in range(100)]
    smooth = _smoothed(falling)
    assert smooth[2:-2] == pytest.approx(falling[2:-2])
    assert all(a > b for a, b in itertools.pairwise(smooth))
    noisy = [1.0 + 0.1 * (-1) ** i for i in range(400)]
    assert max(abs(value - 1.0) for value in _smoothed(noisy)[20:-20]) < 0.01


@pytest.mark.parametrize("name", ["f1_macro", "choose-tool/acc@first"])
def test_a_metric_measured_on_the_way_has_a_panel(name: str, tmp_path: Path) -> None:
    course = Course(name, [(0, 0.45, 0.4, 0.5), (100, 0.8, 0.7, 0.9), (199, 0.7, 0.6, 0.8)], 100)
    with_it, without = tmp_path / "with.png", tmp_path / "without.png"
    run_picture(TRAIN, VALIDATION, SHARES, BETTER, with_it, "a run", course)
    run_picture(TRAIN, VALIDATION, SHARES, BETTER, without, "a run")
    drawn, plain = (image.imread(path) for path in (with_it, without))
    assert drawn.shape == plain.shape
    band = [
        1 - 0.15 * (1 - part) for part in (0.0, 0x72 / 255, 0xB2 / 255)
    ]  # the interval: its blue is seen nowhere else
    counts = [(abs(picture[..., :3] - band) < 0.005).all(-1).sum() for picture in (drawn, plain)]
    assert counts[0] > 1000 > 10 * counts[1], counts
