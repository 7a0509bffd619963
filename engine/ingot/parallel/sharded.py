"""A plain model -> the verbs that the loop needs, whatever the strategy behind them.

`Sharded` is the model as it is on one rank, and under DistributedDataParallel; fsdp.py and deepspeed.py derive from it.
"""

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
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

    @property
    def answering(self) -> tuple[int, int]:
        """(the group of this rank, number of groups): ranks of a group must run the same batches in `at_rest`, groups
        may run different ones.
        """
        return self.layout.ranks.rank // self.layout.tensor, self.layout.loss_parts

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[nn.Module]:
        """The model inside of adapters and strategies, in evaluation mode, to be called by any of its methods between
        two steps; nothing that training reads is another one afterwards.

        Gradients are off, and callees must not take `torch.inference_mode` instead: tensors of that mode may stay in
        buffers that the next step writes to. Compiled blocks run as they are written: other shapes would use up the
        number of recompilations.
        """
        modes = {module: module.training for module in self.plain.modules()}
        compiled = any(module._compiled_call_impl is not None for module in modes)
        stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
        unwrap: Any = getattr(self.plain, "get_base_model", lambda: self.plain)
        inner: nn.Module = unwrap()
        low = self.compute_dtype != torch.float32
        # Without a cache of casts, which would hold a copy of every trained weight while the block runs.
        casts = torch.autocast(self.device.type, self.compute_dtype, enabled=low, cache_enabled=False)
        devices = [self.device] if self.device.type == "cuda" else []
        drawn = random.getstate()
        hook = self._agreed(inner)
        try:
            with torch.random.fork_rng(devices), stance, torch.no_grad(), casts:
                self.plain.eval()
                yield inner
        finally:
            hook.remove()
            random.setstate(drawn)
            for module, training in modes.items():
                module.training = training

    def _agreed(self, inner: nn.Module) -> Any:
        """A hook that gives all ranks of a group the next token's logits of its first one: a rank that ended a text a
        token earlier than the others would leave them waiting.
        """
        number, groups = self.answering
        world = self.layout.ranks.world
        alone = groups == world
        group = None if groups == 1 or alone else self.layout.grid.get_group("tensor")  # type: ignore[union-attr]

        def agree(_module: nn.Module, _args: Any, output: Any) -> None:
            logits = getattr(output, "logits", None)
            if not alone and isinstance(logits, Tensor) and logits.ndim == 3:
                last_BV = logits[:, -1].contiguous()
                dist.broadcast(last_BV, src=number * (world // groups), group=group)
                logits[:, -1] = last_BV

        return inner.register_forward_hook(agree)

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
