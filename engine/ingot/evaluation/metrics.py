"""Metrics: one table of names (Azure's where it has one), each an exact definition or a library's arithmetic.

A metric turns what a model gave and references into a `Statistic`: numbers per row from which the value of any resample
of the rows follows. That is what intervals and paired tests need, and it makes corpus metrics (BLEU, macro F1) as cheap
as means. References on which a metric is undefined are refused with the reason, before any model has answered; a 0
that means "not measurable" is never printed.
"""

# N rows, K numbers per row

import difflib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ingot.errors import IngotError, RecipeError
from ingot.evaluation.class_metrics import class_undefined, label_sets_undefined
from ingot.evaluation.entities import entities_undefined
from ingot.evaluation.json_metrics import json_undefined, parse_object
from ingot.evaluation.judge_metrics import GRADED, JUDGED
from ingot.evaluation.likelihood_metrics import loss_of, perplexity_of
from ingot.evaluation.statistic import Array, Compute, Metric, References, Statistic, row_mean
from ingot.evaluation.vocabulary import (
    ALIASES,
    ALIASES_OF_TASK,
    METRICS,
    OF_TASK,
    OPTION_TYPES,
    TEXT_METRICS,
)
from ingot.recipe import Evaluate
from ingot.registry import nearest

__all__ = [
    "METRICS",
    "OF_TASK",
    "TEXT_METRICS",
    "Array",
    "Metric",
    "References",
    "Statistic",
    "finite",
    "loss_of",
    "metric_names",
    "parse_object",
    "perplexity_of",
    "row_mean",
    "statistic_of",
]
Options = Mapping[str, Mapping[str, Any]]
"""Metric -> its options, e.g. {"exact_match": {"ignore_case": True}}."""
FIELD, OPTIONS = "evaluate.metrics", "evaluate.metric_options"


def statistic_of(name: str, rows: Array, details: dict[str, Any] | None = None) -> Statistic:
    """The statistic of a metric whose numbers per row [N, K] were stored. Raises IngotError for an unknown name."""
    try:
        metric = METRICS[name]
    except KeyError:
        raise IngotError(f"this Ingot knows no metric {name!r}: {nearest(name, METRICS)}") from None
    return Statistic(np.asarray(rows, dtype=np.float64), metric.value_of, dict(details or {}), metric.whole)


def statistics_of_texts(predictions: Sequence[str], references: References, options: Options | None = None) -> Compute:
    """Every metric of written answers."""
    own = options or {}
    return {name: partial(METRICS[name].compute, predictions, references, **own.get(name, {})) for name in TEXT_METRICS}


def canonical(name: str, task: str, field: str = FIELD) -> str:
    """Our name of the metric that `task` (a kind of rows) calls `name`: itself, an alias, or either in other capitals.

    Raises RecipeError for a name that is unknown, or of other tasks.
    """
    if task not in OF_TASK:
        raise IngotError(f"there are no metrics of {task!r}: {nearest(task, OF_TASK)}")
    aliases = ALIASES | ALIASES_OF_TASK.get(task, {})
    known = aliases | {metric: metric for metric in OF_TASK[task]}
    lower = {alias.lower(): metric for alias, metric in known.items()}
    found = known.get(name) or lower.get(name.lower()) or (name if name in METRICS else None)
    if found is None:
        here = [alias for alias, metric in known.items() if metric in OF_TASK[task]]
        close = difflib.get_close_matches(name, here, n=1, cutoff=0.5)
        raise RecipeError(field, name, nearest(name, close or OF_TASK[task]))
    if found in JUDGED:
        rubric = next((f" with rubric: {it}" for it in GRADED if name.lower().endswith(f"_{it}")), "")
        raise RecipeError(field, name, f"comes from a judge: name one (--judge URL#MODEL, or judge:{rubric}), not here")
    if found not in OF_TASK[task]:
        raise RecipeError(field, name, f"{task} has {', '.join(OF_TASK[task])}")
    return found


def metric_names(
    section: Evaluate, task: str, references: References, field: str = FIELD, rows: str = "test"
) -> list[str]:
    """The recipe's metrics by our names, or those of `task` (`objective.rows`). `rows`: what they are called, for the
    message.

    Raises RecipeError about `field` for a name that is unknown or not of this task, for an option that the metric has
    not or that no measured metric could take, and for a metric that is undefined on `references`.
    """
    named = [(name, canonical(name, task, field)) for name in section.metrics or ()]
    named = named or [(name, name) for name in _defaults(task, references)]
    measured = [metric for _, metric in named]
    options = options_of(section, task)
    for stray in set(options) - set(measured):
        raise RecipeError(OPTIONS, stray, f"it is not measured: {nearest(stray, measured)}")
    for name, metric in named:
        own = options.get(metric, {})
        check_options(metric, own, f"{OPTIONS}.{name}")
        if reason := undefined(metric, task, references, **own):
            raise RecipeError(field, name, f"it is undefined on the {rows} rows: {reason}")
    return list(dict.fromkeys(measured))


def options_of(section: Evaluate, task: str) -> dict[str, dict[str, Any]]:
    """Metric by our name -> its options."""
    return {canonical(name, task, OPTIONS): dict(own) for name, own in section.metric_options.items()}


def check_options(metric: str, options: Mapping[str, Any], field: str) -> None:
    """Raise RecipeError about `field` for an option that `metric` (our name) has not, or a value of another type."""
    known = METRICS[metric].options
    for option, value in options.items():
        if option not in known:
            fix = nearest(option, known) if known else f"{metric} has none"
            raise RecipeError(field, option, f"unknown option: {fix}")
        wanted, words = OPTION_TYPES[option]
        if not isinstance(value, wanted):
            raise RecipeError(f"{field}.{option}", value, f"it must be {words}")


def undefined(name: str, task: str, references: References, **options: Any) -> str | None:
    """Why a metric cannot be measured against references of `task`, or None when it can."""
    if bare := [row for row, refs in enumerate(references) if not refs]:
        return f"row {bare[0]} has no reference"
    of_task = {"text-classification": class_undefined, "multi-label-classification": label_sets_undefined}
    if task in of_task:
        return of_task[task](name, references, **options) if references else None
    return METRICS[name].undefined(references, **options)


def _defaults(task: str, references: References) -> tuple[str, ...]:
    if task == "chat-completion":
        objects = json_undefined(references) is None
        return ("json_exact_match", "json_argument_f1", "json_valid") if objects else ("exact_match",)
    if task == "token-classification" and entities_undefined(references):
        return ("token_accuracy",)
    return DEFAULTS[task]


DEFAULTS: dict[str, tuple[str, ...]] = {
    "text-generation": ("bleu", "rougeL"),
    "summarization": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    "translation": ("bleu", "chrf"),
    "text-classification": ("accuracy", "f1_macro"),
    "multi-label-classification": ("f1_micro", "f1_macro", "subset_accuracy"),
    "token-classification": ("entity_f1", "entity_precision", "entity_recall"),
    "question-answering": ("squad_exact_match", "squad_f1"),
    "fill-mask": ("masked_accuracy", "perplexity"),
    "language-modeling": ("perplexity",),
    "perplexity": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple-choice": ("acc", "acc_norm"),
    "preference": ("preference_accuracy", "preference_margin"),
}
"""Kind of rows -> the metrics where none are named; those of chats depend on the references."""


def finite(value: float, name: str) -> float:
    """`value`, or an error when a metric came out as no number."""
    if not math.isfinite(value):
        raise IngotError(f"{name} came out as {value}: the model's likelihoods are not finite")
    return value
