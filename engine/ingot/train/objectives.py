"""Objectives: (sharded model, batch, divisor, section) -> loss. Each sums over its targets and divides ONCE by the
global count.

B rows, T tokens, K positions kept, V vocabulary, C classes.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ingot.data.loader import IGNORE, Batch
from ingot.model.attention import Documents
from ingot.model.load import logits_of
from ingot.parallel.context import exchange_of
from ingot.parallel.sharded import Sharded
from ingot.recipe import Objective

Loss = Callable[[Sharded, Batch, int, Objective], Tensor]


def next_token(sharded: Sharded, batch: Batch, divisor: int, section: Objective) -> Tensor:
    """Cross-entropy of the trainable tokens given what stands before them, summed and divided by `divisor`."""
    device, cut = sharded.device, sharded.layout.cut
    # Position t predicts token t+1. Shifted before ranks of a context group each take their part of the line.
    targets_BT = cut(F.pad(batch.labels_BT[:, 1:], (0, 1), value=IGNORE))
    extra = {}
    if _keeps_positions(sharded.plain):
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
    return loss / divisor


def label(sharded: Sharded, batch: Batch, divisor: int, section: Objective) -> Tensor:
    """Cross-entropy of each row's class, summed and divided by `divisor`."""
    assert batch.class_labels_B is not None
    output = sharded.forward(**inputs_of(batch, sharded))
    loss = F.cross_entropy(
        logits_of(output),
        batch.class_labels_B.to(sharded.device),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=section.label_smoothing,
    )
    return loss / divisor


def inputs_of(batch: Batch, sharded: Sharded) -> dict[str, Any]:
    """What forward is called with: this rank's part of the batch, on its device."""
    device, cut = sharded.device, sharded.layout.cut
    if batch.row_lengths is None:
        assert batch.attention_BT is not None
        return {"input_ids": batch.ids_BT.to(device), "attention_mask": batch.attention_BT.to(device)}
    assert batch.positions_BT is not None
    documents = Documents.of(batch.row_lengths, device, exchange_of(sharded.layout))
    return {
        "input_ids": cut(batch.ids_BT).to(device),
        "attention_mask": documents.mask,
        "position_ids": cut(batch.positions_BT).to(device),
        "documents": documents,
    }


OBJECTIVES: dict[str, Loss] = {
    "chat-completion": next_token,
    "text-generation": next_token,
    "language-modeling": next_token,
    "text-classification": label,
}


def _keeps_positions(model: nn.Module) -> bool:
    unwrap: Any = getattr(model, "get_base_model", lambda: model)  # peft's wrapper takes anything and hides the names
    base = unwrap()
    return "logits_to_keep" in inspect.signature(base.forward).parameters
