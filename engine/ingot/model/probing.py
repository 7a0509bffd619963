"""Logits of a loaded model on a few rows, for saying how far two of its forms are apart. Copied into packages."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from .kinds import logits_of


@torch.inference_mode()
def probe(runtime: Any, rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """The logits of each of `rows` (input columns of the model's task): of the next token where it writes text, of
    everything where it does not.
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
    messages = row.get("messages")
    if messages is not None:
        return list(runtime.chat_ids(json.loads(messages) if isinstance(messages, str) else messages))
    if runtime.task == "chat-completion":
        return list(runtime.chat_ids([{"role": "user", "content": row["input_string"]}]))
    return list(runtime.tokenizer(*row.values())["input_ids"])
