"""Attention that never leaves a document, for rows that lie end to end in one line.

It enters a model through transformers' AttentionInterface, under one name a backend (`implementation`), so a model
carries its backend with it. Lines come with `documents` instead of a mask of T x T; everything else (padded batches,
generation) is transformers' own sdpa, or `eager` here where sdpa lacks what the model needs.
"""

# B batch (1 for lines), H heads, K key and value heads, T tokens of the line, D head size, Q queries and S keys,
# G documents of a group and L tokens of its longest

import importlib
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ingot.errors import ModelError
from ingot.model.documents import Attend as Attend
from ingot.model.documents import Documents as Documents
from ingot.model.documents import Exchange as Exchange
from ingot.model.documents import put_back, take

NAME = "ingot"
# A CPU's bfloat16 attention takes twice as long backward as its float32 one at 64 tokens (20.6 and 8.7 ms, casts
# included 9.2), as long at 256, and less from 1,024 on: 33, 8 and 2 documents, 8 heads of 64, 2 Zen 4 cores.
WIDENED = 256


class Options(NamedTuple):
    """What a layer asks of attention. `window`: a query sees keys less than so many tokens away (None: all)."""

    causal: bool
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # [H]: logits of a key that has no value (gpt-oss)
    dropout: float = 0.0

    @property
    def names(self) -> frozenset[str]:
        """The features that not every backend has."""
        used = {"window": self.window, "softcap": self.softcap, "sinks": self.sinks, "dropout": self.dropout or None}
        return frozenset(name for name, value in used.items() if value is not None)


def implementation(backend: str) -> str:
    """`model.attention` -> what transformers calls it. auto, where nobody resolved it: sdpa."""
    return NAME if backend in ("auto", "sdpa") else f"{NAME}_{backend}"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: Documents | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    *,
    backend: str = "sdpa",
    **others: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D].

    Raises ModelError for what the backend lacks: lines.py asks before training, so that no run gets here.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = Options(causal, scale, sliding_window, softcap, s_aux, dropout)
    name = type(module).__name__
    if documents is None:
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and attention_mask.is_floating_point():
            raise ModelError("data.batches", "padding-free", f"{name} is not told where rows end; use padded")
        if others.get("position_bias") is not None or not (backend == "eager" or options.names & {"softcap", "sinks"}):
            given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **others}
            return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        return _eager(query, key, value, _padded_mask(query, key, attention_mask, causal), options), None
    if documents.seen is not None:
        documents.seen.append((options, query.shape[-1], value.shape[-1]))
    lacking = options.names - FEATURES[backend]
    if lacking:
        raise ModelError("model.attention", backend, f"{name} uses {', '.join(sorted(lacking))}; use {able(options)}")
    if others.get("position_bias") is not None or (documents.exchange is None and key.shape[2] != query.shape[2]):
        raise ModelError("data.batches", "padding-free", f"{name} is not plain attention within a row; use padded")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if options.sinks is not None and len(options.sinks) != query.shape[1]:
            raise ModelError("parallel.context", "several ranks", f"{name} has sinks, one a head; use 1")
        return BACKENDS[backend](query, key, value, documents, options)

    if documents.exchange is not None:
        return documents.exchange(attend, query, key, value), None
    return attend(query, key, value), None


def able(options: Options) -> str:
    """Backends that have all that `options` asks for, as words."""
    return " or ".join(name for name, features in FEATURES.items() if options.names <= features)


def _seen(length: int, options: Options, device: torch.device) -> Tensor:
    """[L, L] bool: which key each token of one document sees."""
    places = torch.arange(length, device=device)
    away = places[:, None] - places[None, :]
    seen = away >= 0 if options.causal else torch.ones_like(away, dtype=torch.bool)
    return seen if options.window is None else seen & (away.abs() < options.window)


