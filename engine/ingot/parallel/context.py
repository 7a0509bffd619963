"""Context parallel by Ulysses (Jacobs et al. 2023, arXiv 2309.14509): ranks of a context group each hold a part of the
tokens of one line; around attention an all-to-all turns it into all tokens for a part of the heads.

Everything else in a decoder works token by token, so only attention has to talk.
"""

# N ranks of the group, B lines (1), H heads, T tokens of the whole line, t = T/N of this rank, D head size

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ingot.errors import RecipeError
from ingot.model.attention import Attend, Exchange
from ingot.parallel.layout import Layout

TOKENWISE = {"full_attention", "sliding_attention"}  # layers that mix tokens by attention alone


def exchange_of(layout: Layout) -> Exchange | None:
    """What `Documents.exchange` is for ranks of `layout`; None where every rank holds whole lines."""
    return None if layout.context_group is None or layout.context == 1 else partial(exchange, layout.context_group)


def exchange(group: dist.ProcessGroup, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over whole lines, from and to this rank's tokens.

    query [B, H, t, D], key and value [B, Hkv, t, D] -> [B, t, H, D]. `attend` gets [B, H/N, T, D] and [B, K/N, T, D],
    returns [B, T, H/N, D]. K is Hkv, or the least multiple of it that N divides: heads are then repeated, and their
    gradients add up.
    """
    size = dist.get_world_size(group)
    # Norms of heads leave float32 under autocast, and attention would round it anyway: that much less to send.
    query, key = query.to(value.dtype), key.to(value.dtype)
    copies = math.lcm(key.shape[1], size) // key.shape[1]
    if copies > 1:
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
    output_BThD = attend(*_to_heads([query, key, value], group, size))
    return _to_tokens(output_BThD, group, size)


def check(model: nn.Module, size: int, tensor: int = 1) -> None:
    """Raise RecipeError where `size` ranks cannot share this model's lines, or `size` groups of `tensor` ranks."""
    config: Any = model.config
    config = config.get_text_config()
    heads = config.num_attention_heads
    if heads % (size * tensor):
        allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % (n * tensor) == 0) or "1"
        shared = f", parted by parallel.tensor={tensor} before" if tensor > 1 else ""
        raise RecipeError(
            "parallel.context",
            size,
            f"each rank takes a part of attention's heads, and this model has {heads}{shared}; use one of {allowed}",
        )
    mixers = sorted(set(getattr(config, "layer_types", None) or []) - TOKENWISE)
    if mixers or getattr(model, "_is_stateful", False):
        raise RecipeError(
            "parallel.context",
            size,
            f"{type(model).__name__} mixes tokens by other means than full or sliding attention "
            f"({', '.join(mixers) or 'a state'}), which would end where a rank's part of a line ends; use 1",
        )
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        raise RecipeError("parallel.context", size, f"{type(model).__name__} has attention sinks, one a head; use 1")


class _Swap(torch.autograd.Function):
    """[N, F] -> [N, F]: row n goes to rank n of the group, and comes from it. Its own inverse, and transpose."""

    @staticmethod
    def forward(context: Any, rows_NF: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        received_NF = torch.empty_like(rows_NF)
        dist.all_to_all_single(received_NF, rows_NF, group=group)
        return received_NF

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, None]:
        [gradient_NF] = gradients
        return _Swap.apply(gradient_NF.contiguous(), context.group), None


def _to_heads(tensors: list[Tensor], group: dist.ProcessGroup, size: int) -> list[Tensor]:
    """Each [B, H, t, D] -> [B, H/N, T, D], in one exchange."""
    by_rank = [part.unflatten(1, (size, -1)).movedim(1, 0) for part in tensors]  # [N, B, H/N, t, D]
    received = _Swap.apply(torch.cat([part.flatten(1) for part in by_rank], dim=1), group)
    widths = [part[0].numel() for part in by_rank]
    # Rank n's part of the tokens is the n-th stretch of the line.
    return [
        part.reshape(like.shape).movedim(0, 2).flatten(2, 3)
        for part, like in zip(received.split(widths, dim=1), by_rank, strict=True)
    ]


def _to_tokens(output_BThD: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
    """[B, T, H/N, D] -> [B, t, H, D]."""
    by_rank = output_BThD.unflatten(1, (size, -1)).movedim(1, 0)  # [N, B, t, H/N, D]
    received = _Swap.apply(by_rank.flatten(1).contiguous(), group).reshape(by_rank.shape)
    return received.movedim(0, 2).flatten(2, 3)
