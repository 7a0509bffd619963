"""The product of a gated layer (Shazeer 2020): act(gate) * up, with silu (SwiGLU) or gelu (GeGLU).

Only gate and up are kept for the backward pass, which computes the rest again.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ingot_kernels.dispatch import Impl

Act = Literal["silu", "gelu_tanh", "gelu"]


def gated_reference(gate: Tensor, up: Tensor, act: Act = "silu") -> Tensor:
    """The definition."""
    if act == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


def gated(gate: Tensor, up: Tensor, act: Act = "silu", *, impl: Impl = "auto") -> Tensor:
    """act(gate) * up, both [..., I], in their type."""
    return gated_reference(gate, up, act)


def swiglu(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """silu(gate) * up."""
    return gated(gate, up, "silu", impl=impl)


def geglu(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """gelu(gate) * up, by the tanh approximation."""
    return gated(gate, up, "gelu_tanh", impl=impl)
