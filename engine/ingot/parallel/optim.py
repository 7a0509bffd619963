"""AdamW and its learning-rate schedule."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from ingot.model.adapters import trainable_tensors
from ingot.recipe import Optim


def make_optimizer(model: nn.Module, section: Optim) -> torch.optim.AdamW:
    """AdamW over everything trainable; only matrices that are no embeddings are decayed."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    # A fused update takes plain tensors, or DTensors of one mesh.
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = defaultdict(list)
    for _, parameter in trainable_tensors(model):
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor behind
        decays = len(shape) >= 2 and id(parameter) not in embeddings
        groups[decays, getattr(parameter, "device_mesh", None)].append(parameter)
    described = [
        {"params": found, "weight_decay": section.weight_decay if decays else 0.0}
        for (decays, _), found in groups.items()
    ]
    return torch.optim.AdamW(described, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)


def lr_at(step: int, steps: int, section: Optim) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`: linear warm-up, then `section.schedule`."""
    warmup = round(section.warmup_share * steps)
    if step < warmup:
        return section.lr * (step + 1) / (warmup + 1)
    if section.schedule == "constant":
        return section.lr
    progress = (step - warmup) / max(1, steps - warmup)
    shape = 1.0 - progress if section.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.lr * (section.min_lr_share + (1.0 - section.min_lr_share) * shape)
