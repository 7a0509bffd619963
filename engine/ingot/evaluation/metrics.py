"""Metrics: one table of names (Azure's where it has one), each an exact definition or a library's arithmetic.

A metric turns predictions and references into a `Statistic`: numbers per row from which the value of any resample of the rows
follows. That is what intervals and paired tests need, and it makes corpus metrics (BLEU, macro F1) as cheap as means.
Undefined inputs are refused with the reason; a 0 that means "not measurable" is never printed.
"""

# N rows, K numbers per row, C classes

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ingot.errors import IngotError, RecipeError
from ingot.recipe import Evaluate, Task
from ingot.registry import nearest

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Statistic:
    """Per-row numbers `rows_NK` and the function from their SUM over rows (shape [..., K]) to the value (shape [...])."""

    rows_NK: Array
    value_of: Callable[[Array], Array]
    details: dict[str, Any] = field(default_factory=dict)

    def value(self) -> float:
        """The metric over all rows."""
        return float(self.value_of(self.rows_NK.sum(0)))

    def per_row(self) -> list[float] | None:
        """Each row's own score where the metric is a mean of rows; None for corpus metrics."""
        return self.rows_NK[:, 0].tolist() if self.value_of is mean_of else None


Compute = Callable[[Sequence[str], Sequence[Sequence[str]]], Statistic]


@dataclass(frozen=True)
class Metric:
    """A name, what it means, and how it is computed. `unit_interval`: it lies between 0 and 1."""

    name: str
    doc: str
    compute: Compute
    higher_is_better: bool = True
    unit_interval: bool = True


def mean_of(sums: Array) -> Array:
    """Mean of a per-row score; rows are (score, 1)."""
    return sums[..., 0] / sums[..., 1]


def row_mean(scores: Sequence[float], **details: Any) -> Statistic:
    """A metric that is the mean of per-row scores."""
    column = np.asarray(scores, dtype=np.float64)
    return Statistic(np.stack([column, np.ones_like(column)], axis=1), mean_of, details)


# --- text --------------------------------------------------------------------------------------------------------------


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
    """Prediction equals a reference after stripping surrounding blanks."""
    return row_mean([float(any(p.strip() == r.strip() for r in refs)) for p, refs in zip(predictions, references, strict=True)])


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu, 0 to 100; its signature is in the details."""
    from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER

    if any(not r.strip() for refs in references for r in refs):
        raise IngotError("bleu is undefined: a reference is empty")
    if max(len(r.split()) for refs in references for r in refs) < MAX_NGRAM_ORDER:
        raise IngotError("bleu is undefined: no reference has 4 words, so no 4-gram can match; use exact_match or rougeL")
    scorer = BLEU(effective_order=True)  # only for the rows' counts; the corpus score below does not use it
    rows = [scorer.sentence_score(p, list(refs)) for p, refs in zip(predictions, references, strict=True)]
    statistics = np.asarray([[r.sys_len, r.ref_len, *r.counts, *r.totals] for r in rows], dtype=np.float64)
    whole = BLEU()
    whole.corpus_score(list(predictions), _streams(references))  # a signature knows the number of references only after use
    order = MAX_NGRAM_ORDER

    def value_of(sums: Array) -> Array:
        flat = sums.reshape(-1, sums.shape[-1])
        scores = [
            BLEU.compute_bleu(correct=s[2 : 2 + order].tolist(), total=s[2 + order :].tolist(), sys_len=int(s[0]), ref_len=int(s[1]), smooth_method="exp").score
            for s in flat
        ]
        return np.asarray(scores).reshape(sums.shape[:-1])

    return Statistic(statistics, value_of, {"signature": str(whole.get_signature())})


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu wants them: the first of every row, the second of every row (None where there is none) ..."""
    return [[refs[i] if i < len(refs) else None for refs in references] for i in range(max(map(len, references)))]


