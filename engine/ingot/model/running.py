"""Rows that a causal language model writes together: they may join and leave between two tokens.

Self-contained (standard library, torch, its neighbours `generate_cache.py` and `sampling.py`): the MLflow package holds
a copy.
"""

# B rows of the running batch, T tokens, V vocabulary

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .generate_cache import cut, growing, join, shrink
from .sampling import Row


@dataclass
class Batch:
    """Rows that are written together. All but the last id of each is in the cache, left-padded to one length."""

    rows: list[Row]
    cache: Any
    mask: Tensor  # [B, T], 1 where `cache` holds a token of the row
    logits: Tensor  # [B, V], behind the last token that was run
    open: bool  # others can join


def accepted(model: nn.Module) -> frozenset[str]:
    """Arguments that the model takes; an adapter's own `forward` hands on what it does not name."""
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    return frozenset(inspect.signature(inner.forward).parameters)


def _run(
    model: nn.Module, known: frozenset[str], ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: Any
) -> Any:
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    if "position_ids" in known:
        options["position_ids"] = positions_BT
    return model(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, **options)


def begin(model: nn.Module, known: frozenset[str], rows: list[Row], pad_id: int, joining: bool) -> Batch:
    """Run the prompts."""
    device = next(model.parameters()).device
    longest = max(len(row.prompt) for row in rows)
    ids_BT = torch.tensor([[pad_id] * (longest - len(row.prompt)) + row.prompt for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (longest - len(row.prompt)) + [1] * len(row.prompt) for row in rows], device=device)
    output = _run(model, known, ids_BT, mask_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0), None)
    cache = output.past_key_values
    return Batch(rows, cache, mask_BT, output.logits[:, -1], growing(cache) and joining)


def step(model: nn.Module, known: frozenset[str], batch: Batch) -> None:
    """Run the last token of each row."""
    ids_B1 = torch.tensor([[row.ids[-1]] for row in batch.rows], device=batch.mask.device)
    batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], -1)
    places = [[len(row.prompt) + len(row.ids) - 1] for row in batch.rows]
    positions_B1 = torch.tensor(places, device=batch.mask.device)
    batch.logits = _run(model, known, ids_B1, batch.mask, positions_B1, batch.cache).logits[:, -1]


def unfinished(batch: Batch) -> Batch | None:
    """`batch` without rows that are finished, and without columns that only they needed. Its rows may change places."""
    left = [place for place, row in enumerate(batch.rows) if not row.finish_reason]
    if len(left) == len(batch.rows) or not left:
        return batch if left else None
    if not batch.open:
        keep = torch.tensor(left, device=batch.mask.device)
        batch.rows, batch.mask = [batch.rows[place] for place in left], batch.mask[keep]
        batch.cache.reorder_cache(keep)
        return batch
    free = sorted(set(range(len(left))) - set(left))
    moves = list(zip([place for place in left if place >= len(left)], free, strict=True))
    for source, place in moves:
        batch.rows[place], batch.mask[place] = batch.rows[source], batch.mask[source]
    batch.rows, batch.mask = batch.rows[: len(left)], batch.mask[: len(left)]
    shrink(batch.cache, moves, len(left))
    spare = batch.mask.shape[1] - max(len(row.prompt) + len(row.ids) - 1 for row in batch.rows)
    if spare:
        batch.mask = batch.mask[:, spare:]
        cut(batch.cache, spare)
    return batch


def joined(batch: Batch | None, new: Batch | None) -> Batch | None:
    """Both as one; `new` is used up."""
    if batch is None or new is None:
        return batch or new
    join(batch.cache, new.cache)
    masks, longest = (batch.mask, new.mask), max(batch.mask.shape[1], new.mask.shape[1])
    batch.mask = torch.cat([nn.functional.pad(mask_BT, (longest - mask_BT.shape[1], 0)) for mask_BT in masks])
    batch.rows = batch.rows + new.rows
    return batch


def alike(lengths: Sequence[int], spare: int) -> list[list[int]]:
    """Places of `lengths` in groups of similar ones, the longest first: what padding costs a group is at most `spare`,
    the tokens whose time a pass through all weights takes by itself.
    """
    groups: list[list[int]] = []
    padding = 0
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place], reverse=True):
        more = lengths[groups[-1][0]] - lengths[place] if groups else spare + 1
        if padding + more > spare:
            groups.append([])
            padding = more = 0
        groups[-1].append(place)
        padding += more
    return groups


def pass_tokens(device: torch.device) -> int:
    """Tokens whose time a pass through all weights takes by itself: see `alike`."""
    # Measured on one core of a CPU, 42 million parameters in float32: 23 ms for 1 token, 64 ms for 64, 164 ms for 256.
    return 64 if device.type == "cpu" else 512
