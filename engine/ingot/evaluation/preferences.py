"""Pairs of answers: does the preferred one come out ahead, and by how much.

P pairs, B = 2P sequences, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ingot.data.loader import Batch
from ingot.data.pairs import pairs
from ingot.data.template import reference_text
from ingot.evaluation.measure import How, Kind, encoded_rows, row_batches
from ingot.evaluation.metrics import row_mean
from ingot.evaluation.samples import Item, Output
from ingot.evaluation.subject import Local
from ingot.evaluation.task import Compute
from ingot.model.kinds import logits_of, pad_id
from ingot.model.projection import target_nll


@torch.no_grad()
def _answer_pairs(local: Local, items: Sequence[Item], how: How) -> list[Output]:
    """Log-probability of each answer given its prompt (summed over its tokens, in nats); a reward model's scores."""
    model, recipe = local.model, how.recipe
    rows = encoded_rows(local.tokenizer, [item.request for item in items], (), recipe)
    # By this id, not the tokenizer's, decoders find the last token.
    filler: Any = getattr(model.config, "pad_token_id", None)
    filler = pad_id(local.tokenizer) if filler is None else int(filler)
    held = _scores if recipe.objective.task == "reward" else _logps
    outputs: list[Output] = [{} for _ in rows]
    for part in row_batches(rows, recipe.evaluate.tokens_per_batch):
        values_P2 = held(model, pairs([rows[index] for index in part], filler)).tolist()
        for index, (chosen, rejected) in zip(part, values_P2, strict=True):
            outputs[index] = {"chosen": chosen, "rejected": rejected}
    return outputs


def _read_pairs(items: Sequence[Item], outputs: Sequence[Output], how: How) -> tuple[Sequence[str], Compute]:
    """A draw is no win. The prediction of a row is the answer that the model holds for better."""
    margins = [output["chosen"] - output["rejected"] for output in outputs]
    better = [
        reference_text(item.request.chosen if margin > 0 else item.request.rejected)
        for item, margin in zip(items, margins, strict=True)
    ]
    return better, {
        "preference_accuracy": lambda: row_mean([float(margin > 0) for margin in margins]),
        "preference_margin": lambda: row_mean(margins),
    }


PREFERENCES = Kind(_answer_pairs, _read_pairs)


def _scores(model: nn.Module, batch: Batch) -> Tensor:
    """A reward model's scores [P, 2]."""
    return logits_of(model(**_inputs(model, batch))).view(-1, 2)


def _logps(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities of the answers [P, 2]."""
    inputs = _inputs(model, batch)
    return -target_nll(model, inputs["input_ids"], inputs["attention_mask"], batch.labels_BT).view(-1, 2)


def _inputs(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    assert batch.attention_BT is not None
    return {"input_ids": batch.ids_BT.to(device), "attention_mask": batch.attention_BT.to(device)}
