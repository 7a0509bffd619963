"""Objectives: (sharded model, batch, divisor, section) -> loss. Each sums over its targets and divides ONCE by the
global count.

B rows, T tokens, K positions kept, V vocabulary, C classes.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ingot.data.loader import IGNORE, Batch, Collate, collate
from ingot.data.plan import Divisor
from ingot.model.load import logits_of
from ingot.parallel.sharded import Sharded
from ingot.recipe import Objective
from ingot.train.forward import inputs_of, keeps_positions

Loss = Callable[[Sharded, Batch, Divisor, Objective], Tensor]


def next_token(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """Cross-entropy of the trainable tokens given what stands before them, summed and divided by their number."""
    device, cut = sharded.device, sharded.layout.cut
    # Position t predicts token t+1. Shifted before ranks of a context group each take their part of the line.
    targets_BT = cut(F.pad(batch.labels_BT[:, 1:], (0, 1), value=IGNORE))
    extra = {}
    if keeps_positions(sharded.plain):
        # Only positions that predict a target in some row go through the head: on chat data that is a third of the
        # work of small-vocabulary models and most of the memory of large ones. Found on the CPU, where it costs no
        # synchronization.
        kept_K = (targets_BT != IGNORE).any(0).nonzero().squeeze(1)
        targets_BT = targets_BT[:, kept_K]
        extra["logits_to_keep"] = kept_K.to(device)
    output = sharded.forward(**inputs_of(batch, sharded), use_cache=False, **extra)
    logits_BKV = logits_of(output)
    loss = F.cross_entropy(
        logits_BKV.flatten(0, 1),
        targets_BT.flatten().to(device),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=section.label_smoothing,
    )
    return loss / divisor.targets


def label(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """Cross-entropy of each row's class, summed and divided by their number."""
    assert batch.row_labels is not None
    output = sharded.forward(**inputs_of(batch, sharded))
    loss = F.cross_entropy(
        logits_of(output),
        batch.row_labels.to(sharded.device),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=section.label_smoothing,
    )
    return loss / divisor.targets


OBJECTIVES: dict[str, Loss] = {
    "chat-completion": next_token,
    "text-generation": next_token,
    "language-modeling": next_token,
    "text-classification": label,
}
# How rows become a batch, where it is not `collate`.
COLLATORS: dict[str, Collate] = {}


def collator_of(section: Objective) -> Collate:
    """How the objective's rows become a batch."""
    return COLLATORS.get(section.loss, collate)
