"""Contexts run once, whatever is compared behind them.

Three forward passes at most for a batch: the beginning that all contexts share (a few-shot header; once a call), the
rest of each context, and all continuations of each context in one row, where each sees the context and itself. The
context's keys and values are so neither computed nor copied for each continuation.
"""

# B rows, T tokens, P tokens of contexts, Q tokens of continuations behind them, K = P + Q, D hidden

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ingot.model.projection import COARSE, Projection, Told
from ingot.model.sequences import Scored, batches, padded, read_back

ENDLESS = 1 << 60
SHORTEST_HEADER = 8  # tokens; a shorter beginning in common does not pay for its own forward pass
SLAB = 1024  # most tokens of continuations in one row: its mask grows with their square
CLOSE = 1e-4  # of a trial in float32: largest difference of hidden states as a share of the largest


@dataclass
class _Slab:
    """Continuations of one context that are run in one row: tokens that are fed, and what is asked."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # behind the context
    owners: list[int] = field(default_factory=list)  # which continuation a token is of
    targets: list[list[int]] = field(default_factory=list)


def _slabs(continuations: Sequence[list[int]]) -> list[_Slab]:
    slabs = [_Slab()]
    for one in continuations:
        if slabs[-1].targets and len(slabs[-1].ids) + len(one) - 1 > SLAB:
            slabs.append(_Slab())
        slab = slabs[-1]
        slab.ids += one[:-1]
        slab.positions += range(len(one) - 1)
        slab.owners += [len(slab.targets)] * (len(one) - 1)
        slab.targets.append(one)
    return slabs


def score_shared(
    projection: Projection,
    contexts: Sequence[list[int]],
    continuations: Sequence[Sequence[list[int]]],
    pad_id: int,
    tokens: int,
) -> Iterator[tuple[int, list[Scored]]]:
    """Each context's place and the scores of its continuations; together within `shared_reach`."""
    header = _header(contexts)
    before = None
    if header:
        _, before = _prefill(projection, torch.tensor([header], device=projection.device), None, 0, [])
    slabs = [_slabs(of_context) for of_context in continuations]
    widths = [max(len(slab.ids) for slab in of_part) for of_part in slabs]
    for batch in batches([len(context) - len(header) for context in contexts], widths, tokens):
        rests = [contexts[place][len(header) :] for place in batch]
        rows = _score_batch(projection, rests, [slabs[place] for place in batch], pad_id, before, len(header))
        yield from zip(batch, rows, strict=True)


def _header(contexts: Sequence[list[int]]) -> list[int]:
    """The beginning that all contexts share; each keeps a token of its own behind it."""
    if len(contexts) < 2:
        return []
    low, high = min(contexts), max(contexts)
    length = next((n for n, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))
    length = min(length, min(len(one) for one in contexts) - 1)
    return low[:length] if length >= SHORTEST_HEADER else []


def _score_batch(
    projection: Projection,
    contexts: Sequence[list[int]],
    slabs: Sequence[list[_Slab]],
    pad_id: int,
    header: Any,
    n_header: int,
) -> list[list[Scored]]:
    """Scores of all continuations of each context [B]."""
    device = projection.device
    ids_BP = padded(contexts, pad_id, device)
    lengths = [len(one) for one in contexts]
    found: list[list[Scored]] = [[] for _ in contexts]
    if all(not slab.ids for of_row in slabs for slab in of_row):  # one token each: no second pass
        lasts = (torch.arange(len(contexts), device=device), torch.tensor(lengths, device=device) - 1)
        about = [row for row, of_row in enumerate(slabs) for slab in of_row for _ in slab.targets]
        wanted = [one[0] for of_row in slabs for slab in of_row for one in slab.targets]
        told = projection.tell(
            lasts,
            _inputs(ids_BP, header, n_header, use_cache=header is not None),
            torch.tensor(about, device=device),
            torch.tensor(wanted, device=device),
        )
        for row, scored in zip(about, read_back(told, [1] * len(about)), strict=True):
            found[row].append(scored)
        return found
    lasts_BD, cache = _prefill(projection, ids_BP, header, n_header, lengths)
    n_slabs = max(len(of_row) for of_row in slabs)
    for number in range(n_slabs):
        having = [row for row, of_row in enumerate(slabs) if number < len(of_row)]
        chosen = torch.tensor(having, device=device) if len(having) < len(contexts) else None
        # The last pass may let go of the contexts' keys and values layer by layer, as it makes longer ones of them.
        grows = _fork(cache, chosen) if number < n_slabs - 1 or chosen is not None else cache
        told, counts, owners = _ask_slab(
            projection,
            [slabs[row][number] for row in having],
            [n_header + lengths[row] for row in having],
            lasts_BD[having],
            grows,
            pad_id,
        )
        for place, scored in zip(owners, read_back(told, counts), strict=True):
            found[having[place]].append(scored)
    return found


