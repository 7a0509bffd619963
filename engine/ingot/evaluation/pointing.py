"""What a model points out in test rows: labels, words' tags, answers in a context, hidden tokens.

N rows in all, C classes, K hidden tokens of a row, V vocabulary.
"""

import json
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from ingot.data.labeled import Asked, MultiLabeled, Tagged
from ingot.data.loader import IGNORE, Drawn
from ingot.data.masking import hide, mask_of
from ingot.errors import DataError
from ingot.evaluation.class_metrics import statistics_of_label_sets
from ingot.evaluation.entities import statistics_of_tags
from ingot.evaluation.likelihood_metrics import perplexity_of
from ingot.evaluation.measure import How, Kind, encoded_rows
from ingot.evaluation.samples import Item, Output
from ingot.evaluation.statistic import Statistic, share_of
from ingot.evaluation.subject import Local
from ingot.evaluation.task import Compute
from ingot.evaluation.vocabulary import METRICS, SQUAD
from ingot.model.inputs import first_tokens, spans_of, windows_of
from ingot.model.kinds import pad_id
from ingot.model.pointing import answers_in, logits_at, outside_of, tags_at
from ingot.model.pooling import class_probabilities
from ingot.model.task_schemas import TASKS

Row = TypeVar("Row")
THRESHOLD = TASKS["multi-label-classification"].param("threshold").default


def _answer_label_sets(local: Local, items: Sequence[Item], how: How) -> list[Output]:
    encoded = encoded_rows(local.tokenizer, _only(MultiLabeled, items), how.labels, how.recipe)
    ids = [row.ids for row in encoded]
    shares = class_probabilities(local.model, ids, pad_id(local.tokenizer), how.recipe.evaluate.tokens_per_batch)
    return [{"probabilities": row, "n_prompt_tokens": len(it)} for row, it in zip(shares, ids, strict=True)]


def _read_label_sets(items: Sequence[Item], outputs: Sequence[Output], how: How) -> tuple[Sequence[str], Compute]:
    """A row's labels are those whose probability is 0.5 or more, each by itself."""
    shares_NC = np.asarray([output["probabilities"] for output in outputs])
    wanted = [json.loads(item.references[0]) for item in items]
    answers = [[how.labels[place] for place in np.flatnonzero(row >= THRESHOLD)] for row in shares_NC]
    texts = [json.dumps(answer, ensure_ascii=False) for answer in answers]
    return texts, statistics_of_label_sets(shares_NC, wanted, how.labels, THRESHOLD)


LABEL_SETS = Kind(_answer_label_sets, _read_label_sets)


@torch.no_grad()
def _answer_tags(local: Local, items: Sequence[Item], how: How) -> list[Output]:
    """The likeliest tag at each word's first token. A word that was cut off is outside of everything."""
    recipe, rows = how.recipe, _only(Tagged, items)
    spans = [spans_of(row.words) for row in rows]
    found = first_tokens([row.text for row in rows], spans, local.tokenizer, recipe.data.max_tokens)
    ids, places = [row[0] for row in found], [row[1] for row in found]
    best = tags_at(local.model, ids, places, pad_id(local.tokenizer), recipe.evaluate.tokens_per_batch)
    missing = outside_of(how.labels)
    return [
        {"tags": [missing if tag is None else how.labels[tag[0]] for tag in row], "n_prompt_tokens": len(it)}
        for row, it in zip(best, ids, strict=True)
    ]


def _read_tags(items: Sequence[Item], outputs: Sequence[Output], how: How) -> tuple[Sequence[str], Compute]:
    predicted = [output["tags"] for output in outputs]
    right = [item.references[0].split(" ") for item in items]
    return [" ".join(tags) for tags in predicted], statistics_of_tags(predicted, right)


TAGS = Kind(_answer_tags, _read_tags)


@torch.no_grad()
def _answer_questions(local: Local, items: Sequence[Item], how: How) -> list[Output]:
    """The likeliest stretch of at most `evaluate.max_new_tokens` tokens over all windows of a row."""
    data, section, rows = how.recipe.data, how.recipe.evaluate, _only(Asked, items)
    asked = [(row.question, row.context) for row in rows]
    windows = windows_of(asked, local.tokenizer, data.max_tokens, data.overlap_tokens)
    pad = pad_id(local.tokenizer)
    found = answers_in(local.model, windows, section.max_new_tokens, pad, section.tokens_per_batch)
    return [
        {"score": it.score, "text": row.context[it.start : it.end], "nowhere": it.nowhere}
        for row, it in zip(rows, found, strict=True)
    ]


def _read_questions(items: Sequence[Item], outputs: Sequence[Output], how: How) -> tuple[Sequence[str], Compute]:
    """Where some test row has no answer, none is said when that is likelier in every window (Rajpurkar et al. 2018)."""
    may_be_none = any(item.references == [""] for item in items)
    texts = ["" if may_be_none and it["nowhere"] > it["score"] else str(it["text"]) for it in outputs]
    references = [item.references for item in items]
    return texts, {name: partial(METRICS[name].compute, texts, references) for name in SQUAD}


ANSWERS = Kind(_answer_questions, _read_questions)


@torch.no_grad()
def _answer_masked(local: Local, items: Sequence[Item], how: How) -> list[Output]:
    """Hidden tokens, drawn once with `data.split_seed`: the same ones for every model."""
    recipe, tokenizer = how.recipe, local.tokenizer
    rows = encoded_rows(tokenizer, [item.request for item in items], (), recipe)
    drawn = Drawn(mask_of(tokenizer), len(tokenizer), f"{recipe.data.split_seed} evaluation")
    hidden = [hide(row, drawn) for row in rows]
    places = [[place for place, label in enumerate(labels) if label != IGNORE] for _, labels in hidden]
    counts = [[0.0] * 3 for _ in rows]  # hits, negative log-likelihood, hidden tokens
    ids, tokens = [row for row, _ in hidden], recipe.evaluate.tokens_per_batch
    for index, logits_KV in logits_at(local.model, ids, places, pad_id(tokenizer), tokens):
        wanted_K = torch.tensor([hidden[index][1][place] for place in places[index]], dtype=torch.long)
        hits = int((logits_KV.argmax(-1) == wanted_K).sum())
        nll = float(F.cross_entropy(logits_KV, wanted_K, reduction="none").double().sum())
        counts[index] = [hits, nll, len(wanted_K)]
    return [dict(zip(("hits", "nll", "hidden"), row, strict=True)) for row in counts]


def _read_masked(items: Sequence[Item], outputs: Sequence[Output], how: How) -> tuple[Sequence[str], Compute]:
    counts = np.asarray([[it["hits"], it["nll"], it["hidden"]] for it in outputs], dtype=np.float64)
    return [""] * len(outputs), {
        "masked_accuracy": lambda: Statistic(counts[:, [0, 2]], share_of),
        "perplexity": lambda: Statistic(counts[:, 1:], perplexity_of),
    }


MASKED = Kind(_answer_masked, _read_masked)


def _only(kind: type[Row], items: Sequence[Item]) -> list[Row]:
    found: list[Row] = [item.request for item in items if isinstance(item.request, kind)]
    if len(found) != len(items):
        raise DataError("data.test", len(items) - len(found), f"rows are no {kind.__name__}")
    return found
