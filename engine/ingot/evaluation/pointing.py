"""What a model points out in test rows -> an `Evaluation`: labels, words' tags, answers in a context, hidden tokens.

B rows, T tokens, V vocabulary.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ingot.data.encoded import Encoded
from ingot.data.example import Example
from ingot.data.labeled import Asked, MultiLabeled, Tagged
from ingot.data.labels import first_tokens
from ingot.data.loader import IGNORE, Batch, Drawn, collate
from ingot.data.masking import collate_masked, mask_of
from ingot.data.spans import Window, collate_asked, windows_of
from ingot.data.template import prompt_text, reference_text
from ingot.errors import DataError
from ingot.evaluation.answers import best_spans, exact, log_shares, word_f1
from ingot.evaluation.entities import (
    OUTSIDE,
    entity_counts,
    f1_of,
    precision_of,
    ratio,
    recall_of,
    share_of,
    tag_counts,
)
from ingot.evaluation.measure import encoded_rows, row_batches
from ingot.evaluation.metrics import Array, Statistic, metric_names, perplexity_of, row_mean
from ingot.evaluation.runner import Evaluation, Item, evaluate_statistics
from ingot.model.load import Tokenizer, knows_segments, logits_of, pad_id
from ingot.model.pooling import class_probabilities
from ingot.recipe import Recipe

Kind = TypeVar("Kind")
Tick = Callable[[int], None]
Compute = dict[str, Callable[[], Statistic]]  # metric -> what computes it


def measure_label_sets(
    name: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    labels: tuple[str, ...],
    recipe: Recipe,
    tick: Tick,
    started: float,
) -> Evaluation:
    """A row's labels are those whose probability is 0.5 or more, each by itself."""
    rows = _only(MultiLabeled, examples)
    ids = [row.ids for row in encoded_rows(tokenizer, examples, labels, recipe)]
    shares = class_probabilities(model, ids, pad_id(tokenizer), recipe.evaluate.tokens_per_batch, tick)
    predicted_NC = np.asarray(shares) >= 0.5
    real_NC = np.asarray([[label in row.labels for label in labels] for row in rows])
    answers = [[labels[place] for place in np.flatnonzero(row)] for row in predicted_NC]
    counts = np.concatenate([predicted_NC & real_NC, predicted_NC, real_NC], axis=1).astype(np.float64)
    compute: Compute = {
        "f1_micro": lambda: Statistic(counts, _micro),
        "f1_macro": lambda: Statistic(counts, _macro),
        "subset_accuracy": lambda: row_mean((predicted_NC == real_NC).all(1).astype(float).tolist()),
    }
    texts = [json.dumps(answer, ensure_ascii=False) for answer in answers]
    return _evaluation(name, _items(rows), texts, compute, recipe, started)


def _micro(sums: Array) -> Array:
    hits, predicted, real = (part.sum(-1) for part in np.split(sums, 3, axis=-1))
    return f1_of(np.stack([hits, predicted, real], axis=-1))


def _macro(sums: Array) -> Array:
    """Mean over the classes that occur, as `f1_macro` of single classes has it."""
    hits, predicted, real = np.split(sums, 3, axis=-1)
    each = f1_of(np.stack([hits, predicted, real], axis=-1))
    present = (predicted + real > 0).sum(-1)
    return ratio(np.stack([each.sum(-1), present], axis=-1), 0, 1)


@torch.no_grad()
def measure_tags(
    name: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    labels: tuple[str, ...],
    recipe: Recipe,
    tick: Tick,
    started: float,
) -> Evaluation:
    """The likeliest tag at each word's first token. A word that was cut off is outside of everything."""
    rows = _only(Tagged, examples)
    found = first_tokens(rows, tokenizer, recipe.data)
    missing = OUTSIDE if OUTSIDE in labels else labels[0]
    predicted: list[list[str]] = [[] for _ in rows]
    encoded = [Encoded(ids, [False] * len(ids), None, "") for ids, _, _ in found]
    for part in row_batches(encoded, recipe.evaluate.tokens_per_batch):
        batch = collate([encoded[index] for index in part], pad_id(tokenizer))
        best_BT = logits_of(model(**_inputs(model, batch))).argmax(-1).tolist()
        for index, best in zip(part, best_BT, strict=True):
            predicted[index] = [missing if place is None else labels[best[place]] for place in found[index][1]]
        tick(len(part))
    right = [row.tags for row in rows]
    compute: Compute = {
        "entity_f1": lambda: Statistic(entity_counts(predicted, right), f1_of),
        "entity_precision": lambda: Statistic(entity_counts(predicted, right), precision_of),
        "entity_recall": lambda: Statistic(entity_counts(predicted, right), recall_of),
        "token_accuracy": lambda: Statistic(tag_counts(predicted, right), share_of),
    }
    return _evaluation(name, _items(rows), [" ".join(tags) for tags in predicted], compute, recipe, started)


@torch.no_grad()
def measure_answers(
    name: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    labels: tuple[str, ...],
    recipe: Recipe,
    tick: Tick,
    started: float,
) -> Evaluation:
    """The likeliest stretch of at most `evaluate.max_new_tokens` tokens over all windows of a row.

    Where some test row has no answer, none is said when that is likelier in every window (Rajpurkar et al. 2018).
    """
    rows = _only(Asked, examples)
    found = _found(model, tokenizer, rows, recipe, tick)
    may_be_none = any(not row.answers for row in rows)
    texts = ["" if may_be_none and answer.nowhere > answer.score else answer.text for answer in found]
    items = [Item(row.where, prompt_text(row), None, [text for text, _ in row.answers] or [""]) for row in rows]
    pairs = list(zip(texts, (item.references for item in items), strict=True))
    compute: Compute = {
        "squad_exact_match": lambda: row_mean([exact(text, references) for text, references in pairs]),
        "squad_f1": lambda: row_mean([word_f1(text, references) for text, references in pairs]),
    }
    return _evaluation(name, items, texts, compute, recipe, started)


