"""A plain model -> the verbs that the loop needs, whatever the strategy behind them.

`Sharded` is the model as it is on one rank, and under DistributedDataParallel; fsdp.py and deepspeed.py derive from it.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ingot.model.adapters import trainable_tensors
from ingot.parallel.layout import Layout, like, local
from ingot.parallel.norm import clip, factor
from ingot.parallel.optim import fresh_moments
from ingot_kernels.adamw import AdamW

MODEL, OPTIMIZER = "model/", "optimizer/"  # how names in `state` begin


class Sharded:
    """A model and its optimizer spread over ranks.

    `plain` is the model itself; `wrapped` is what forward calls. `even`: every rank must run as many forward passes as
    every other, with gradients or without, because parameters travel in them. `whole`: this rank's `plain` holds whole
    tensors; otherwise the model is built anew from a checkpoint when it is exported. `teacher`: a frozen model that
    distillation asks, whole on every rank.
    """

    even = False
    whole = True
    teacher: nn.Module | None = None

    def __init__(
        self,
        plain: nn.Module,
        wrapped: nn.Module,
        layout: Layout,
        compute_dtype: torch.dtype,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.plain, self.wrapped, self.layout = plain, wrapped, layout
        self.compute_dtype, self.optimizer = compute_dtype, optimizer
        self.device = next(plain.parameters()).device

    def forward(self, **inputs: Any) -> Any:
        """Call the model; matrix products run in `compute_dtype`."""
        with torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            # Without gradients ranks may forward different numbers of batches, which DDP would wait for.
            return (self.wrapped if torch.is_grad_enabled() or self.even else self.plain)(**inputs)

    @contextlib.contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Context for forward and backward of one microbatch; gradients travel on the `last` one of a step."""
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            yield
        else:
            with self.wrapped.no_sync():
                yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this rank's part of the global loss (already divided by the global number of
        targets).

        DDP averages over ranks, so the part is scaled by their number: the result is the exact global gradient.
        """
        (loss * self.layout.loss_parts).backward()

    def step(self, lr: float, limit: float | None) -> float:
        """Scale the gradient to a global L2 norm of at most `limit`, update, forget the gradient; return the norm.

        Nothing is updated when the norm is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        gradients = [p.grad for _, p in trainable_tensors(self.plain) if p.grad is not None]
        limit, folded = math.inf if limit is None else limit, isinstance(self.optimizer, AdamW)
        found = clip(gradients, limit, scale=not folded)
        if isinstance(self.optimizer, AdamW):
            self.optimizer.grad_scale = factor(found, limit)  # inside of the update: no pass of its own
        if math.isfinite(found):
            self.optimizer.step()
        self.drop()
        return found

    def drop(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes: `model/NAME` and `optimizer/NAME/KEY`, plain tensors (the same on all
        ranks) or DTensors (this rank holds a part).

        These are also the places that `load` fills: before the first step, moments are made as zeros.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in trainable_tensors(self.plain):
            found[MODEL + name] = self.layout.spread(parameter.detach())
            moments = self.optimizer.state.get(parameter) or fresh_moments(parameter, self.optimizer)
            found |= {f"{OPTIMIZER}{name}/{key}": self.layout.spread(value) for key, value in moments.items()}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned and a checkpoint filled. Without moments in it only weights are taken."""
        with torch.no_grad():
            for name, parameter in trainable_tensors(self.plain):
                local(parameter).copy_(local(state[MODEL + name]))
                start = f"{OPTIMIZER}{name}/"
                moments = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
                if moments:
                    self.optimizer.state[parameter] = {key: like(value, parameter) for key, value in moments.items()}