def rouge(kind: str) -> Compute:
    """ROUGE F1 (Lin 2004) by rouge_score, without stemming, the best reference of each row, mean over rows."""

    def compute(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
        from rouge_score.rouge_scorer import RougeScorer

        if any(not re.search(r"[a-z0-9]", r.lower()) for refs in references for r in refs):
            raise IngotError(f"{kind} is undefined: it counts only a-z and 0-9, and a reference has none of them; use bleu or exact_match")
        scorer = RougeScorer([kind], use_stemmer=False)
        scores = [max(scorer.score(r, p)[kind].fmeasure for r in refs) for p, refs in zip(predictions, references, strict=True)]
        return row_mean(scores, stemmer=False)

    return compute


# --- JSON --------------------------------------------------------------------------------------------------------------


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, or None. NaN and Infinity are no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def same(a: Any, b: Any) -> bool:
    """Equality of parsed JSON: key order does not matter, 1 equals 1.0, and true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def leaves(value: Any, path: str = "") -> Counter[tuple[str, str, str]]:
    """The leaves of parsed JSON as a bag of (path, kind, value); empty containers are leaves."""
    if isinstance(value, dict) and value:
        return sum((leaves(child, f"{path}.{key}") for key, child in value.items()), Counter())
    if isinstance(value, list) and value:
        return sum((leaves(child, f"{path}[{i}]") for i, child in enumerate(value)), Counter())
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return Counter([(path, type(value).__name__, str(value))])
    if isinstance(value, int | float):
        return Counter([(path, "number", repr(float(value)))])
    return Counter([(path, type(value).__name__, "")])


def json_valid(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
    """Prediction is one JSON object and nothing else."""
    return row_mean([float(parse_object(p) is not None) for p in predictions])


def _reference_objects(name: str, references: Sequence[Sequence[str]]) -> list[list[dict[str, Any]]]:
    parsed = [[parse_object(r) for r in refs] for refs in references]
    if any(r is None for refs in parsed for r in refs):
        raise IngotError(f"{name} is undefined: a reference is no JSON object; use exact_match")
    return parsed  # type: ignore[return-value]


def json_exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
    """Prediction parses to the same JSON object as a reference."""
    wanted = _reference_objects("json_exact_match", references)
    found = [parse_object(p) for p in predictions]
    return row_mean([float(p is not None and any(same(p, r) for r in refs)) for p, refs in zip(found, wanted, strict=True)])


def json_argument_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
    """F1 of the leaves (path, kind, value) of prediction and best reference; 0 when the prediction is no JSON object."""
    wanted = _reference_objects("json_argument_f1", references)

    def score(text: str, refs: list[dict[str, Any]]) -> float:
        found = parse_object(text)
        if found is None:
            return 0.0
        have = leaves(found)
        needs = [leaves(r) for r in refs]
        return max(2 * (have & need).total() / (have.total() + need.total()) for need in needs)

    return row_mean([score(p, refs) for p, refs in zip(predictions, wanted, strict=True)])


# --- classes -----------------------------------------------------------------------------------------------------------


def accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
    """Share of rows whose class is right."""
    return row_mean([float(p in refs) for p, refs in zip(predictions, references, strict=True)])


def f1(average: str) -> Compute:
    """F1 over classes from counts of true positives, predictions and references, as scikit-learn defines it (zero_division=0)."""

    def compute(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
        truth = [refs[0] for refs in references]
        classes = sorted({*truth, *predictions})
        place = {name: index for index, name in enumerate(classes)}
        rows_NK = np.zeros((len(truth), 3 * len(classes)))
        for row, (predicted, right) in enumerate(zip(predictions, truth, strict=True)):
            rows_NK[row, place[right]] += predicted == right
            rows_NK[row, len(classes) + place[predicted]] += 1
            rows_NK[row, 2 * len(classes) + place[right]] += 1

        def value_of(sums: Array) -> Array:
            hits, predicted, real = np.split(sums, 3, axis=-1)
            present = (predicted + real) > 0  # a class that a resample lost is no class of it
            score = np.divide(2 * hits, predicted + real, out=np.zeros_like(hits), where=present)
            weights = real if average == "weighted" else present.astype(np.float64)
            return (score * weights).sum(-1) / weights.sum(-1)

        return Statistic(rows_NK, value_of, {"classes": len(classes)})

    return compute


# --- likelihood --------------------------------------------------------------------------------------------------------


def loss_of(sums: Array) -> Array:
    """Mean negative log-likelihood in nats; rows are (sum, tokens)."""
    return sums[..., 0] / sums[..., 1]


def perplexity_of(sums: Array) -> Array:
    """exp of `loss_of`: weighted by tokens, not the mean of rows."""
    return np.exp(loss_of(sums))


def _not_from_text(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
    raise IngotError("perplexity and loss come from a model's likelihoods: use them with objective.task language-modeling")


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", "answer equals the reference, blanks around it aside", exact_match),
        Metric("bleu", "corpus BLEU, 0 to 100", bleu, unit_interval=False),
        Metric("rouge1", "unigram F1", rouge("rouge1")),
        Metric("rouge2", "bigram F1", rouge("rouge2")),
        Metric("rougeL", "longest common subsequence F1", rouge("rougeL")),
        Metric("rougeLsum", "longest common subsequence F1 by lines", rouge("rougeLsum")),
        Metric("json_valid", "answer is a JSON object", json_valid),
        Metric("json_exact_match", "answer parses to the reference's JSON object", json_exact_match),
        Metric("json_argument_f1", "F1 of the JSON's leaves", json_argument_f1),
        Metric("accuracy", "share of right classes", accuracy),
        Metric("f1_macro", "F1, classes weighted equally", f1("macro")),
        Metric("f1_weighted", "F1, classes weighted by frequency", f1("weighted")),
        Metric("perplexity", "exp of the mean loss per token", _not_from_text, higher_is_better=False, unit_interval=False),
        Metric("loss", "mean loss per token in nats", _not_from_text, higher_is_better=False, unit_interval=False),
    )
}
CLASS_METRICS = ("accuracy", "f1_macro", "f1_weighted")
LIKELIHOOD_METRICS = ("perplexity", "loss")
TEXT_METRICS = tuple(name for name in METRICS if name not in (*CLASS_METRICS, *LIKELIHOOD_METRICS))
OF_TASK: dict[str, tuple[str, ...]] = {
    "chat-completion": TEXT_METRICS,
    "text-generation": TEXT_METRICS,
    "text-classification": CLASS_METRICS,
    "language-modeling": LIKELIHOOD_METRICS,
}


def metric_names(section: Evaluate, task: Task, references: Sequence[Sequence[str]]) -> list[str]:
    """The recipe's metrics, or those of the task; a name that is unknown or not of this task is a RecipeError."""
    for name in section.metrics or ():
        if name not in METRICS:
            raise RecipeError("evaluate.metrics", name, nearest(name, METRICS))
        if name not in OF_TASK[task]:
            raise RecipeError("evaluate.metrics", name, f"{task} has {', '.join(OF_TASK[task])}")
    if section.metrics:
        return list(section.metrics)
    if task == "chat-completion":
        objects = all(parse_object(r) is not None for refs in references for r in refs)
        return ["json_exact_match", "json_argument_f1", "json_valid"] if objects else ["exact_match"]
    return {"text-generation": ["bleu", "rougeL"], "text-classification": ["accuracy", "f1_macro"], "language-modeling": ["perplexity"]}[task]


def finite(value: float, name: str) -> float:
    """`value`, or an error when a metric came out as no number."""
    if not math.isfinite(value):
        raise IngotError(f"{name} came out as {value}: the model's likelihoods are not finite")
    return value
