"""Classes and sets of labels: hits, predictions and references of each class, counted by row, give every score of a
resample. scikit-learn's definitions, held against it by the tests.

N rows, C classes.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ingot.errors import IngotError
from ingot.evaluation.averages import BY_AVERAGE, SCORES, each_of, mean_by, parts_of, recall_of
from ingot.evaluation.calibration import brier, calibration, log_loss
from ingot.evaluation.ranking import RANKINGS, ranking
from ingot.evaluation.statistic import Array, Compute, References, Statistic, TextMetric, ratio, row_mean
from ingot.registry import nearest

# --- from sums: [..., 3C], hits, predictions and references of every class ---

BINARY: dict[str, Callable[[Array], Array]] = {f"{name}_binary": score for name, score in SCORES.items()}
"""f1_binary ... -> its value from sums [..., 3] of the positive class alone."""


def balanced_accuracy_of(sums: Array) -> Array:
    """Mean recall of the classes that have references."""
    return mean_by(each_of(recall_of, sums), (parts_of(sums)[2] > 0).astype(np.float64))


def norm_macro_recall_of(sums: Array) -> Array:
    """Balanced accuracy, moved so that guessing is 0 and all right is 1; NaN of a draw with one class."""
    classes = (parts_of(sums)[2] > 0).sum(-1)
    chance = np.divide(1.0, classes, out=np.ones(classes.shape), where=classes > 0)
    rest = 1 - chance
    gained = balanced_accuracy_of(sums) - chance
    found: Array = np.divide(gained, rest, out=np.full(rest.shape, np.nan), where=rest > 0)
    return found


def weighted_accuracy_of(sums: Array) -> Array:
    """Accuracy of rows that weigh as much as their class has rows: sum of n_c hits_c over sum of n_c squared."""
    hits, _, real = parts_of(sums)
    return ratio(np.stack([(hits * real).sum(-1), (real * real).sum(-1)], axis=-1), 0, 1)


def matthews_of(sums: Array) -> Array:
    """R_K (Gorodkin 2004); 0 where all predictions are one class, as scikit-learn has it."""
    hits, predicted, real = parts_of(sums)
    n, right = real.sum(-1), hits.sum(-1)
    covariance = right * n - (predicted * real).sum(-1)
    spread = (n**2 - (predicted**2).sum(-1)) * (n**2 - (real**2).sum(-1))
    found: Array = np.divide(covariance, np.sqrt(spread), out=np.zeros_like(covariance), where=spread > 0)
    return found


FROM_COUNTS: dict[str, Callable[[Array], Array]] = {
    **BY_AVERAGE,
    "balanced_accuracy": balanced_accuracy_of,
    "weighted_accuracy": weighted_accuracy_of,
    "norm_macro_recall": norm_macro_recall_of,
    "matthews_correlation": matthews_of,
}


# --- from what was predicted ---


def accuracy(predictions: Sequence[str], references: References) -> Statistic:
    """Share of rows whose class is right."""
    return row_mean([float(p in refs) for p, refs in zip(predictions, references, strict=True)])


def class_counts(predicted: Sequence[str], truth: Sequence[str], classes: Sequence[str]) -> Array:
    """[N, 3C]: whether the row is a hit, a prediction, a reference of each of `classes`."""
    place = {name: index for index, name in enumerate(classes)}
    right_N, found_N = (np.asarray([place[name] for name in names], dtype=int) for names in (truth, predicted))
    counts = np.zeros((len(truth), 3, len(classes)))
    rows_N = np.arange(len(truth))
    counts[rows_N, 0, right_N] = right_N == found_N
    counts[rows_N, 1, found_N] = 1
    counts[rows_N, 2, right_N] = 1
    return counts.reshape(len(truth), -1)


def counted(name: str) -> TextMetric:
    """A metric of FROM_COUNTS, over the classes that occur in predictions or references."""

    def compute(predictions: Sequence[str], references: References) -> Statistic:
        truth = [refs[0] for refs in references]
        classes = sorted({*truth, *predictions})
        return Statistic(class_counts(predictions, truth, classes), FROM_COUNTS[name], {"classes": len(classes)})

    return compute


def binary(name: str) -> TextMetric:
    """A metric of BINARY. `positive`: the class that is looked for; None: the last of the references' in order."""

    def compute(predictions: Sequence[str], references: References, *, positive: str | None = None) -> Statistic:
        truth = [refs[0] for refs in references]
        wanted = _positive(positive, sorted(set(truth)))
        found_N, real_N = (np.asarray([one == wanted for one in names]) for names in (predictions, truth))
        rows = np.stack([found_N & real_N, found_N, real_N], axis=1).astype(np.float64)
        return Statistic(rows, BINARY[name], {"positive": wanted})

    return compute


def _positive(positive: str | None, classes: Sequence[str]) -> str:
    if positive is None:
        return classes[-1]
    if positive not in classes:
        raise IngotError(f"the positive class {positive!r} is none of them: {nearest(positive, classes)}")
    return positive


