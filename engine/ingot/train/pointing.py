"""Losses of what is pointed out in a text: its class, its labels, its words' tags, the answer's place, hidden tokens.

Each sums over its terms and divides once by the global count. B rows, T tokens, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ingot.data.loader import IGNORE, Batch
from ingot.data.plan import Divisor
from ingot.model.kinds import knows_segments, logits_of
from ingot.parallel.sharded import Sharded
from ingot.recipe import Objective
from ingot.train.forward import cross_entropy, inputs_of


def label(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """Cross-entropy of each row's class, summed and divided by their number."""
    assert batch.row_labels is not None
    output = sharded.forward(**inputs_of(batch, sharded))
    return _cross_entropy(logits_of(output), batch.row_labels.to(sharded.device), section) / divisor.targets


def label_set(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """Binary cross-entropy of every class in every row, summed and divided by their number.

    With label smoothing a class that is there counts as 1 - s/2, and one that is not as s/2: s of the mass is spread
    over both answers.
    """
    assert batch.row_labels is not None
    logits_BC = logits_of(sharded.forward(**inputs_of(batch, sharded)))
    labels_BC = batch.row_labels.to(sharded.device).view_as(logits_BC)
    counts_BC = labels_BC != IGNORE
    wanted_BC = labels_BC.clamp(min=0).float() * (1 - section.label_smoothing) + section.label_smoothing / 2
    losses_BC = F.binary_cross_entropy_with_logits(logits_BC, wanted_BC, reduction="none")
    return (losses_BC * counts_BC).sum() / divisor.targets


def tokens(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """Cross-entropy of what `labels_BT` holds at a token itself, a tag or the token that was hidden, summed and divided
    by their number.
    """
    labels_BT = sharded.layout.cut(batch.labels_BT)
    loss = cross_entropy(sharded, inputs_of(batch, sharded), labels_BT, section.label_smoothing)
    return loss / divisor.targets


def span(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """Cross-entropy of the answer's first token and of its last, each among the row's tokens (Devlin et al. 2019,
    section 4.2), summed and divided by their number: two a row.

    transformers' own heads let padding compete with a row's tokens, so that their loss changes with the rows beside it.
    Here it does not: the loss is theirs of each row alone.
    """
    assert batch.row_labels is not None and batch.attention_BT is not None
    inputs = inputs_of(batch, sharded)
    if batch.types_BT is not None and knows_segments(sharded.plain):
        inputs["token_type_ids"] = batch.types_BT.to(sharded.device)
    logits_BT2 = logits_of(sharded.forward(**inputs))
    padding_BT1 = (inputs["attention_mask"] == 0).unsqueeze(-1)
    logits_BT2 = logits_BT2.masked_fill(padding_BT1, torch.finfo(torch.float32).min)
    labels_B2 = batch.row_labels.to(sharded.device)
    if not section.label_smoothing:
        loss = F.cross_entropy(logits_BT2, labels_B2, ignore_index=IGNORE, reduction="sum")
        return loss / divisor.targets
    log_shares_BT2 = logits_BT2.log_softmax(1).masked_fill(padding_BT1, 0.0)
    counts_B2 = labels_B2 != IGNORE
    right_B2 = log_shares_BT2.gather(1, labels_B2.clamp(min=0).unsqueeze(1)).squeeze(1)
    even_B2 = log_shares_BT2.sum(1) / (~padding_BT1).sum(1)
    mixed_B2 = (1 - section.label_smoothing) * right_B2 + section.label_smoothing * even_B2
    return -(mixed_B2 * counts_B2).sum() / divisor.targets


def _cross_entropy(logits_KC: Tensor, classes_K: Tensor, section: Objective) -> Tensor:
    """Summed over the classes that are not IGNORE."""
    smoothing = section.label_smoothing
    return F.cross_entropy(logits_KC, classes_K, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