class _Found(NamedTuple):
    """An answer: its log-probability, and that of "not here" (the least of all windows)."""

    score: float = -math.inf
    text: str = ""
    nowhere: float = math.inf

    def or_else(self, other: "_Found") -> "_Found":
        better = other if other.score > self.score else self
        return better._replace(nowhere=min(self.nowhere, other.nowhere))


def _found(model: nn.Module, tokenizer: Tokenizer, rows: Sequence[Asked], recipe: Recipe, tick: Tick) -> list[_Found]:
    """The answer to each row."""
    windows = windows_of(rows, tokenizer, recipe.data)
    places = [(index, window) for index, found in enumerate(windows) for window in found]
    encoded = [Encoded(it.ids, [False] * len(it.ids), [it.nowhere] * 2, "", it.parts) for _, it in places]
    best = [_Found()] * len(rows)
    left = [len(found) for found in windows]
    tick(left.count(0))
    for part in row_batches(encoded, recipe.evaluate.tokens_per_batch) if encoded else []:
        batch = collate_asked([encoded[place] for place in part], pad_id(tokenizer))
        shown = [places[place] for place in part]
        answers = _in_batch(model, batch, [(rows[index].context, window) for index, window in shown], recipe)
        for (index, _), answer in zip(shown, answers, strict=True):
            best[index] = best[index].or_else(answer)
            left[index] -= 1
        tick(len({index for index, _ in shown if left[index] == 0}))
    return best


def _in_batch(model: nn.Module, batch: Batch, shown: Sequence[tuple[str, Window]], recipe: Recipe) -> list[_Found]:
    """The answer in each window of a batch. `shown`: their contexts and themselves."""
    inputs = _inputs(model, batch)
    logits_BT2 = logits_of(model(**inputs))
    row_BT = inputs["attention_mask"].bool()
    context_BT = torch.zeros_like(row_BT)
    for number, (_, window) in enumerate(shown):
        context_BT[number, : len(window.ids)] = torch.tensor([span is not None for span in window.spans])
    best = best_spans(logits_BT2, row_BT, context_BT, recipe.evaluate.max_new_tokens)
    scores, firsts, lasts = (found_B.tolist() for found_B in best)
    shares_BT2 = log_shares(logits_BT2, row_BT)
    answers = []
    for number, (context, window) in enumerate(shown):
        score, first, last = scores[number], firsts[number], lasts[number]
        begin, end = window.spans[first], window.spans[last]
        text = "" if begin is None or end is None else context[begin[0] : end[1]]
        answers.append(_Found(score, text, float(shares_BT2[number, window.nowhere].sum())))
    return answers


@torch.no_grad()
def measure_masked(
    name: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    labels: tuple[str, ...],
    recipe: Recipe,
    tick: Tick,
    started: float,
) -> Evaluation:
    """Hidden tokens, drawn once with `data.split_seed`: the same ones for every model."""
    rows = encoded_rows(tokenizer, examples, labels, recipe)
    drawn = Drawn(mask_of(tokenizer), len(tokenizer), f"{recipe.data.split_seed} evaluation")
    counts = np.zeros((len(rows), 3))  # hits, negative log-likelihood, hidden tokens
    for part in row_batches(rows, recipe.evaluate.tokens_per_batch):
        batch = collate_masked([rows[index] for index in part], pad_id(tokenizer), drawn=drawn)
        hidden_BT = batch.labels_BT != IGNORE
        row_K, wanted_K = hidden_BT.nonzero()[:, 0], batch.labels_BT[hidden_BT]
        logits_KV = model(**_inputs(model, batch)).logits[hidden_BT].float().cpu()
        nll_K = F.cross_entropy(logits_KV, wanted_K, reduction="none")
        found = torch.stack([(logits_KV.argmax(-1) == wanted_K).float(), nll_K, torch.ones_like(nll_K)], dim=1)
        counts[part] = torch.zeros(len(part), 3, dtype=torch.float64).index_add(0, row_K, found.double()).numpy()
        tick(len(part))
    compute: Compute = {
        "masked_accuracy": lambda: Statistic(counts[:, [0, 2]], share_of),
        "perplexity": lambda: Statistic(counts[:, 1:], perplexity_of),
    }
    return _evaluation(name, _items(examples), [""] * len(rows), compute, recipe, started)


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A padded batch as forward arguments, on the model's device."""
    assert batch.attention_BT is not None
    inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.attention_BT}
    if batch.types_BT is not None and knows_segments(model):
        inputs["token_type_ids"] = batch.types_BT
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _only(kind: type[Kind], examples: Sequence[Example]) -> list[Kind]:
    found: list[Kind] = [example for example in examples if isinstance(example, kind)]
    if len(found) != len(examples):
        raise DataError("data.test", len(examples) - len(found), f"rows are no {kind.__name__}")
    return found


def _items(rows: Sequence[Example]) -> list[Item]:
    return [Item(row.where, prompt_text(row), None, [reference_text(row)]) for row in rows]


def _evaluation(
    name: str, items: Sequence[Item], texts: Sequence[str], compute: Compute, recipe: Recipe, started: float
) -> Evaluation:
    """The metrics that the recipe asks for. `texts`: what people read as the model's answers."""
    wanted = metric_names(recipe.evaluate, recipe.objective.rows, [item.references for item in items])
    statistics = {metric: compute[metric]() for metric in wanted}
    return evaluate_statistics(name, items, texts, statistics, recipe.evaluate, started)
