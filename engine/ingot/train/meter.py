"""How fast: tokens, seconds and operations of the steps, and what the seconds went into.

What a step's seconds are called, and what is in them:

- `data_wait`: from the end of the step before until this rank's batches are there.
- `forward`, `backward`: of all microbatches, with copying them to the device. What a strategy sends inside of them is
  in them: FSDP's and ZeRO's gathering and reducing, tensor and context parallel's exchanges.
- `communication_exposed`: waiting that no computing hides. The loop's own sum of losses (which is also where a rank
  waits for slower ones), and under DDP what is left of the gradient's reduction once this rank's backward pass has
  computed its last gradient.
- `optimizer`: the norm, clipping, the update.
- `other`: the rest: going back to a checkpoint, a step that ran out of memory.

Validation, evaluation and checkpoints are between steps and not in their seconds.

Measuring costs the host 60 microseconds a step and 16 a microbatch (one core of a shared x86-64 machine, torch 2.13):
0.02 % of a step of half a second.
"""

import contextlib
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from ingot.parallel.sharded import Sharded
from ingot.train.flops import Flops, peak_flops

# What the loop calls a phase -> what its seconds are called.
SPLIT = {
    "data": "data_wait",
    "forward": "forward",
    "backward": "backward",
    "communication": "communication_exposed",
    "step": "optimizer",
}
BETWEEN_STEPS = ("validation", "evaluation", "checkpoint")


class Clock(Protocol):
    """Marks moments, and tells later how far apart they were."""

    def mark(self) -> Any:
        """This moment."""

    def passed(self, mark: Any) -> bool:
        """Whether `seconds` up to `mark` can be asked for without waiting."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks."""


class HostClock:
    """Time of the process: right where work is done when its call returns, as on a CPU."""

    def mark(self) -> float:
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Events on the GPU's own stream: calls return long before their work is done there. Read when they have passed, a
    step later, so that nothing waits for them.
    """

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3


@dataclass
class _Spans:
    """Phases of one step: (phase, start, end), and the step's own start and end."""

    start: Any
    end: Any = None
    phases: list[tuple[str, Any, Any]] = field(default_factory=list)

    def seconds(self, clock: Clock) -> dict[str, float]:
        found = dict.fromkeys(SPLIT, 0.0)
        for name, start, end in self.phases:
            found[name] += clock.seconds(start, end)
        whole = clock.seconds(self.start, self.end)
        named = {SPLIT[name]: seconds for name, seconds in found.items()}
        return named | {"other": max(0.0, whole - sum(found.values())), "step": whole}