def _padded_mask(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The mask that sdpa would use [B, 1, Q, S] or [Q, S]; of more keys than queries the first count, as there."""
    if mask is not None:
        return mask
    shape = query.shape[2], key.shape[2]
    seen = torch.ones(shape, dtype=torch.bool, device=query.device)
    return seen.tril() if causal and shape[0] > 1 else seen


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: Options) -> Tensor:
    """[B, H, Q, D], [B, K, S, D] -> [B, Q, H, D] by plain matrix products. `mask`: bool (True: sees) or added."""
    copies = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
    scores_BHQS = query @ key.transpose(2, 3) * options.scale
    if options.softcap is not None:
        scores_BHQS = options.softcap * torch.tanh(scores_BHQS / options.softcap)
    if mask.dtype == torch.bool:
        scores_BHQS = scores_BHQS.masked_fill(~mask, torch.finfo(scores_BHQS.dtype).min)
    else:
        scores_BHQS = scores_BHQS + mask
    if options.sinks is not None:
        sinks = options.sinks.to(scores_BHQS.dtype).view(1, -1, 1, 1).expand(*scores_BHQS.shape[:3], 1)
        scores_BHQS = torch.cat([scores_BHQS, sinks], dim=-1)
    shares = torch.softmax(scores_BHQS, dim=-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[2]]
    shares = F.dropout(shares, options.dropout)
    return (shares @ value).transpose(1, 2).contiguous()


def eager(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: Options) -> Tensor:
    """Plain matrix products: has every feature, and is slow."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _eager(query, key, value, _seen(query.shape[2], options, query.device), options)

    return _by_groups(attend, query, key, value, documents, options)


def sdpa(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: Options) -> Tensor:
    """torch's scaled_dot_product_attention."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length, dtype = query.shape[2], query.dtype
        windowed = options.window is not None and options.window < length
        if widens := query.device.type == "cpu" and dtype == torch.bfloat16 and length <= WIDENED:
            query, key, value = query.float(), key.float(), value.float()
        with torch.autocast(query.device.type, enabled=False) if widens else nullcontext():
            output_GHLD = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=_seen(length, options, query.device) if windowed else None,
                dropout_p=options.dropout,
                is_causal=options.causal and not windowed,
                scale=options.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return output_GHLD.to(dtype).transpose(1, 2)

    return _by_groups(attend, query, key, value, documents, options)


def _by_groups(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: Options
) -> Tensor:
    """`attend` ([G, H, L, D], twice [G, K, L, D] -> [G, L, H, D]) once for documents of like length: no block of two
    documents is ever computed, and calls are few.

    Causal attention never looks at what fills a document up; otherwise only documents of equal length meet.
    """
    groups, taken, back = documents.near if options.causal else documents.equal
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, H, D]
    if taken is not None and back is not None:
        rows = [take(tensor, taken, back) for tensor in rows]
    parts = (tensor.split([group.size * group.length for group in groups]) for tensor in rows)
    outputs = [
        attend(*(tensor.unflatten(0, group).transpose(1, 2) for tensor in part)).flatten(0, 1)
        for group, *part in zip(groups, *parts, strict=True)
    ]
    output_THD = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return (output_THD if back is None else put_back(output_THD, back)).unsqueeze(0)


def varlen(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: Options) -> Tensor:
    """`torch.nn.attention.varlen` (2.11 and later; before, it had neither scale nor window). Half precision, CUDA."""
    kernel = varlen_kernel()
    assert kernel is not None
    query, key, value = _rows(query, key, value)
    if "enable_gqa" in inspect.signature(kernel).parameters:
        extra = {"enable_gqa": query.shape[1] != key.shape[1]}
    else:  # 2.11 checks nothing, and its kernel shares keys by itself only in some builds
        extra, copies = {}, query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(copies, dim=1) for tensor in (key, value))
    bounds, longest = documents.bounds, max(documents.lengths)
    output_THD = kernel(
        query, key, value, bounds, bounds, longest, longest, scale=options.scale, window_size=_window(options), **extra
    )
    return output_THD.unsqueeze(0)


def flash(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: Options) -> Tensor:
    """flash-attn's own kernel for lines (Dao 2023); 2.6 and later caps scores. Half precision, CUDA."""
    kernel = flash_kernel()
    assert kernel is not None
    query, key, value = _rows(query, key, value)
    bounds, longest = documents.bounds, max(documents.lengths)
    output_THD = kernel(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        dropout_p=options.dropout,
        softmax_scale=options.scale,
        causal=options.causal,
        window_size=_window(options),
        softcap=options.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),  # its backward pass does not ask torch by itself
    )
    return output_THD.unsqueeze(0)


