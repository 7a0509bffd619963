"""Logits of a loaded model on a few rows, for saying how far two of its forms are apart. Copied into packages."""

from collections.abc import Sequence
from typing import Any

import torch

from .answers import answered
from .kinds import logits_of
from .runtime import WRITING


@torch.inference_mode()
def probe(runtime: Any, rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """The logits of each of `rows` (input columns of the model's task): of the last token where they are over the
    vocabulary, of everything elsewhere.
    """
    found, device = [], next(runtime.model.parameters()).device
    for row in rows:
        arguments = {"input_ids": torch.tensor([_ids(runtime, row)], device=device)}
        if getattr(runtime.model.config, "is_encoder_decoder", False):
            start = torch.tensor([[runtime.model.config.decoder_start_token_id]], device=device)
            arguments["decoder_input_ids"] = start
        else:
            arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
        logits = logits_of(runtime.model(**arguments))[0]
        writes = logits.dim() == 2 and logits.shape[-1] >= len(runtime.tokenizer)
        found.append((logits[-1] if writes else logits.flatten()).tolist())
    return found


def _ids(runtime: Any, row: dict[str, Any]) -> list[int]:
    [read], _ = runtime.read([row])
    if runtime.task in WRITING:
        return list(runtime.prompt_of(read))
    if runtime.task == "reward":
        ids = answered(runtime.answering, read)
    else:
        ids = runtime.tokenizer(*(" ".join(it) if isinstance(it, list) else it for it in read.values()))["input_ids"]
    return list(ids[: runtime.answering.limit])
