"""The loss of encoder-decoders: what the decoder writes about a source.

B rows, S tokens of the longest source, U of the longest target, V vocabulary.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ingot.data.loader import IGNORE, Batch
from ingot.data.plan import Divisor
from ingot.model.load import logits_of
from ingot.parallel.sharded import Sharded
from ingot.recipe import Objective
from ingot.train.forward import inputs_of


def target_tokens(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """Cross-entropy of the target's tokens given the source and the target before them, summed and divided by their
    number; what transformers' encoder-decoders return for `labels`, but for the divisor.
    """
    assert batch.targets_BU is not None
    targets_BU = batch.targets_BU.to(sharded.device)
    unwrap: Any = getattr(sharded.plain, "get_base_model", lambda: sharded.plain)
    shift = getattr(unwrap(), "prepare_decoder_input_ids_from_labels", None)
    # Models without the method shift inside of forward, which then makes a loss of its own; it is not used.
    asked = {"labels": targets_BU} if shift is None else {"decoder_input_ids": shift(labels=targets_BU)}
    output = sharded.forward(**inputs_of(batch, sharded), **asked, use_cache=False)
    loss = F.cross_entropy(
        logits_of(output).flatten(0, 1),
        targets_BU.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=section.label_smoothing,
    )
    return loss / divisor.targets
