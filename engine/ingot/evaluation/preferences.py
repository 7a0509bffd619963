"""Pairs of answers -> an `Evaluation`: does the preferred one come out ahead, and by how much.

P pairs, B = 2P sequences, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ingot.data.example import Example
from ingot.data.loader import IGNORE, Batch
from ingot.data.pairs import pairs
from ingot.data.preference import Preference
from ingot.data.template import prompt_text, reference_text
from ingot.errors import DataError
from ingot.evaluation.measure import encoded_rows, row_batches
from ingot.evaluation.metrics import metric_names, row_mean
from ingot.evaluation.runner import Evaluation, Item, evaluate_statistics
from ingot.model.load import Tokenizer, logits_of, pad_id
from ingot.recipe import Recipe


def measure_preferences(
    name: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    labels: tuple[str, ...],
    recipe: Recipe,
    tick: Callable[[int], None],
    started: float,
) -> Evaluation:
    """Log-probability of each answer given its prompt (summed over its tokens, in nats), of a reward model the score.

    A draw is no win. The prediction of a row is the answer that the model holds for better.
    """
    found = [example for example in examples if isinstance(example, Preference)]
    if len(found) != len(examples):
        raise DataError("data.test", len(examples) - len(found), "rows are no pairs of answers")
    rows = encoded_rows(tokenizer, examples, labels, recipe)
    values_P2 = np.zeros((len(rows), 2))
    filler = getattr(
        model.config, "pad_token_id", None
    )  # by this id, not the tokenizer's, decoders find the last token
    filler = pad_id(tokenizer) if filler is None else int(filler)  # type: ignore[arg-type]
    held = _scores if recipe.objective.task == "reward" else _logps
    for part in row_batches(rows, recipe.evaluate.tokens_per_batch):
        values_P2[part] = held(model, pairs([rows[index] for index in part], filler)).cpu().numpy()
        tick(len(part))
    margins = (values_P2[:, 0] - values_P2[:, 1]).tolist()
    statistics = {
        "preference_accuracy": row_mean([float(margin > 0) for margin in margins]),
        "preference_margin": row_mean(margins),
    }
    items = [Item(row.where, prompt_text(row), None, [reference_text(row)]) for row in found]
    better = [row.chosen if margin > 0 else row.rejected for row, margin in zip(found, margins, strict=True)]
    wanted = metric_names(recipe.evaluate, "preference", [item.references for item in items])
    return evaluate_statistics(
        name,
        items,
        [reference_text(answer) for answer in better],
        {metric: statistics[metric] for metric in wanted},
        recipe.evaluate,
        started,
    )


def _scores(model: nn.Module, batch: Batch) -> Tensor:
    """A reward model's scores [P, 2]."""
    return logits_of(model(**_inputs(model, batch))).view(-1, 2)


def _logps(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities of the answers [P, 2]."""
    logits_BTV = logits_of(model(**_inputs(model, batch), use_cache=False))
    targets_BT = F.pad(batch.labels_BT[:, 1:], (0, 1), value=IGNORE).to(logits_BTV.device)
    nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, ignore_index=IGNORE, reduction="none")
    return -nll_BT.sum(1).view(-1, 2)


def _inputs(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    assert batch.attention_BT is not None
    return {"input_ids": batch.ids_BT.to(device), "attention_mask": batch.attention_BT.to(device)}
