"""What watches over a step: loss spikes, told from the losses of the steps before; and kernels that give the same bits
every time.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
import torch.utils.deterministic

from ingot.errors import RecipeError

RECENT_STEPS = 50  # losses that a step is compared with
LEAST_STEPS = 20  # fewer say nothing about their spread


def is_spike(loss: float, recent: Sequence[float], factor: float) -> bool:
    """Whether `loss` is above the median of `recent` by more than `factor` robust standard deviations.

    1.4826 x median absolute deviation estimates the standard deviation of normal values (Hampel 1974) and is not moved
    by the spikes themselves.
    """
    if len(recent) < LEAST_STEPS:
        return False
    middle = median(recent)
    spread = 1.4826 * median(abs(value - middle) for value in recent)
    return loss > middle + factor * max(spread, 1e-3 * abs(middle))


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Within the block torch takes only kernels that give the same bits every time, and fills memory that nobody wrote.

    An operation that has none raises, see `explained`.
    """
    if not enabled:
        yield
        return
    # cuBLAS reads it when it is first used; two workspaces of 4 MiB are what NVIDIA's manual gives for this.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filling: Any = torch.utils.deterministic  # its flag is a property that type checkers do not see
    cudnn = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        filling.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = True, False, True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = before[2:]


def explained(error: Exception) -> Exception:
    """torch's error about an operation without a deterministic kernel as a RecipeError; any other as it is."""
    text = str(error)
    if not isinstance(error, RuntimeError) or "deterministic" not in text or "use_deterministic_algorithms" not in text:
        return error
    if "CUBLAS_WORKSPACE_CONFIG" in text:
        fix = "cuBLAS was used in this process before; start a new one, or set CUBLAS_WORKSPACE_CONFIG=:4096:8 for it"
        return RecipeError("train.deterministic", True, fix)
    operation = text.split(" does not have a deterministic")[0].strip()
    fix = (
        f"{operation} has no kernel that gives the same bits every time on this device; "
        "set it to false, or choose parts without that operation (often another model.attention)"
    )
    return RecipeError("train.deterministic", True, fix)
