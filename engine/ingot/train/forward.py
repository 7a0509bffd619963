"""What every loss calls forward with.

B rows, T tokens.
"""

import inspect
from typing import Any

from torch import nn

from ingot.data.loader import Batch
from ingot.model.attention import Documents
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