def flex(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: Options) -> Tensor:
    """FlexAttention, compiled, with a block mask of the documents. CUDA: torch 2.13 has no backward pass for CPUs."""
    query, key, value = _alike(query, key, value)
    kind = (options.causal, options.window)
    if kind not in documents.blocks:
        documents.blocks[kind] = _block_mask(documents, options)
    softcap, sinks = options.softcap, options.sinks

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    score_mod, gqa = None if softcap is None else capped, query.shape[1] != key.shape[1]
    block_mask, extra = documents.blocks[kind], {} if sinks is None else _asking_for_lse()
    output = flex_kernel()(
        query, key, value, score_mod=score_mod, block_mask=block_mask, scale=options.scale, enable_gqa=gqa, **extra
    )
    if sinks is not None:
        output, more = output
        lse_BHT = getattr(more, "lse", more)
        # A sink only joins the sum below: exp(lse) / (exp(lse) + exp(sink)) of the weights are left.
        output = output * torch.sigmoid(lse_BHT - sinks.float().view(1, -1, 1)).unsqueeze(-1).to(output.dtype)
    return output.transpose(1, 2).contiguous()


def _block_mask(documents: Documents, options: Options) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    ids, causal, window = documents.ids, options.causal, options.window

    def allow(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = ids[i] == ids[j]
        if causal:
            seen = seen & (i >= j)
        return seen if window is None else seen & ((i - j).abs() < window)

    return create_block_mask(allow, None, None, len(ids), len(ids), device=ids.device)


def _asking_for_lse() -> dict[str, Any]:
    module = importlib.import_module("torch.nn.attention.flex_attention")
    # torch 2.9 renamed it, and warns of the old name from 2.10 on.
    return {"return_aux": module.AuxRequest(lse=True)} if hasattr(module, "AuxRequest") else {"return_lse": True}


@cache
def flex_kernel() -> Any:
    """FlexAttention as one fused kernel; uncompiled it would hold the whole matrix of scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@cache
def varlen_kernel() -> Any:
    """torch's kernel for lines where this torch has one with a scale and a window, else None."""
    try:
        kernel: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    return kernel if "window_size" in inspect.signature(kernel).parameters else None


@cache
def flash_kernel() -> Any:
    """flash-attn's kernel for lines where a version that caps scores is installed and loads, else None."""
    try:
        kernel: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    except ImportError:
        return None
    return kernel if "softcap" in inspect.signature(kernel).parameters else None


def _alike(*tensors: Tensor) -> list[Tensor]:
    """All in the type that matrix products run in: autocast does not reach these kernels, and norms leave float32."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[-1].dtype
    return [tensor.to(dtype) for tensor in tensors]


def _rows(*tensors: Tensor) -> list[Tensor]:
    """[1, H, T, D] -> [T, H, D], all in one type."""
    return [tensor[0].transpose(0, 1) for tensor in _alike(*tensors)]


def _window(options: Options) -> tuple[int, int]:
    """(left, right) as flash kernels count: how many tokens away, -1 without end."""
    away = -1 if options.window is None else options.window - 1
    return away, 0 if options.causal else away


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Documents, Options], Tensor]] = {
    "sdpa": sdpa,
    "varlen": varlen,
    "flash": flash,
    "flex": flex,
    "eager": eager,
}
# What each can do besides causal and bidirectional attention, a scale, and fewer key than query heads.
FEATURES: dict[str, frozenset[str]] = {
    "sdpa": frozenset({"window", "dropout"}),
    "varlen": frozenset({"window"}),
    "flash": frozenset({"window", "softcap", "dropout"}),
    "flex": frozenset({"window", "softcap", "sinks"}),
    "eager": frozenset({"window", "softcap", "sinks", "dropout"}),
}


def register(backend: str) -> None:
    """Let models be loaded with an entry of BACKENDS."""

    # A function of its own, not a partial: transformers and torch.compile read its name and signature. Compiled blocks
    # are cut here: a line has other documents in every step, and code compiled for some would not do for others.
    @torch.compiler.disable
    def attend(*args: Any, **options: Any) -> tuple[Tensor, None]:
        return attention(*args, backend=backend, **options)

    AttentionInterface.register(implementation(backend), attend)
    AttentionMaskInterface.register(implementation(backend), sdpa_mask)


for _backend in BACKENDS:
    register(_backend)
