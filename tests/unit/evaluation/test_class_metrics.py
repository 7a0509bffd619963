"""Metrics of classes and sets of labels against scikit-learn, on the rows and on resamples of them."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk

from ingot.errors import IngotError, RecipeError
from ingot.evaluation.calibration import bin_counts, reliability
from ingot.evaluation.class_metrics import confusion, statistics_of_classes, statistics_of_label_sets
from ingot.evaluation.metrics import METRICS, OF_TASK, metric_names, statistic_of
from ingot.evaluation.statistic import Statistic
from ingot.evaluation.statistics import interval
from ingot.recipe import Evaluate

LABELS = ("ant", "bee", "cat", "dog")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn on draws that lost a class
        yield


def drawn(n: int, classes: int, seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, classes] that know something, and the right classes; with `ties`, of few different values."""
    draw = np.random.default_rng(seed)
    right = draw.choice(classes, size=n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    logits = draw.normal(size=(n, classes)) + 1.2 * np.eye(classes)[right]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return (np.round(shares, 1) if ties else shares), right


def of_sklearn(name: str, shares: np.ndarray, right: np.ndarray) -> float:
    """The same metric by scikit-learn; the positive class is the last one."""
    predicted, classes = shares.argmax(1), shares.shape[1]
    truth = np.eye(classes)[right]
    score, _, average = name.rpartition("_")
    functions: dict[str, Any] = {
        "f1": sk.f1_score,
        "precision": sk.precision_score,
        "recall": sk.recall_score,
        "AUC": sk.roc_auc_score,
        "average_precision_score": sk.average_precision_score,
    }
    if name == "norm_macro_recall":
        return sk.balanced_accuracy_score(right, predicted, adjusted=True)
    if name == "weighted_accuracy":
        return sk.accuracy_score(right, predicted, sample_weight=np.bincount(right, minlength=classes)[right])
    if name in ("accuracy", "balanced_accuracy"):
        return {"accuracy": sk.accuracy_score, "balanced_accuracy": sk.balanced_accuracy_score}[name](right, predicted)
    if name == "matthews_correlation":
        return sk.matthews_corrcoef(right, predicted)
    if name == "log_loss":
        return sk.log_loss(right, shares, labels=range(classes))
    if name == "brier":
        return float(np.mean(np.sum((shares - truth) ** 2, axis=1)))
    if name == "ece":
        return guo(shares.max(1), predicted == right)
    if score in ("AUC", "average_precision_score"):
        if average == "binary":
            return functions[score](right == classes - 1, shares[:, -1])
        return functions[score](truth, shares, average=average)
    if average == "binary":
        return functions[score](right == classes - 1, predicted == classes - 1, zero_division=0)
    return functions[score](right, predicted, average=average, zero_division=0)


def guo(confidence: np.ndarray, right: np.ndarray) -> float:
    """Calibration error as its definition is written: bins (low, high], weighted gaps."""
    error = 0.0
    for low, high in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return error


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", OF_TASK["text-classification"])
def test_every_class_metric_is_scikit_learn_s(name: str, classes: int) -> None:
    for seed in range(3):
        shares, right = drawn(150, classes, seed, ties=name.startswith(("AUC", "average")) and seed == 1)
        truth = [LABELS[index] for index in right]
        computed = statistics_of_classes(shares, truth, LABELS[:classes])[name]()
        assert computed.value() == pytest.approx(of_sklearn(name, shares, right), abs=1e-12)
        assert abs(computed.value()) > 0.01
        stored = statistic_of(name, np.asarray(computed.rows.tolist()), computed.details)
        assert stored.value() == computed.value()


@pytest.mark.parametrize("name", OF_TASK["text-classification"])
def test_every_class_metric_of_a_resample_is_scikit_learn_s_on_those_rows(name: str) -> None:
    shares, right = drawn(30, 3, 7, ties=True)
    shares = np.clip(shares, 0.05, 0.9)
    statistic = statistics_of_classes(shares, [LABELS[index] for index in right], LABELS[:3])[name]()
    generator, compared = np.random.default_rng(0), 0
    for _ in range(20):
        rows = generator.integers(0, 30, size=30)
        if len(set(right[rows])) < 3 or len(set(shares[rows].argmax(1))) < 3:
            continue  # of a class that is not there, scikit-learn says 0 and we leave it out
        compared += 1
        counts = np.bincount(rows, minlength=30)
        value = (
            statistic.value_of(statistic.rows, counts[None])[0]
            if statistic.whole
            else statistic.value_of(counts @ statistic.rows)
        )
        assert value == pytest.approx(of_sklearn(name, shares[rows], right[rows]), abs=1e-12)
    assert compared >= 10


@pytest.mark.parametrize("name", OF_TASK["multi-label-classification"])
def test_every_metric_of_label_sets_is_scikit_learn_s(name: str) -> None:
    draw = np.random.default_rng(3)
    right = draw.random((120, 4)) < [0.5, 0.3, 0.2, 0.1]
    shares = np.clip(0.5 * draw.random((120, 4)) + 0.4 * right, 0, 1)
    predicted = shares >= 0.5
    score, _, average = name.rpartition("_")
    if name == "subset_accuracy":
        expected = sk.accuracy_score(right, predicted)
    elif score in ("AUC", "average_precision_score"):
        function = sk.roc_auc_score if score == "AUC" else sk.average_precision_score
        expected = function(right, shares, average=average)
    else:
        function = {"f1": sk.f1_score, "precision": sk.precision_score, "recall": sk.recall_score}[score]
        expected = function(right, predicted, average=average, zero_division=0)
    truth = [[label for label, has in zip(LABELS, row, strict=True) if has] for row in right]
    assert statistics_of_label_sets(shares, truth, LABELS)[name]().value() == pytest.approx(expected, abs=1e-12)


def test_from_texts_comes_what_comes_from_probabilities() -> None:
    shares, right = drawn(80, 4, 5)
    truth, predicted = [LABELS[i] for i in right], [LABELS[i] for i in shares.argmax(1)]
    for name in ("accuracy", "f1_micro", "recall_macro", "weighted_accuracy", "matthews_correlation"):
        ours = METRICS[name].compute(predicted, [[t] for t in truth]).value()
        assert ours == pytest.approx(statistics_of_classes(shares, truth, LABELS)[name]().value(), abs=1e-12)


def test_the_positive_class_can_be_named() -> None:
    truth, predicted = ["no", "yes", "yes", "no"], ["no", "yes", "no", "no"]
    references = [[t] for t in truth]
    yes = METRICS["recall_binary"].compute(predicted, references)
    no = METRICS["recall_binary"].compute(predicted, references, positive="no")
    assert (yes.value(), yes.details) == (0.5, {"positive": "yes"})
    assert (no.value(), no.details) == (1.0, {"positive": "no"})
    shares = np.asarray([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    first = statistics_of_classes(shares, truth, ("no", "yes"), positive="no")["AUC_binary"]()
    assert (first.value(), first.details) == (1.0, {"positive": "no"})


def test_an_interval_of_an_area_covers_it() -> None:
    shares, right = drawn(200, 2, 0)
    statistic = statistics_of_classes(shares, [LABELS[i] for i in right], LABELS[:2])["AUC_macro"]()
    low, high = interval(statistic, 300, 0.95)
    assert low < statistic.value() < high
    assert 0.05 < high - low < 0.25


def test_a_draw_without_a_class_has_no_area() -> None:
    statistic = statistics_of_classes(np.asarray([[0.9, 0.1], [0.2, 0.8]]), ["ant", "bee"], LABELS[:2])["AUC_macro"]()
    values = statistic.value_of(statistic.rows, np.asarray([[2.0, 0.0], [1.0, 1.0]]))
    assert np.isnan(values[0])
    assert values[1] == 1.0
    assert interval(statistic, 100, 0.9) == (1.0, 1.0)


def test_areas_do_not_depend_on_how_many_draws_are_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, right = drawn(60, 3, 2, ties=True)
    statistic = statistics_of_classes(shares, [LABELS[i] for i in right], LABELS[:3])["AUC_micro"]()
    counts = np.random.default_rng(0).integers(0, 4, size=(25, 60)).astype(float)
    whole = statistic.value_of(statistic.rows, counts)
    monkeypatch.setattr("ingot.evaluation.ranking.NUMBERS_AT_ONCE", 400)
    assert np.array_equal(statistic.value_of(statistic.rows, counts), whole)


def test_confusion_has_truth_in_lines() -> None:
    predicted, truth = ["ant", "bee", "bee", "ant"], ["ant", "ant", "bee", "ant"]
    assert confusion(predicted, truth, LABELS[:3]).tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    with pytest.raises(IngotError, match="'bea' is none of the classes: did you mean 'bee'"):
        confusion(["bea"], ["bee"], LABELS)


def test_reliability_gives_the_bins_of_a_picture() -> None:
    shares = np.asarray([[0.95, 0.05], [0.97, 0.03], [0.45, 0.55]])
    statistic = statistics_of_classes(shares, ["ant", "bee", "bee"], LABELS[:2])["ece"]()
    bins = reliability(statistic.rows.sum(0))
    assert bins == [(1, pytest.approx(0.55), 1.0), (2, pytest.approx(0.96), 0.5)]


def test_a_bin_holds_its_upper_edge() -> None:
    edges = np.linspace(0, 1, 16)
    inside_NM = bin_counts(edges, np.ones(16))[:, :15]
    assert inside_NM.argmax(1).tolist() == [0, *range(15)]
    assert (inside_NM.sum(1) == 1).all()


# --- refused ---


@pytest.mark.parametrize(
    ("name", "references", "reason"),
    [
        ("AUC_macro", [["a"], ["a"]], "every reference is of the class 'a'"),
        ("average_precision_score_weighted", [["a"]], "every reference is of the class 'a'"),
        ("f1_binary", [["a"], ["b"], ["c"]], "the references have 3; use f1_macro"),
        ("AUC_binary", [["a"], ["b"], ["c"]], "the references have 3; use AUC_macro"),
        ("f1_binary", [["a"], ["a"]], "every reference is of the class 'a'"),
        ("matthews_correlation", [["a"]] * 3, "one class"),
        ("norm_macro_recall", [["a"]] * 3, "one class"),
    ],
)
def test_undefined_on_classes(name: str, references: list[list[str]], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        metric_names(Evaluate(metrics=[name]), "text-classification", references)


def test_undefined_on_label_sets() -> None:
    with pytest.raises(RecipeError, match="no row has a label"):
        metric_names(Evaluate(metrics=["precision_macro"]), "multi-label-classification", [["[]"]])
    with pytest.raises(RecipeError, match="no label tells rows apart"):
        metric_names(Evaluate(metrics=["AUC_macro"]), "multi-label-classification", [['["a"]'], ['["a"]']])
    assert metric_names(Evaluate(metrics=["AUC_macro"]), "multi-label-classification", [['["a"]'], ["[]"]])


def test_the_positive_class_must_occur() -> None:
    options = {"f1_binary": {"positive": "yse"}}
    section = Evaluate(metrics=["f1_binary"], metric_options=options)
    with pytest.raises(RecipeError, match="no reference is of the positive class 'yse': did you mean 'yes'"):
        metric_names(section, "text-classification", [["no"], ["yes"]])


@pytest.mark.parametrize(
    ("shares", "truth", "reason"),
    [
        ([[0.5, 0.5]], ["cow"], "a row's class 'cow' is none of the model's"),
        ([[0.5, 0.5, 0.0]], ["ant"], r"must be \[1 rows, 2 classes\]"),
        ([[float("nan"), 0.5]], ["ant"], "not finite"),
        ([[3.0, -2.0]], ["ant"], "not between 0 and 1"),
    ],
)
def test_probabilities_that_are_none(shares: list[list[float]], truth: list[str], reason: str) -> None:
    with pytest.raises(IngotError, match=reason):
        statistics_of_classes(np.asarray(shares), truth, LABELS[:2])


def test_a_label_that_the_model_has_not() -> None:
    with pytest.raises(IngotError, match="a row's label 'cow' is none of the model's"):
        statistics_of_label_sets(np.ones((1, 4)), [["cow"]], LABELS)


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Statistic:
        raise AssertionError("computed")

    shares, right = drawn(20, 2, 0)
    monkeypatch.setattr("ingot.evaluation.class_metrics.brier", fail)
    compute = statistics_of_classes(shares, [LABELS[i] for i in right], LABELS[:2])
    assert set(compute) == set(OF_TASK["text-classification"])
    compute["accuracy"]()
    with pytest.raises(AssertionError, match="computed"):
        compute["brier"]()