def _ask_slab(
    projection: Projection, slabs: Sequence[_Slab], lengths: Sequence[int], lasts_BD: Tensor, cache: Any, pad_id: int
) -> tuple[Told, list[int], list[int]]:
    """Run one slab of each context [B]; what was told, tokens of each continuation and the context it belongs to.

    `lengths` [B]: tokens before the slab, header and context. The cache's padding behind a context is masked, as are
    the other continuations of its row.
    """
    device = projection.device
    n_rows, width = len(slabs), max(1, *(len(slab.ids) for slab in slabs))
    # Rows to ask about: the contexts' last ones, then every token that is fed.
    fed = [(row, place) for row, slab in enumerate(slabs) for place in range(len(slab.ids))]
    about, wanted, counts, owners = [], [], [], []
    at = n_rows
    for row, slab in enumerate(slabs):
        for one in slab.targets:
            about += [row, *range(at, at + len(one) - 1)]
            wanted += one
            at += len(one) - 1
            counts.append(len(one))
            owners.append(row)
    ids_BQ = padded([slab.ids or [pad_id] for slab in slabs], pad_id, device)
    positions_BQ = padded([slab.positions or [-1] for slab in slabs], -1, device)  # of padding: one that is in reach
    owners_BQ = torch.full((n_rows, width), -1, device=device)
    for row, slab in enumerate(slabs):
        owners_BQ[row, : len(slab.owners)] = torch.tensor(slab.owners, dtype=torch.long, device=device)
    lengths_B = torch.tensor(lengths, device=device)
    kept = cache.get_seq_length()
    seen_BQP = (torch.arange(kept, device=device) < lengths_B[:, None])[:, None].expand(n_rows, width, kept)
    same_BQQ = (owners_BQ[:, :, None] == owners_BQ[:, None, :]) & torch.ones(
        width, width, dtype=torch.bool, device=device
    ).tril()
    mask_BQK = torch.cat([seen_BQP, same_BQQ], -1)
    dtype = lasts_BD.dtype
    bias_B1QK = torch.zeros(mask_BQK.shape, dtype=dtype, device=device).masked_fill_(~mask_BQK, torch.finfo(dtype).min)[
        :, None
    ]
    told = projection.tell(
        (
            torch.tensor([row for row, _ in fed], dtype=torch.long, device=device),
            torch.tensor([place for _, place in fed], dtype=torch.long, device=device),
        ),
        {
            "input_ids": ids_BQ,
            "attention_mask": bias_B1QK,
            "position_ids": positions_BQ + lengths_B[:, None],
            "past_key_values": cache,
            "use_cache": True,
        },
        torch.tensor(about, device=device),
        torch.tensor(wanted, device=device),
        before=lasts_BD,
    )
    return told, counts, owners


def _inputs(ids_BT: Tensor, header: Any, n_header: int, *, use_cache: bool) -> dict[str, Any]:
    """Rows behind the header, padded on the right: where a causal mask hides the padding by itself."""
    inputs: dict[str, Any] = {"input_ids": ids_BT, "use_cache": use_cache}
    if header is not None:
        positions_T = torch.arange(n_header, n_header + ids_BT.shape[1], device=ids_BT.device)
        inputs["position_ids"] = positions_T.expand_as(ids_BT)
        inputs["past_key_values"] = _fork(header, torch.zeros(len(ids_BT), dtype=torch.long, device=ids_BT.device))
    return inputs


