"""What every loss calls forward with.

B rows, T tokens, K positions kept, V vocabulary.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ingot.data.loader import IGNORE, Batch
from ingot.model.attention import Documents
from ingot.model.load import logits_of
from ingot.parallel.context import exchange_of
from ingot.parallel.sharded import Sharded


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


def keeps_positions(model: nn.Module) -> bool:
    """Whether the model's head can be asked for some positions only."""
    unwrap: Any = getattr(model, "get_base_model", lambda: model)  # peft's wrapper takes anything and hides the names
    base = unwrap()
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def next_token_logits(
    sharded: Sharded, batch: Batch, teacher: nn.Module | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 logits [B, K, V] of the positions that predict a target in some row, by the model or by `teacher`; those
    targets [B, K], IGNORE where a row has none; and which positions [K] they are. The last two are on the CPU.
    """
    # Position t predicts token t+1. Shifted before ranks of a context group each take their part of the line.
    targets_BT = sharded.layout.cut(F.pad(batch.labels_BT[:, 1:], (0, 1), value=IGNORE))
    # Only positions that predict a target in some row go through the head: on chat data that is a third of the work of
    # small-vocabulary models and most of the memory of large ones. Found on the CPU, where it costs no synchronization.
    kept_K = (targets_BT != IGNORE).any(0).nonzero().squeeze(1)
    keeps = keeps_positions(teacher or sharded.plain)
    inputs = inputs_of(batch, sharded) | {"use_cache": False}
    if keeps:
        inputs["logits_to_keep"] = kept_K.to(sharded.device)
    if teacher is None:
        output = sharded.forward(**inputs)
    else:
        dtype = sharded.compute_dtype
        with torch.no_grad(), torch.autocast(sharded.device.type, dtype, enabled=dtype != torch.float32):
            output = teacher(**inputs)
    logits_BKV = logits_of(output)
    if not keeps:
        logits_BKV = logits_BKV[:, kept_K.to(sharded.device)]
    return logits_BKV, targets_BT[:, kept_K], kept_K
