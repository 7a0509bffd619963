"""Masks of dropout that are not kept but drawn once more: what is kept is the state of the generator."""

from __future__ import annotations

import torch
from torch import Tensor


def generator_of(device: torch.device) -> torch.Generator:
    """The one that torch draws from on this device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    return torch.default_generator


def again(state: Tensor, device: torch.device) -> torch.Generator:
    """A generator that draws once more what was drawn: a mask is not kept, but its seed is."""
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


def mask_of(x_MK: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """1 / (1 - p) where an element stays, 0 where it is dropped, with probability p [M, K]."""
    return torch.empty_like(x_MK).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