def _prefill(
    projection: Projection, ids_BT: Tensor, header: Any, n_header: int, lengths: Sequence[int]
) -> tuple[Tensor, Any]:
    """Last hidden states [B, D] of rows of `lengths` tokens (none: of none), and the cache of all rows."""
    device = ids_BT.device
    places = (torch.arange(len(lengths), device=device), torch.tensor(lengths, dtype=torch.long, device=device) - 1)
    rows, output = projection.hidden(places, _inputs(ids_BT, header, n_header, use_cache=True))
    return rows, output.past_key_values


def _fork(cache: Any, rows: Tensor | None) -> Any:
    """A cache that grows by itself from what `cache` holds, of `rows` of it; a layer is never written to in place."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    if rows is not None:
        for layer in fork.layers:
            layer.keys, layer.values = _rows_of(layer.keys, rows), _rows_of(layer.values, rows)
    return fork


def _rows_of(held: Tensor, rows: Tensor) -> Tensor:
    """Rows of keys or values; of one that all want, no copies."""
    return held.expand(len(rows), -1, -1, -1) if len(held) == 1 else held[rows]


# --- which models can share ---

_REACH: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


def shared_reach(model: nn.Module, pad_id: int) -> int:
    """Most tokens of context and continuation for which a cache can be shared; 0: the model cannot share it.

    Found by trying, once a model: two contexts with a header and a few continuations must have the hidden states of
    whole sequences.
    """
    config: Any = model.config
    known = _REACH.setdefault(model, {})
    kind = str(getattr(config, "_attn_implementation", ""))
    if kind not in known:
        known[kind] = _tried(model, pad_id)
    return known[kind]


def _tried(model: nn.Module, pad_id: int) -> int:
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    ids = [(7 * n + 3) % config.vocab_size for n in range(12)]
    watched = _Watched(model)
    start, contexts = ids[:2], [ids[2:6], ids[5:8]]
    tails = [[ids[8:11], ids[9:11]], [ids[3:4], ids[1:4]]]
    try:
        _, header = _prefill(watched, torch.tensor([start], device=watched.device), None, 0, [])
        reach = _cache_reach(header, config)
        if reach:
            _score_batch(watched, contexts, [_slabs(tail) for tail in tails], pad_id, header, len(start))
            shared_ND = watched.rows[-1]  # both contexts' last rows, then every token that was fed
            whole = [
                _tail_states(watched, start + context, one)
                for context, tail in zip(contexts, tails, strict=True)
                for one in tail
            ]
    except Exception:  # whatever a class of others' raises for a cache or a mask that it does not know
        return 0
    if not reach:
        return 0
    whole_ND = torch.cat([whole[0][:1], whole[2][:1], *(states_TD[1:] for states_TD in whole)])
    allowed = CLOSE if whole_ND.dtype in (torch.float32, torch.float64) else COARSE
    return reach if bool((shared_ND - whole_ND).abs().max() <= allowed * whole_ND.abs().max()) else 0


class _Watched(Projection):
    """A projection that keeps the hidden states of every run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.rows: list[Tensor] = []

    def _run(self, *given: Any) -> tuple[Tensor, Any]:
        rows, output = super()._run(*given)
        self.rows.append(rows)
        return rows, output


def _tail_states(projection: Projection, context: list[int], continuation: list[int]) -> Tensor:
    """Hidden states [n, D] that predict a continuation, by a whole sequence."""
    ids = context + continuation[:-1]
    inputs = {"input_ids": torch.tensor([ids], device=projection.device), "use_cache": False}
    places = torch.arange(len(context) - 1, len(ids), device=projection.device)
    return projection.hidden((torch.zeros_like(places), places), inputs)[0]


def _cache_reach(cache: Any, config: Any) -> int:
    """How far tokens may lie apart for every layer to hold all of them and to place them as in a whole sequence."""
    reach = ENDLESS
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return 0
        if isinstance(layer, DynamicSlidingWindowLayer):
            reach = min(reach, layer.sliding_window)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):  # other frequencies for longer sequences
        reach = min(reach, rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return reach
