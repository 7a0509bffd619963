"""What every loss calls forward with, and the losses of tokens: inside the output head where it can answer
(model/head.py), else from its logits.

B rows, T tokens, N = B*T positions, M of them with a target, K columns with one in some row, H hidden size, V
vocabulary.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ingot.data.loader import IGNORE, Batch
from ingot.model.attention import Documents
from ingot.model.head import Compute, FusedHead, asked, fused_head
from ingot.parallel.context import exchange_of
from ingot.parallel.sharded import Sharded
from ingot_kernels.linear_cross_entropy import Head, linear_cross_entropy

Inputs = dict[str, Any]


def inputs_of(batch: Batch, sharded: Sharded) -> Inputs:
    """What forward is called with: this rank's part of the batch, on its device."""
    device, cut = sharded.device, sharded.layout.cut
    if batch.row_lengths is None:
        assert batch.attention_BT is not None
        return {"input_ids": moved(batch.ids_BT, device), "attention_mask": moved(batch.attention_BT, device)}
    assert batch.positions_BT is not None
    documents = Documents.of(batch.row_lengths, device, exchange_of(sharded.layout))
    return {
        "input_ids": moved(cut(batch.ids_BT), device),
        "attention_mask": documents.mask,
        "position_ids": moved(cut(batch.positions_BT), device),
        "documents": documents,
    }


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which is on the CPU, on `device`, which is not waited for: CUDA copies it before the call returns."""
    return tensor.to(device, non_blocking=True)


def next_tokens(sharded: Sharded, batch: Batch) -> tuple[Inputs, Tensor]:
    """Inputs of a decoder, and the targets [B, T] of this rank's positions: position t predicts token t+1. IGNORE where
    there is none; on the CPU.
    """
    # Shifted before ranks of a context group each take their part of the line.
    targets_BT = sharded.layout.cut(F.pad(batch.labels_BT[:, 1:], (0, 1), value=IGNORE))
    return inputs_of(batch, sharded) | {"use_cache": False}, targets_BT


def rows_of(targets_BT: Tensor) -> Tensor:
    """Where targets are, int64 [M] in N. On the CPU, where it costs no synchronization."""
    return (targets_BT.flatten() != IGNORE).nonzero().squeeze(1)


def cross_entropy(
    sharded: Sharded, inputs: Inputs, targets_BT: Tensor, smoothing: float = 0.0, *, each: bool = False
) -> Tensor:
    """Cross-entropy of `targets_BT` (on the CPU; IGNORE: no target) by the model called with `inputs`: float32, summed;
    or with `each` [B, T], 0 where there is no target.
    """
    rows_M = moved(rows_of(targets_BT), sharded.device)
    targets_N = moved(targets_BT.flatten(), sharded.device)
    fused = fused_head(sharded.plain)
    if fused is None:
        logits_MV = logits_at(sharded, inputs, targets_BT)
        reduction = "none" if each else "sum"
        loss = F.cross_entropy(logits_MV, targets_N[rows_M], reduction=reduction, label_smoothing=smoothing)
        return loss.new_zeros(len(targets_N)).index_copy(0, rows_M, loss).view(targets_BT.shape) if each else loss
    impl, group = fused.impl, fused.group

    def compute(hidden_NH: Tensor, head: Head) -> Tensor:
        return linear_cross_entropy(
            hidden_NH,
            head,
            targets_N,
            rows_M=rows_M,
            reduction="none" if each else "sum",
            label_smoothing=smoothing,
            group=group,
            impl=impl,
        )

    loss = answered(sharded, fused, inputs, compute)
    return loss.view(targets_BT.shape) if each else loss


def answered(sharded: Sharded, fused: FusedHead, inputs: Inputs, compute: Compute) -> Tensor:
    """What `compute` makes of the hidden states of all N positions and the model's head."""
    with asked(fused, compute) as question:
        return question.answer(sharded.forward(**inputs))


def hidden_of(sharded: Sharded, fused: FusedHead, teacher: nn.Module, inputs: Inputs) -> tuple[Tensor, Head]:
    """What goes into a teacher's head [N, H], and the head."""
    seen: list[tuple[Tensor, Head]] = []

    def keep(hidden_NH: Tensor, head: Head) -> Tensor:
        seen.append((hidden_NH, head))
        return hidden_NH.new_zeros(())

    with asked(fused, keep):
        _taught(sharded, teacher, inputs)
    return seen[0]


def logits_at(sharded: Sharded, inputs: Inputs, targets_BT: Tensor, teacher: nn.Module | None = None) -> Tensor:
    """Float32 logits [M, V] of the positions with a target, by the model or by `teacher`."""
    # Only positions that predict a target in some row go through the head: on chat data that is a third of the work of
    # small-vocabulary models and most of the memory of large ones.
    kept_K = (targets_BT != IGNORE).any(0).nonzero().squeeze(1)
    if keeps_positions(teacher or sharded.plain):
        inputs = inputs | {"logits_to_keep": moved(kept_K, sharded.device)}
        targets_BT = targets_BT[:, kept_K]
    output = sharded.forward(**inputs) if teacher is None else _taught(sharded, teacher, inputs)
    logits_NV = (output if isinstance(output, Tensor) else output.logits).flatten(0, 1)
    rows_M = rows_of(targets_BT)
    if len(rows_M) < len(logits_NV):
        logits_NV = logits_NV.index_select(0, moved(rows_M, sharded.device))
    logits_MV: Tensor = logits_NV.float()
    return logits_MV


def keeps_positions(model: nn.Module) -> bool:
    """Whether the model's head can be asked for some positions only."""
    unwrap: Any = getattr(model, "get_base_model", lambda: model)  # peft's wrapper takes anything and hides the names
    base = unwrap()
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _taught(sharded: Sharded, teacher: nn.Module, inputs: Inputs) -> Any:
    """What a frozen model, whole on this rank, puts out."""
    dtype = sharded.compute_dtype
    with torch.no_grad(), torch.autocast(sharded.device.type, dtype, enabled=dtype != torch.float32):
        return teacher(**inputs)
