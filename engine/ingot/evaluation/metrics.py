"""Metrics: one table of names (Azure's where it has one), each an exact definition or a library's arithmetic.

A metric turns predictions and references into a `Statistic`: numbers per row from which the value of any resample of
the rows follows. That is what intervals and paired tests need, and it makes corpus metrics (BLEU, macro F1) as cheap
as means. References on which a metric is undefined are refused with the reason, before any model has answered; a 0
that means "not measurable" is never printed.
"""

# N rows, K numbers per row, C classes

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ingot.errors import IngotError, RecipeError
from ingot.evaluation.chrf import chrf_counts, chrf_of
from ingot.evaluation.entities import entities_undefined
from ingot.recipe import Evaluate
from ingot.registry import nearest

Array = np.ndarray[Any, np.dtype[Any]]
References = Sequence[Sequence[str]]
"""The right answers of every row, one or more each."""


@dataclass(frozen=True)
class Statistic:
    """Numbers per row, `rows` [N, K], and the function from their SUM over rows [..., K] to the value [...]."""

    rows: Array
    value_of: Callable[[Array], Array]
    details: dict[str, Any] = field(default_factory=dict)

    def value(self) -> float:
        """The metric over all rows."""
        return float(self.value_of(self.rows.sum(0)))

    def per_row(self) -> list[float] | None:
        """Each row's own score where the metric is a mean of rows; None for corpus metrics."""
        return self.rows[:, 0].tolist() if self.value_of is mean_of else None


Compute = Callable[[Sequence[str], References], Statistic]


def _always_defined(references: References) -> None:
    return None


@dataclass(frozen=True)
class Metric:
    """A name, what it means, and how it is computed.

    `undefined` returns why the metric cannot be measured against these references, or None when it can.
    `unit_interval`: it lies between 0 and 1. `decimals`: how many people read.
    """

    name: str
    doc: str
    compute: Compute
    undefined: Callable[[References], str | None] = _always_defined
    higher_is_better: bool = True
    unit_interval: bool = True
    decimals: int = 3


def mean_of(sums: Array) -> Array:
    """Mean of a per-row score; rows are (score, 1)."""
    return sums[..., 0] / sums[..., 1]


def row_mean(scores: Sequence[float], **details: Any) -> Statistic:
    """A metric that is the mean of per-row scores."""
    column = np.asarray(scores, dtype=np.float64)
    return Statistic(np.stack([column, np.ones_like(column)], axis=1), mean_of, details)


# --- text ---


def exact_match(predictions: Sequence[str], references: References) -> Statistic:
    """Prediction equals a reference after stripping surrounding blanks."""
    pairs = zip(predictions, references, strict=True)
    return row_mean([float(p.strip() in {r.strip() for r in refs}) for p, refs in pairs])


