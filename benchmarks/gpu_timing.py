"""Timing on a GPU (or, in a dry run, on the CPU): contenders take turns, and nothing is timed before it is right."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of an H200 (50 MiB)
K_OUTPUT, K_GRADIENT = 3.0, 2.0  # how much further from the truth than torch a result may be (tests/kernels/truth.py)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


@dataclass
class Bench:
    """Where and how long to measure. `rounds` of all contenders in turn; `seconds` is the most that one case takes."""

    device: torch.device
    dry: bool
    rounds: int = 20
    seconds: float = 6.0
    _flush: Tensor | None = field(default=None, repr=False)

    def once(self, function: Callable[[], Any], *, ahead: bool = False) -> float:
        """Seconds of one call, with nothing of it in the cache before. `ahead`: the GPU begins when all of it has been
        launched, so that what Python takes to launch small operations is not timed.
        """
        if self.device.type != "cuda":
            started = time.perf_counter()
            function()
            return time.perf_counter() - started
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        self._flush.zero_()
        if ahead:
            torch.cuda._sleep(4_000_000)  # cycles, about 2 ms
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def own_bytes(self) -> int:
        """What this holds on the device itself."""
        return 0 if self._flush is None else FLUSH_BYTES

    def alternate(self, contenders: dict[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
        """name -> median and 20/80 % seconds; a contender that raises gets the reason instead."""
        found: dict[str, dict[str, Any]] = {}
        alive = dict(contenders)
        for name, function in contenders.items():
            try:
                for _ in range(1 if self.dry else 3):
                    self.once(function, ahead=True)
            except Exception as error:  # a peer that is not made for this shape or device is a result, too
                found[name] = {
                    "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                }
                del alive[name]
        times: dict[str, list[float]] = {name: [] for name in alive}
        until = time.perf_counter() + self.seconds
        for _ in range(1 if self.dry else self.rounds):
            for name, function in alive.items():
                times[name].append(self.once(function, ahead=True))
            if time.perf_counter() > until:
                break
        for name, taken in times.items():
            ordered = sorted(taken)
            found[name] = {
                "seconds": statistics.median(ordered),
                "p20": ordered[int(0.2 * (len(ordered) - 1))],
                "p80": ordered[int(0.8 * (len(ordered) - 1))],
                "calls": len(ordered),
            }
        return {name: found[name] for name in contenders}

    def peak_bytes(self, function: Callable[[], Any]) -> int | None:
        """Most memory that `function` holds beyond what was there; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def forward_backward(function: Function, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Callable[[], None]:
    """Both passes from fresh leaves: what is timed. Floating tensors that require a gradient get one."""

    def run() -> None:
        leaves = [t.detach().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors]
        outputs = function(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        # Not `backward`, which copies a gradient that two leaves share. A bare product leaves adapters unused.
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        torch.autograd.grad(outputs, wanted, list(gradients[: len(outputs)]), allow_unused=True)

    return run


def distance(kernel: Function, reference: Function, tensors: Sequence[Tensor]) -> dict[str, float | bool]:
    """How much further `kernel` is from the float64 truth than `reference` in the same type: the worst of outputs and
    of gradients, as multiples; `right` where both are within K_OUTPUT and K_GRADIENT.
    """
    exact = [t.double() if t.is_floating_point() else t for t in tensors]
    ours, n_outputs = _results(kernel, tensors)
    plain, _ = _results(reference, tensors)
    truth, _ = _results(reference, exact)
    worst, right = [0.0, 0.0], True
    for number, (own, true, other) in enumerate(zip(ours, truth, plain, strict=True)):
        size = true.abs().max().item() if true.numel() else 0.0
        error, allowed = ((part.double() - true).abs().max().item() if true.numel() else 0.0 for part in (own, other))
        floor = ROUNDING[own.dtype] * size
        kind = int(number >= n_outputs)
        right &= error <= (K_OUTPUT, K_GRADIENT)[kind] * allowed + floor
        worst[kind] = max(worst[kind], error / max(allowed, floor, 1e-30))
    return {"outputs": worst[0], "gradients": worst[1], "right": bool(right)}


def _results(function: Function, tensors: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    found = function(*leaves)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    total = torch.stack([(o.double() * _weights(o)).sum() for o in outputs]).sum()
    total.backward()
    floating = [leaf for leaf in leaves if leaf.is_floating_point()]
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in floating]
    return [o.detach() for o in outputs] + gradients, len(outputs)


def _weights(output: Tensor) -> Tensor:
    """What each element of an output counts, the same in every type."""
    return torch.cos(torch.arange(output.numel(), device=output.device, dtype=torch.float64)).view(output.shape)