def class_undefined(name: str, references: References, **options: Any) -> str | None:
    """Why a metric of single classes says nothing about these references."""
    classes = sorted({text for refs in references for text in refs})
    if len(classes) < 2 and (name.startswith(("AUC", "average_precision")) or name.endswith("_binary")):
        return f"every reference is of the class {classes[0]!r}" if classes else "there is no reference"
    if len(classes) < 2 and name in ("norm_macro_recall", "matthews_correlation"):
        return "the references are of one class; use accuracy"
    if name.endswith("_binary"):
        if len(classes) > 2:
            return (
                f"it is for two classes, and the references have {len(classes)}; use {name.replace('binary', 'macro')}"
            )
        if (positive := options.get("positive")) is not None and positive not in classes:
            return f"no reference is of the positive class {positive!r}: {nearest(positive, classes)}"
    return None


def confusion(predicted: Sequence[str], truth: Sequence[str], labels: Sequence[str]) -> Array:
    """[C, C] int: how often a row of the class of the line was said to be of the class of the column, in the order of
    `labels`. Raises IngotError for a name that is none of them.
    """
    place = {name: index for index, name in enumerate(labels)}
    for name in (*truth, *predicted):
        if name not in place:
            raise IngotError(f"{name!r} is none of the classes: {nearest(name, labels)}")
    table = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(table, ([place[name] for name in truth], [place[name] for name in predicted]), 1)
    return table


# --- from probabilities ---


def statistics_of_classes(
    probabilities_NC: Array, truth: Sequence[str], labels: Sequence[str], positive: str | None = None
) -> Compute:
    """Every metric of text classification. A row's class is the likeliest, the first of `labels` among equals.

    `positive`: the class of the metrics for two classes; None: the last of `labels`. Raises IngotError for a truth that
    is none of `labels`, and for probabilities that are none.
    """
    probabilities_NC = _checked(probabilities_NC, len(truth), labels)
    place = {name: index for index, name in enumerate(labels)}
    for name in truth:
        if name not in place:
            raise IngotError(f"a row's class {name!r} is none of the model's: {nearest(name, labels)}")
    right_N = np.asarray([place[name] for name in truth], dtype=int)
    predicted_N = probabilities_NC.argmax(1)
    predicted = [labels[index] for index in predicted_N]
    real_NC = np.eye(len(labels))[right_N]
    references = [[name] for name in truth]
    wanted = place[_positive(positive, labels)]

    def counts(name: str) -> Statistic:
        return Statistic(class_counts(predicted, truth, labels), FROM_COUNTS[name], {"classes": len(labels)})

    def of_positive(name: str) -> Statistic:
        own = ranking(name, probabilities_NC[:, [wanted]], real_NC[:, [wanted]])
        return Statistic(own.rows, own.value_of, {"positive": labels[wanted]}, whole=True)

    confident_N = probabilities_NC.max(1)
    return {
        "accuracy": lambda: accuracy(predicted, references),
        **{name: partial(counts, name) for name in FROM_COUNTS},
        **{name: partial(binary(name), predicted, references, positive=labels[wanted]) for name in BINARY},
        **{name: partial(ranking, name, probabilities_NC, real_NC) for name in RANKINGS if "binary" not in name},
        **{name: partial(of_positive, name) for name in RANKINGS if "binary" in name},
        "log_loss": lambda: log_loss(probabilities_NC, right_N),
        "brier": lambda: brier(probabilities_NC, right_N),
        "ece": lambda: calibration(confident_N, predicted_N == right_N),
    }


def _checked(probabilities_NC: Array, n: int, labels: Sequence[str]) -> Array:
    probabilities_NC = np.asarray(probabilities_NC, dtype=np.float64)
    if probabilities_NC.shape != (n, len(labels)):
        raise IngotError(f"probabilities are {probabilities_NC.shape}: must be [{n} rows, {len(labels)} classes]")
    if not np.isfinite(probabilities_NC).all() or probabilities_NC.min() < 0 or probabilities_NC.max() > 1 + 1e-6:
        raise IngotError("probabilities are not between 0 and 1: the model's outputs are not finite, or not normalised")
    return probabilities_NC


def statistics_of_label_sets(
    probabilities_NC: Array, truth: Sequence[Sequence[str]], labels: Sequence[str], threshold: float = 0.5
) -> Compute:
    """Every metric of sets of labels. A row has the labels whose probability is `threshold` or more."""
    probabilities_NC = _checked(probabilities_NC, len(truth), labels)
    known = set(labels)
    for names in truth:
        for name in names:
            if name not in known:
                raise IngotError(f"a row's label {name!r} is none of the model's: {nearest(name, labels)}")
    predicted_NC = probabilities_NC >= threshold
    real_NC = np.asarray([[label in names for label in labels] for names in truth])
    counts = np.concatenate([predicted_NC & real_NC, predicted_NC, real_NC], axis=1).astype(np.float64)
    ranked = real_NC.astype(np.float64)
    details = {"threshold": threshold}
    return {
        "subset_accuracy": lambda: row_mean((predicted_NC == real_NC).all(1), **details),
        **{name: partial(Statistic, counts, value_of, details) for name, value_of in BY_AVERAGE.items()},
        **{name: partial(ranking, name, probabilities_NC, ranked) for name in RANKINGS if "binary" not in name},
    }


def label_sets_undefined(name: str, references: References, **options: Any) -> str | None:
    """Why a metric of sets of labels says nothing about these references (each a list as JSON)."""
    rows = [set(json.loads(text)) for texts in references for text in texts]
    used = set().union(*rows)
    if not used and name != "subset_accuracy":
        return "no row has a label"
    if name.startswith(("AUC", "average_precision")) and all(label in row for label in used for row in rows):
        return "no label tells rows apart: each is on all of them"
    return None
