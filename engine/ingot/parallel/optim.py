"""AdamW, what it holds, and its learning-rate schedule."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ingot.model.adapters import trainable_tensors
from ingot.recipe import Optim
from ingot_kernels.adamw import AdamW, State


def make_optimizer(model: nn.Module, section: Optim) -> torch.optim.AdamW | AdamW:
    """AdamW over everything trainable; only matrices that are no embeddings are decayed.

    torch's fused one, unless `section` wants moments in 8 bits or weights in bfloat16. Embeddings keep float32 moments:
    most of their rows get no gradient in a step and a large one in another (Dettmers et al. 2021, section 2.3).
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    # A fused update takes plain tensors, or DTensors of one mesh.
    groups: dict[tuple[bool, State, Any], list[nn.Parameter]] = defaultdict(list)
    for _, parameter in trainable_tensors(model):
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor behind
        decays = len(shape) >= 2 and id(parameter) not in embeddings
        state: State = "float32" if id(parameter) in embeddings else section.state
        groups[decays, state, getattr(parameter, "device_mesh", None)].append(parameter)
    if section.state == "int8" or section.weights == "bfloat16":
        described = [
            {"params": found, "weight_decay": section.weight_decay if decays else 0.0, "state": state}
            for (decays, state, _), found in groups.items()
        ]
        return AdamW(described, section.lr, section.betas, section.eps, stochastic=section.weights == "bfloat16")
    described = [
        {"params": found, "weight_decay": section.weight_decay if decays else 0.0}
        for (decays, *_), found in groups.items()
    ]
    return torch.optim.AdamW(described, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)


def fresh_moments(parameter: Tensor, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """AdamW's state before its first step, as torch makes it for `fused=True`, or our own where it is in use."""
    if isinstance(optimizer, AdamW):
        return optimizer.fresh(parameter)
    device = parameter.device if parameter.is_cuda else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


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
