"""Passes of encoders over the tokens of their rows alone: only embeddings and heads see padding.

Rows of any length then share a pass, and few large passes take less time than many small ones, which each read all the
weights.
"""

# B rows of L tokens, padding counted; T tokens of them all, without; H heads of size D; G rows of a group; E hidden

import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ingot.model.documents import Group, grouped
from ingot.model.kinds import logits_of
from ingot.model.pooling import MeanPoolClassifier

NAME = "ingot_unpadded"
# Tokens by which rows of one call may differ: 32 questions, one layer, one core of an AMD EPYC: 2.0 ms at 4, 2.4 at 8,
# 7.6 at 64; 8 texts 1.35 ms at 4 or 8, 1.8 at 64. With rows of one length only, without masks: 3.2 and 2.3 ms.
NEAR = 4
LENGTHS = (7, 1, 9, 7)  # rows of the trial
WORDS = 64
CLOSE = 1e-4  # largest difference to padded rows, as a share of the largest output; rounding leaves about 1e-6
NARROWED = ("sliding_window", "softcap", "s_aux", "position_bias")  # what attention may be asked for, and is not here


@dataclass(frozen=True)
class _Rows:
    """Where the tokens of a pass stand. `places` [T]: among B x L. `firsts` [B]: the first of each row, among T.
    `groups`, `taken` and `back` as of `grouped`. `masks` [G, 1, 1, L] of each group, added to scores.
    """

    shape: tuple[int, int]
    places: Tensor
    firsts: Tensor
    groups: list[Group]
    taken: Tensor | None
    back: Tensor | None
    masks: list[Tensor | None]

    @classmethod
    def of(cls, mask_BL: Tensor) -> "_Rows | None":
        """From a mask of 0 and 1; None where a row holds no token."""
        lengths_B = mask_BL.sum(-1)
        if not bool(lengths_B.all()):
            return None
        groups, taken, back = grouped(tuple(lengths_B.tolist()), NEAR, mask_BL.device)
        masks: list[Tensor | None] = [None] * len(groups)
        if taken is not None:
            filled = F.pad(taken[1:] == taken[:-1], (1, 0))  # what fills a row up repeats its last token
            added = torch.zeros(len(taken)).masked_fill_(filled, -torch.inf)
            parts = added.split([group.size * group.length for group in groups])
            masks = [part.view(it.size, 1, 1, it.length) for it, part in zip(groups, parts, strict=True)]
        places, firsts_B = mask_BL.flatten().nonzero().flatten(), lengths_B.cumsum(0) - lengths_B
        return cls((mask_BL.shape[0], mask_BL.shape[1]), places, firsts_B, groups, taken, back, masks)


class _Now(threading.local):
    """The rows of this thread's pass; None: it is padded."""

    rows: _Rows | None = None


_now = _Now()


def unpad(model: nn.Module) -> bool:
    """Let the layers of an encoder on a CPU compute no padding, in place; whether it can: it is tried out beside padded
    rows. Where a head reads only the first token of each row, the end of the last layer computes only that.

    Its attention must be of transformers' interface and see all tokens of a row, positions must be added before its
    layers, and these stand in one list. It is called as before, with `attention_mask` [B, L] of 0 and 1.
    """
    inner: Any = model.backbone if isinstance(model, MeanPoolClassifier) else model
    if not isinstance(inner, PreTrainedModel) or inner.device.type != "cpu":
        return False
    inner = inner.base_model
    if _begin in inner._forward_pre_hooks.values():
        return True
    layers = _layers(inner)
    if layers is None:
        return False
    before, was = _outputs(model, inner), inner.config._attn_implementation
    if before is None:
        return False
    inner.set_attn_implementation(NAME)
    hooks = [
        inner.register_forward_pre_hook(_begin, with_kwargs=True),
        layers[0].register_forward_pre_hook(_take),
        layers[-1].register_forward_hook(_put_back),
        inner.register_forward_hook(_end, always_call=True),
    ]
    if not _equal(before, _outputs(model, inner)):
        for hook in hooks:
            hook.remove()
        inner.set_attn_implementation(was)
        return False
    # Where BERT and its kin add to a layer's input what was attended to: all behind it is by the token.
    joint = getattr(getattr(layers[-1], "attention", None), "output", None)
    if before.logits is not None and isinstance(joint, nn.Module):
        hook = joint.register_forward_pre_hook(_first_ones)
        after = _outputs(model, inner)
        if after is None or not _near(before.logits, after.logits):
            hook.remove()
    return True


# --- what the hooks do -----------------------------------------------------------------------------------------------