def bleu(predictions: Sequence[str], references: References) -> Statistic:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu, 0 to 100; its signature is in the details."""
    from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER

    rows = BLEU(effective_order=True)  # for the rows' counts only; without it sacrebleu warns about sentence scores
    counted = [rows.sentence_score(p, list(refs)) for p, refs in zip(predictions, references, strict=True)]
    whole = BLEU()
    whole.corpus_score(list(predictions), _streams(references))  # until then a signature has no number of references

    def score(sums_K: Array) -> float:
        sys_len, ref_len, *counts = sums_K.tolist()
        correct, total = counts[:MAX_NGRAM_ORDER], counts[MAX_NGRAM_ORDER:]
        return float(BLEU.compute_bleu(correct, total, int(sys_len), int(ref_len), smooth_method="exp").score)

    def value_of(sums: Array) -> Array:
        return np.apply_along_axis(score, -1, sums)

    numbers = np.asarray([[r.sys_len, r.ref_len, *r.counts, *r.totals] for r in counted], dtype=np.float64)
    return Statistic(numbers, value_of, {"signature": str(whole.get_signature())})


def _bleu_undefined(references: References) -> str | None:
    from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER

    words_of = BLEU().tokenizer
    if any(not r.strip() for refs in references for r in refs):
        return "a reference is empty; remove its row, or use exact_match"
    if all(len(words_of(r).split()) < MAX_NGRAM_ORDER for refs in references for r in refs):
        return f"no reference has {MAX_NGRAM_ORDER} words, so nothing can match; use exact_match"
    return None


def chrf(predictions: Sequence[str], references: References) -> Statistic:
    """Corpus chrF; see chrf.py."""
    return Statistic(chrf_counts(predictions, references), chrf_of)


def _chrf_undefined(references: References) -> str | None:
    return "a reference is empty; remove its row" if any(not r.strip() for refs in references for r in refs) else None


def _streams(references: References) -> list[list[str | None]]:
    """References as sacrebleu wants them: every row's first, every row's second (None where there is none) ..."""
    return [[refs[i] if i < len(refs) else None for refs in references] for i in range(max(map(len, references)))]


def rouge(kind: str) -> Compute:
    """ROUGE F1 (Lin 2004) by rouge_score, without stemming, the best reference of each row, mean over rows."""

    def compute(predictions: Sequence[str], references: References) -> Statistic:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=False)
        pairs = zip(predictions, references, strict=True)
        return row_mean([max(scorer.score(r, p)[kind].fmeasure for r in refs) for p, refs in pairs], stemmer=False)

    return compute


def _rouge_undefined(references: References) -> str | None:
    if any(not re.search(r"[a-z0-9]", r.lower()) for refs in references for r in refs):
        return "it counts only a-z and 0-9, and a reference has none of them; use bleu or exact_match"
    return None


# --- JSON ---


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, or None. NaN and Infinity are no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


Leaf = tuple[tuple[str | int, ...], str, Any]


def leaves(value: Any) -> Counter[Leaf]:
    """The leaves of parsed JSON as a bag of (path, kind, value); an empty object or array is a leaf.

    Two values have the same leaves exactly when they are the same JSON: the order of keys does not matter, 1 is 1.0,
    and true is not 1.
    """
    return Counter(_walk(value))


def _walk(value: Any) -> Iterator[Leaf]:
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]  # no recursion: a model may nest without end
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, dict) and node:
            waiting.extend(((*path, key), child) for key, child in node.items())
        elif isinstance(node, list) and node:
            waiting.extend(((*path, index), child) for index, child in enumerate(node))
        elif isinstance(node, dict | list):
            yield path, type(node).__name__, None
        else:
            number = isinstance(node, int | float) and not isinstance(node, bool)
            yield path, "number" if number else type(node).__name__, node


def json_valid(predictions: Sequence[str], references: References) -> Statistic:
    """Prediction is one JSON object and nothing else."""
    return row_mean([float(parse_object(p) is not None) for p in predictions])


def _json_undefined(references: References) -> str | None:
    if any(parse_object(r) is None for refs in references for r in refs):
        return "a reference is no JSON object; use exact_match"
    return None


def leaf_f1(found: Counter[Leaf], wanted: Counter[Leaf]) -> float:
    """F1 of two bags of leaves; 1 exactly when they are equal."""
    return 2 * (found & wanted).total() / (found.total() + wanted.total())


def by_leaves(score: Callable[[Counter[Leaf], Counter[Leaf]], float]) -> Compute:
    """Mean over rows of `score` against the best reference; 0 when the prediction is no JSON object."""

    def compute(predictions: Sequence[str], references: References) -> Statistic:
        scores = []
        for prediction, refs in zip(predictions, references, strict=True):
            found = parse_object(prediction)
            wanted = [leaves(parse_object(r)) for r in refs]
            scores.append(0.0 if found is None else max(score(leaves(found), w) for w in wanted))
        return row_mean(scores)

    return compute


# --- classes ---


def accuracy(predictions: Sequence[str], references: References) -> Statistic:
    """Share of rows whose class is right."""
    return row_mean([float(p in refs) for p, refs in zip(predictions, references, strict=True)])


def f1(average: str) -> Compute:
    """F1 over the classes that occur, from counts of hits, predictions and references; scikit-learn's arithmetic."""

    def compute(predictions: Sequence[str], references: References) -> Statistic:
        truth = [refs[0] for refs in references]
        classes = sorted({*truth, *predictions})
        place = {name: index for index, name in enumerate(classes)}
        rows = np.zeros((len(truth), 3 * len(classes)))
        for row, (predicted, right) in enumerate(zip(predictions, truth, strict=True)):
            rows[row, place[right]] = predicted == right
            rows[row, len(classes) + place[predicted]] = 1
            rows[row, 2 * len(classes) + place[right]] = 1
        return Statistic(rows, value_of, {"classes": len(classes)})

    def value_of(sums: Array) -> Array:
        hits, predicted, real = np.split(sums, 3, axis=-1)
        present = (predicted + real) > 0  # a class that a resample lost is no class of it
        score = np.divide(2 * hits, predicted + real, out=np.zeros_like(hits), where=present)
        weights = real if average == "weighted" else present.astype(np.float64)
        return (score * weights).sum(-1) / weights.sum(-1)

    return compute


