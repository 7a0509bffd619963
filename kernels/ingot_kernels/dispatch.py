"""Who computes an operation: Triton on a GPU, torch elsewhere; and Triton itself, where it is installed.

Kernels are written with `jit`, `tl` and `triton` of this module, so that importing one without Triton, or on a machine
without a GPU, does nothing but define functions. Files of kernels start with `from __future__ import annotations`:
`tl.constexpr` in a signature is then text.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch"]

INSTALLED = find_spec("triton") is not None
# Triton's interpreter runs kernels on CPU tensors, for tests. Read when Triton is imported, so here too.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

triton: Any = import_module("triton") if INSTALLED else None
tl: Any = import_module("triton.language") if INSTALLED else None


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` where it is installed; otherwise the function stays what it is, and nothing calls it."""
    return triton.jit(function) if INSTALLED else function


def uses_triton(impl: Impl, tensor: Tensor) -> bool:
    """Whether `impl` means Triton for this tensor. auto: on a GPU.

    Raises ValueError for triton where it cannot run, and for a name that is none of the three.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl = {impl!r}: use auto, triton or torch")
    if impl == "torch" or (impl == "auto" and not (tensor.is_cuda and INSTALLED)):
        return False
    if not INSTALLED:
        raise ValueError("impl = 'triton': the package triton is not installed; use auto or torch")
    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(
            f"impl = 'triton': the tensor is on {tensor.device.type}, where Triton runs only with TRITON_INTERPRET=1; "
            "use auto or torch"
        )
    return True


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the one that kernels start on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def warps(elements: int) -> int:
    """Warps of a program that holds `elements`: 16 a thread, so that several float32 copies of them fit its registers.
    Triton's own 4 spill from rows of 5,120 on (the backward pass of a norm, compiled for an H100).
    """
    return min(max(elements // 512, 1), 16)