def _begin(_: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    mask_BL = given.get("attention_mask")
    _now.rows = _Rows.of(mask_BL) if mask_BL is not None and mask_BL.dim() == 2 else None
    if _now.rows is None:
        return None
    # Of four dimensions: transformers hands it on as it is. Whatever reads it, in place of our attention, is found out.
    return args, given | {"attention_mask": torch.full((1, 1, 1, 1), torch.nan)}


def _take(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """[B, L, E] -> [1, T, E]."""
    if _now.rows is None:
        return None
    hidden_BLE, *others = args
    return hidden_BLE.flatten(0, 1).index_select(0, _now.rows.places).unsqueeze(0), *others


def _first_ones(_: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, ...] | None:
    """[1, T, E] -> [1, B, E]."""
    return None if _now.rows is None else tuple(it.index_select(1, _now.rows.firsts) for it in args)


def _put_back(_: nn.Module, args: Any, output: Any) -> Any:
    """[1, T, E], or [1, B, E] of first tokens -> [B, L, E], zeros elsewhere."""
    rows = _now.rows
    if rows is None:
        return None
    hidden_1TE = output if isinstance(output, Tensor) else output[0]
    places = rows.places if hidden_1TE.shape[1] == len(rows.places) else rows.places[rows.firsts]
    padded = hidden_1TE.new_zeros(rows.shape[0] * rows.shape[1], hidden_1TE.shape[-1])
    hidden_BLE = padded.index_copy_(0, places, hidden_1TE[0]).unflatten(0, rows.shape)
    return hidden_BLE if isinstance(output, Tensor) else (hidden_BLE, *output[1:])


def _end(*_: Any) -> None:
    _now.rows = None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query, key and value [1, H, T, D] -> [1, T, H, D]; outside of a pass of ours as transformers has it."""
    rows = _now.rows
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if getattr(module, "is_causal", False) or any(options.get(name) is not None for name in NARROWED):
        raise ValueError("attention to a part of a row")
    tokens = [it[0].transpose(0, 1) for it in (query, key, value)]  # [T, H, D]
    if rows.taken is not None:
        tokens = [it.index_select(0, rows.taken) for it in tokens]
    parts = (it.split([group.size * group.length for group in rows.groups]) for it in tokens)
    outputs = []
    for group, mask, *part in zip(rows.groups, rows.masks, *parts, strict=True):
        q, k, v = (it.unflatten(0, group).transpose(1, 2) for it in part)  # [G, H, L, D]
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.get("scaling"))
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    output_THD = torch.cat(outputs)
    return (output_THD if rows.back is None else output_THD.index_select(0, rows.back)).unsqueeze(0), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


# --- the trial -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outputs:
    """Of the trial's rows: `hidden` [T, E] of their tokens; `logits` of rows or tokens, None of one without them."""

    hidden: Tensor
    logits: Tensor | None


@torch.no_grad()
def _outputs(model: nn.Module, inner: Any) -> _Outputs | None:
    """None where it fails: whatever a class of others' raises at what it does not expect."""
    shape = (len(LENGTHS), max(LENGTHS))
    mask_BL = (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    words = min(WORDS, inner.config.vocab_size)
    ids_BL = torch.where(
        mask_BL == 1, torch.arange(shape[0] * shape[1]).view(shape) * 7 % words, inner.config.pad_token_id or 0
    )
    with suppress(Exception):
        given = {"input_ids": ids_BL, "attention_mask": mask_BL}
        hidden_TE = inner(**given).last_hidden_state[mask_BL.bool()]
        if model is inner:
            return _Outputs(hidden_TE, None)
        logits = logits_of(model(**given))
        return _Outputs(hidden_TE, logits[mask_BL.bool()] if logits.shape[:2] == shape else logits)
    return None


def _equal(one: _Outputs, other: _Outputs | None) -> bool:
    if other is None or not _near(one.hidden, other.hidden):
        return False
    return one.logits is None or _near(one.logits, other.logits)


def _near(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.allclose(one, other, rtol=0.0, atol=CLOSE * float(one.abs().max()))


def _layers(inner: nn.Module) -> nn.ModuleList | None:
    """The list of its layers; None where that is not clear, or they may see a part of a row only."""
    said = getattr(inner, "config", None)
    windows = {str(kind) for kind in getattr(said, "layer_types", None) or ()} - {"full_attention"}
    if windows or any("window" in name and value for name, value in vars(said or object).items()):
        return None
    count = getattr(said, "num_hidden_layers", None)
    found = [it for it in inner.modules() if isinstance(it, nn.ModuleList) and len(it) == count]
    return found[0] if len(found) == 1 else None