# --- likelihood ---


def loss_of(sums: Array) -> Array:
    """Mean negative log-likelihood in nats; rows are (sum, tokens)."""
    return sums[..., 0] / sums[..., 1]


def perplexity_of(sums: Array) -> Array:
    """exp of `loss_of`: weighted by tokens, not the mean of rows."""
    with np.errstate(over="ignore"):  # `finite` reports it
        return np.exp(loss_of(sums))


def _not_from_text(predictions: Sequence[str], references: References) -> Statistic:
    raise IngotError("perplexity, loss and what a model points out do not come from written answers")


def _no_labels(references: References) -> str | None:
    return "no row has a label" if all(json.loads(text) == [] for texts in references for text in texts) else None


# --- the table ---

_JSON_EXACT = by_leaves(lambda found, wanted: float(found == wanted))
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", "answer equals the reference, blanks around it aside", exact_match),
        Metric("bleu", "corpus BLEU, 0 to 100", bleu, _bleu_undefined, unit_interval=False, decimals=1),
        Metric("chrf", "character n-gram F, 0 to 100", chrf, _chrf_undefined, unit_interval=False, decimals=1),
        Metric("rouge1", "unigram F1", rouge("rouge1"), _rouge_undefined),
        Metric("rouge2", "bigram F1", rouge("rouge2"), _rouge_undefined),
        Metric("rougeL", "longest common subsequence F1", rouge("rougeL"), _rouge_undefined),
        Metric("rougeLsum", "longest common subsequence F1 by lines", rouge("rougeLsum"), _rouge_undefined),
        Metric("json_valid", "answer is a JSON object", json_valid),
        Metric("json_exact_match", "answer is the reference's JSON object", _JSON_EXACT, _json_undefined),
        Metric("json_argument_f1", "F1 of the JSON's leaves", by_leaves(leaf_f1), _json_undefined),
        Metric("accuracy", "share of right classes", accuracy),
        Metric("f1_macro", "F1, classes weighted equally", f1("macro")),
        Metric("f1_weighted", "F1, classes weighted by frequency", f1("weighted")),
        Metric(
            "perplexity",
            "exp of the mean loss per token",
            _not_from_text,
            higher_is_better=False,
            unit_interval=False,
            decimals=2,
        ),
        Metric("loss", "mean loss per token in nats", _not_from_text, higher_is_better=False, unit_interval=False),
        Metric("f1_micro", "F1 of all labels together", _not_from_text, _no_labels),
        Metric("subset_accuracy", "share of rows whose labels are all right", _not_from_text),
        Metric("entity_f1", "F1 of entities, words and type right", _not_from_text, entities_undefined),
        Metric("entity_precision", "share of predicted entities that are real", _not_from_text, entities_undefined),
        Metric("entity_recall", "share of real entities that are found", _not_from_text, entities_undefined),
        Metric("token_accuracy", "share of words with the right tag", _not_from_text),
        Metric("squad_exact_match", "answer is a right one, but for case, articles and punctuation", _not_from_text),
        Metric("squad_f1", "F1 of the answer's words, best right answer", _not_from_text),
        Metric("masked_accuracy", "share of hidden tokens that are told", _not_from_text),
        Metric("preference_accuracy", "share of pairs whose preferred answer comes out ahead", _not_from_text),
        Metric(
            "preference_margin",
            "mean lead of the preferred answer: log-probability in nats, or score",
            _not_from_text,
            unit_interval=False,
            decimals=2,
        ),
    )
}
CLASS_METRICS = ("accuracy", "f1_macro", "f1_weighted")
LIKELIHOOD_METRICS = ("perplexity", "loss")
PREFERENCE_METRICS = ("preference_accuracy", "preference_margin")
ENTITY_METRICS = ("entity_f1", "entity_precision", "entity_recall")
POINTING_METRICS: dict[str, tuple[str, ...]] = {
    "multi-label-classification": ("f1_micro", "f1_macro", "subset_accuracy"),
    "token-classification": (*ENTITY_METRICS, "token_accuracy"),
    "question-answering": ("squad_exact_match", "squad_f1"),
    "fill-mask": ("masked_accuracy", "perplexity"),
}
_OTHERS = {*CLASS_METRICS, *LIKELIHOOD_METRICS, *PREFERENCE_METRICS}.union(*POINTING_METRICS.values())
TEXT_METRICS = tuple(name for name in METRICS if name not in _OTHERS)
OF_TASK: dict[str, tuple[str, ...]] = {
    "chat-completion": TEXT_METRICS,
    "text-generation": TEXT_METRICS,
    "summarization": TEXT_METRICS,
    "translation": TEXT_METRICS,
    "text-classification": CLASS_METRICS,
    "language-modeling": LIKELIHOOD_METRICS,
    "preference": PREFERENCE_METRICS,
    **POINTING_METRICS,
}


