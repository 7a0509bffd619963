"""A model on the test rows -> an `Evaluation`: generate, classify or score, then hand over to the metrics.

B rows, T tokens, V vocabulary, C classes.
"""

import random
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from ingot.data.example import Example
from ingot.data.loader import IGNORE, collate, microbatches
from ingot.data.template import Encoded, encode_all, prompt_ids, prompt_text, reference_text
from ingot.errors import DataError, RecipeError
from ingot.evaluation.runner import Evaluation, Item, evaluate_likelihoods, evaluate_texts, merge_items
from ingot.model.generate import context_limit, generate
from ingot.model.load import Tokenizer, logits_of, pad_id
from ingot.model.pooling import class_probabilities
from ingot.recipe import Recipe
from ingot.registry import resolve

Row = TypeVar("Row")
Tick = Callable[[int], None]
# Kind of rows -> (name, model, tokenizer, examples, labels, recipe, tick, started) -> Evaluation; the others are below.
MEASURES: dict[str, str] = {
    "summarization": "ingot.evaluation.targets:measure_targets",
    "translation": "ingot.evaluation.targets:measure_targets",
    "preference": "ingot.evaluation.preferences:measure_preferences",
    "multi-label-classification": "ingot.evaluation.pointing:measure_label_sets",
    "token-classification": "ingot.evaluation.pointing:measure_tags",
    "question-answering": "ingot.evaluation.pointing:measure_answers",
    "fill-mask": "ingot.evaluation.pointing:measure_masked",
}


def choose(examples: Sequence[Row], recipe: Recipe) -> list[Row]:
    """All test rows, or `evaluate.max_rows` of them drawn with `data.split_seed` (in their own order)."""
    limit = recipe.evaluate.max_rows
    if limit is None or limit >= len(examples):
        return list(examples)
    return [examples[i] for i in sorted(random.Random(recipe.data.split_seed).sample(range(len(examples)), limit))]


def make_items(examples: Sequence[Example], tokenizer: Tokenizer, recipe: Recipe, context: int | None) -> list[Item]:
    """Test rows -> what is asked and what should come back. A prompt without room for the answer is a DataError."""
    generating = recipe.objective.task in ("chat-completion", "text-generation")
    items = []
    for example in examples:
        ids = prompt_ids(example, tokenizer, recipe.data, recipe.objective) if generating else None
        check_room(None if ids is None else len(ids), example.where, recipe, context)
        items.append(Item(example.where, prompt_text(example), ids, [reference_text(example)]))
    return merge_items(items) if recipe.evaluate.merge_references else items


def check_room(n_prompt: int | None, where: str, recipe: Recipe, context: int | None) -> None:
    """Raise DataError when a prompt of `n_prompt` tokens (None: none is asked) leaves no room for the answer."""
    room = (context or 1 << 60) - recipe.evaluate.max_new_tokens
    if n_prompt is not None and n_prompt > room:
        raise DataError(
            "evaluate.max_new_tokens",
            recipe.evaluate.max_new_tokens,
            f"the prompt has {n_prompt} tokens and the model's context {context}; lower it, or shorten the row",
            where=where,
        )


@torch.no_grad()
def measure(
    name: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    labels: tuple[str, ...],
    recipe: Recipe,
    tick: Tick = lambda n: None,
) -> Evaluation:
    """Measure `model` on `examples` (all of them: see `choose`); `tick(n)` is called as rows are finished."""
    model.eval()
    started = time.perf_counter()
    task = recipe.objective.task
    if recipe.objective.rows in MEASURES:
        own = resolve(MEASURES, "objective.task", recipe.objective.rows)
        found: Evaluation = own(name, model, tokenizer, examples, labels, recipe, tick, started)
        return found
    items = make_items(examples, tokenizer, recipe, context_limit(model))
    if task == "text-classification":
        rows = [row.ids for row in encoded_rows(tokenizer, examples, labels, recipe)]
        probabilities = class_probabilities(model, rows, pad_id(tokenizer), recipe.evaluate.tokens_per_batch, tick)
        chosen = [labels[max(range(len(row)), key=row.__getitem__)] for row in probabilities]
        return evaluate_texts(name, items, chosen, recipe.evaluate, task, started)
    if task == "language-modeling":
        sums, counts = _row_losses(model, tokenizer, examples, recipe, tick)
        return evaluate_likelihoods(name, items, sums, counts, recipe.evaluate, started)
    answers = generate(
        model,
        tokenizer,
        [item.prompt_ids or [] for item in items],
        max_new_tokens=recipe.evaluate.max_new_tokens,
        tokens_per_batch=recipe.evaluate.tokens_per_batch,
        progress=tick,
    )
    return evaluate_texts(name, items, [answer.text.strip() for answer in answers], recipe.evaluate, task, started)


def encoded_rows(
    tokenizer: Tokenizer, examples: Sequence[Example], labels: tuple[str, ...], recipe: Recipe
) -> list[Encoded]:
    """Test rows, encoded. Raises RecipeError when one loses what it is measured on."""
    rows, dropped = encode_all(examples, tokenizer, recipe.data, recipe.objective, labels)
    if len(rows) != len(examples):
        raise RecipeError(
            "data.max_tokens",
            recipe.data.max_tokens,
            f"{len(examples) - len(rows)} test rows do not fit ({dropped.as_dict()}); raise it",
        )
    return rows


def row_batches(rows: Sequence[Encoded], tokens: int) -> list[list[int]]:
    """Places of the rows of each padded batch of at most `tokens` tokens, long rows first."""
    lengths = [len(row.ids) for row in rows]
    return microbatches([[index] for index in range(len(rows))], lengths, 0, 1, max(tokens, max(lengths)), flat=False)


def _row_losses(
    model: nn.Module, tokenizer: Tokenizer, examples: Sequence[Example], recipe: Recipe, tick: Tick
) -> tuple[list[float], list[int]]:
    """Summed negative log-likelihood in nats, and number of predicted tokens, of each row."""
    rows = encoded_rows(tokenizer, examples, (), recipe)
    device = next(model.parameters()).device
    sums, counts = [0.0] * len(rows), [0] * len(rows)
    for part in row_batches(rows, recipe.evaluate.tokens_per_batch):
        batch = collate([rows[i] for i in part], pad_id(tokenizer))
        assert batch.attention_BT is not None
        logits_BTV = logits_of(
            model(input_ids=batch.ids_BT.to(device), attention_mask=batch.attention_BT.to(device), use_cache=False)
        )
        targets_BT = F.pad(batch.labels_BT[:, 1:], (0, 1), value=IGNORE).to(device)
        nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, ignore_index=IGNORE, reduction="none")
        for place, index in enumerate(part):
            sums[index] = nll_BT[place].sum().item()
            counts[index] = int((targets_BT[place] != IGNORE).sum())
        tick(len(part))
    return sums, counts