@dataclass
class Meter:
    """Counts tokens over wall time; paused while something other than training runs (validation, evaluation,
    checkpoints).

    `on_phase` hears of every phase that begins: "data", "forward", "backward", "communication", "step", "validation",
    "evaluation" (the metrics of tasks), "checkpoint".
    """

    on_phase: Callable[[str], None] = lambda name: None
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    at: str = "data"  # the phase under way, or the last one

    def __post_init__(self) -> None:
        self._clock: Clock = HostClock()
        self._device, self._world = torch.device("cpu"), 1
        self._flops: Flops | None = None
        self._peak: float | None = None
        self._recomputes = False
        self._operations: dict[str, float] = {}
        self._reduced: Any = None  # when the last bucket of gradients set out, in this backward pass
        self._pending: deque[_Spans] = deque()
        self._last: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        self._settled = 0
        self._between = dict.fromkeys(BETWEEN_STEPS, 0.0)
        self._since, self._spans = time.perf_counter(), _Spans(self._clock.mark())

    def watch(self, sharded: Sharded, recomputes: bool) -> None:
        """Measure `sharded`: by its device's clock, against its model's operations. `recomputes`: blocks' activations
        are computed twice.
        """
        self._device, self._world = sharded.device, sharded.layout.ranks.world
        self._flops, self._recomputes = Flops.of(sharded.plain), recomputes
        if self._device.type == "cuda":
            self._clock = CudaClock()
            self._peak = peak_flops(torch.cuda.get_device_name(self._device), sharded.compute_dtype)
        if isinstance(sharded.wrapped, DistributedDataParallel):
            # Only one hook can be registered: where there is another, what it sends is in `backward`.
            with contextlib.suppress(RuntimeError):
                sharded.wrapped.register_comm_hook(self, _reduction(sharded.wrapped.process_group))
        self.resume()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step."""
        self.on_phase(name)
        self.at = name
        if name in BETWEEN_STEPS:
            started = time.perf_counter()
            yield
            self._between[name] += time.perf_counter() - started
            return
        self._reduced = None
        start = self._clock.mark()
        with record_function(f"ingot.{name}"):
            yield
        end = self._clock.mark()
        if self._reduced is not None:
            self._spans.phases.append(("communication", self._reduced, end))
            end = self._reduced
        self._spans.phases.append((name, start, end))

    def got_data(self) -> None:
        """The step's batches are here: what passed since the last step was waiting for them."""
        self._spans.phases.append(("data", self._spans.start, self._clock.mark()))

    def reduction_set_out(self) -> None:
        """The last gradient is computed: what follows of this backward pass is waiting for other ranks."""
        self._reduced = self._clock.mark()

    def step(self, tokens: int, targets: int, lengths: NDArray[np.int64] | None = None) -> float:
        """Add one step over rows of `lengths` tokens; return its seconds."""
        now = time.perf_counter()
        took, self._since = now - self._since, now
        self.tokens += tokens
        self.targets += targets
        self.seconds += took
        if self._flops is not None and lengths is not None:
            for name, operations in self._flops.step(lengths, targets).items():
                self._operations[name] = self._operations.get(name, 0.0) + operations
        self._spans.end = self._clock.mark()
        self._pending.append(self._spans)
        self._settle()
        return took

    def resume(self) -> None:
        """Start the clock again after a pause."""
        self._since = time.perf_counter()
        self._spans = _Spans(self._clock.mark())
        self.at = "data"
        self.on_phase("data")

    def rates(self) -> dict[str, float]:
        """Figures after a step. Rates and `*_share`: since the start. `*_seconds`: of this rank's last step (on a GPU
        of the one before, which is done for sure). Memory: this rank's, in MiB.
        """
        return self._figures(self._last)

    def averages(self) -> dict[str, float]:
        """The same with mean seconds of all steps, and the whole seconds of what ran between them."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._settle()
        means = {name: total / self._settled for name, total in self._totals.items()}
        between = {f"{name}_total_seconds": seconds for name, seconds in self._between.items()}
        return self._figures(means) | between

    def split(self) -> str:
        """One line for people: where the seconds went."""
        found = self.averages()
        shares = [(name.replace("_", " "), found.get(f"{name}_share", 0.0)) for name in (*SPLIT.values(), "other")]
        parts = ", ".join(f"{name} {share:.1%}" for name, share in shares)
        speed = f"{found['tokens_per_second']:,.0f} tokens/s ({found['trainable_tokens_per_second']:,.0f} trainable)"
        used = [f"{key} {found[key]:.1%}" for key in ("mfu_lora_aware", "mfu_6n") if key in found]
        achieved = found.get("achieved_flops_per_second_lora_aware")
        if not used and achieved:
            used = [f"{achieved / 1e9:,.1f} GFLOP/s a rank (lora_aware)"]
        memory = f"peak memory {found['peak_memory_mib']:,.0f} MiB"
        return "; ".join([speed, f"{found.get('step_seconds', 0.0):.3g} s a step: {parts}", *used, memory])

    def _settle(self) -> None:
        while self._pending and self._clock.passed(self._pending[0].end):
            self._last = self._pending.popleft().seconds(self._clock)
            self._settled += 1
            for name, seconds in self._last.items():
                self._totals[name] = self._totals.get(name, 0.0) + seconds

    def _figures(self, seconds: dict[str, float]) -> dict[str, float]:
        wall = max(self.seconds, 1e-9)
        found = {"tokens_per_second": self.tokens / wall, "trainable_tokens_per_second": self.targets / wall}
        found |= {f"{name}_seconds": value for name, value in seconds.items()}
        whole = self._totals.get("step", 0.0)
        if whole > 0:
            found |= {f"{name}_share": total / whole for name, total in self._totals.items() if name != "step"}
        return found | self._utilization(wall) | peak_memory(self._device)

    def _utilization(self, wall: float) -> dict[str, float]:
        """Operations over what the ranks' GPUs could do; without a known peak, operations per second and rank."""
        per_second = {name: total / wall / self._world for name, total in self._operations.items()}
        hardware = per_second.pop("hardware", 0.0)
        if self._peak is None:
            return {f"achieved_flops_per_second_{name}": value for name, value in per_second.items()}
        found = {f"mfu_{name}": value / self._peak for name, value in per_second.items()}
        return found | ({"hfu": hardware / self._peak} if self._recomputes else {})


def _reduction(group: dist.ProcessGroup) -> Callable[[Meter, dist.GradBucket], torch.futures.Future[Tensor]]:
    """DDP's own averaging over `group`, noting when the last bucket sets out: they go in order, so all gradients are
    computed then.
    """

    def reduce(meter: Meter, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if bucket.is_last():
            meter.reduction_set_out()
        return allreduce_hook(group, bucket)

    return reduce


def peak_memory(device: torch.device) -> dict[str, float]:
    """Most memory so far in MiB. GPU: allocated by tensors, and reserved from the driver. CPU: the process's largest
    resident set.
    """
    if device.type == "cuda":
        return {
            "peak_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20,
            "peak_memory_reserved_mib": torch.cuda.max_memory_reserved(device) / 2**20,
        }
    return {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}