def metric_names(section: Evaluate, task: str, references: References) -> list[str]:
    """The recipe's metrics, or those of `task` (`objective.rows`).

    Raises RecipeError for a name that is unknown or not of this task, and for a metric that is undefined on
    `references`.
    """
    for name in section.metrics or ():
        if name not in METRICS:
            raise RecipeError("evaluate.metrics", name, nearest(name, METRICS))
        if name not in OF_TASK[task]:
            raise RecipeError("evaluate.metrics", name, f"{task} has {', '.join(OF_TASK[task])}")
    names = list(section.metrics or _defaults(task, references))
    for name in names:
        if reason := METRICS[name].undefined(references):
            raise RecipeError("evaluate.metrics", name, f"it is undefined on the test rows: {reason}")
    return names


def _defaults(task: str, references: References) -> tuple[str, ...]:
    if task == "chat-completion":
        objects = _json_undefined(references) is None
        return ("json_exact_match", "json_argument_f1", "json_valid") if objects else ("exact_match",)
    if task == "token-classification":
        return ("token_accuracy",) if entities_undefined(references) else ENTITY_METRICS
    own: dict[str, tuple[str, ...]] = {
        **POINTING_METRICS,
        "text-generation": ("bleu", "rougeL"),
        "summarization": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
        "translation": ("bleu", "chrf"),
        "text-classification": ("accuracy", "f1_macro"),
        "language-modeling": ("perplexity",),
        "preference": PREFERENCE_METRICS,
    }
    return own[task]


def finite(value: float, name: str) -> float:
    """`value`, or an error when a metric came out as no number."""
    if not math.isfinite(value):
        raise IngotError(f"{name} came out as {value}: the model's likelihoods are not finite")
    return value
