"""A plain model -> the four verbs that the loop needs, whatever the strategy behind them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ingot.errors import RecipeError
from ingot.ranks import Ranks
from ingot.recipe import Parallel


@dataclass(frozen=True)
class Sharded:
    """A model spread over ranks. `plain` is the model itself (saved, evaluated); `wrapped` is what forward calls."""

    plain: nn.Module
    wrapped: nn.Module
    ranks: Ranks
    compute_dtype: torch.dtype

    def forward(self, **inputs: Any) -> Any:
        """Call the model; matrix products run in `compute_dtype`."""
        device_type = next(self.plain.parameters()).device.type
        with torch.autocast(device_type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            # Without gradients ranks may forward different numbers of batches, which the wrapper would wait for.
            return (self.wrapped if torch.is_grad_enabled() else self.plain)(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this rank's part of the global loss (already divided by the global number of
        targets).

        DDP averages over ranks, so the part is scaled by their number: the result is the exact global gradient.
        """
        (loss * self.ranks.world).backward()

    @contextlib.contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Context for forward and backward of one microbatch; gradients travel between ranks on the `last` one of a
        step.
        """
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            yield
        else:
            with self.wrapped.no_sync():
                yield


def recompute_blocks(model: nn.Module) -> None:
    """Recompute each block's activations in the backward pass (Chen et al. 2016) instead of keeping them.

    The non-reentrant kind: with the reentrant one and frozen embeddings adapters get no gradient and stay at zero.
    """
    inner: Any = getattr(model, "backbone", model)
    # transformers 5.23 renamed it; the old name warns there, the new one is missing before.
    word = "activation" if hasattr(inner, "activation_checkpointing_enable") else "gradient"
    enable = getattr(inner, f"{word}_checkpointing_enable")
    enable(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})


def parallelize(model: nn.Module, ranks: Ranks, section: Parallel, device: torch.device, dtype: torch.dtype) -> Sharded:
    """Move `model` to `device` and wrap it for `section.strategy`."""
    model.to(device)
    if ranks.world == 1:
        if section.strategy == "ddp":
            raise RecipeError(
                "parallel.strategy",
                "ddp",
                "there is only one rank; launch with torchrun --nproc-per-node N, or use auto",
            )
        return Sharded(model, model, ranks, dtype)
    if section.strategy == "none":
        raise RecipeError(
            "parallel.strategy",
            "none",
            f"{ranks.world} ranks would train {ranks.world} different models; use auto or ddp",
        )
    devices = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    return Sharded(model, wrapped, ranks, dtype)
