"""Attention that never leaves a document, for rows that lie end to end in one line; every backend behind one function.

It enters a model through transformers' AttentionInterface under the name `ingot`. Without documents (padded batches,
generation) it is transformers' own sdpa.
"""

# B batch (1 for lines), H heads, T tokens of the line, D head size, L tokens of a document

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "ingot"

# query, key, value -> output, of whole lines
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
# the same from and to a part of each line, by other ranks: called with what attends to whole lines
Exchange: TypeAlias = Callable[[Attend, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Documents:
    """Where the rows of a line begin and end. `lengths` in tokens; `bounds` int32 [documents + 1] on the device.

    `exchange`: where ranks each hold a part of the line (parallel/context.py); `lengths` are those of the whole line.
    """

    lengths: tuple[int, ...]
    bounds: Tensor
    exchange: Exchange | None = None

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device, exchange: Exchange | None = None) -> "Documents":
        """From lengths alone."""
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return cls(lengths, bounds.to(device), exchange)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: Documents | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, D], key and value [B, Hkv, T, D] -> [B, T, H, D]."""
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    attend = partial(_whole_lines, module, documents, options)
    output = attend(query, key, value) if documents.exchange is None else documents.exchange(attend, query, key, value)
    return output, None


def _whole_lines(
    module: nn.Module, documents: Documents, options: dict[str, Any], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D].

    Under an exchange H and K are those of this rank, and K / H may be another than the model's.
    """
    parts = zip(*(tensor.split(documents.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *part, None, **options)[0] for part in parts]
    return torch.cat(outputs, dim=1)


def _mask(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """No mask for lines (they come without a padding mask), transformers' own otherwise."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **options)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
