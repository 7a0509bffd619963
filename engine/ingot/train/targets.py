"""The loss of encoder-decoders: what the decoder writes about a source.

B rows, S tokens of the longest source, U of the longest target, V vocabulary.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ingot.data.loader import IGNORE, Batch
from ingot.data.plan import Divisor
from ingot.model.kinds import logits_of
from ingot.parallel.sharded import Sharded
from ingot.recipe import Objective
from ingot.train.forward import cross_entropy, inputs_of, moved


def target_tokens(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """Cross-entropy of the target's tokens given the source and the target before them, summed and divided by their
    number; what transformers' encoder-decoders return for `labels`, but for the divisor.
    """
    assert batch.targets_BU is not None
    unwrap: Any = getattr(sharded.plain, "get_base_model", lambda: sharded.plain)
    shift = getattr(unwrap(), "prepare_decoder_input_ids_from_labels", None)
    targets_BU = moved(batch.targets_BU, sharded.device)
    inputs = inputs_of(batch, sharded) | {"use_cache": False}
    if shift is not None:
        inputs["decoder_input_ids"] = shift(labels=targets_BU)
        return cross_entropy(sharded, inputs, batch.targets_BU, section.label_smoothing) / divisor.targets
    # Models without the method shift inside of forward, which then makes a loss of its own; it is not used.
    loss = F.cross_entropy(
        logits_of(sharded.forward(**inputs, labels=targets_BU)).flatten(0, 1),
        targets_BU.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=section.label_smoothing,
    )
    return loss / divisor.targets
