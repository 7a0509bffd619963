"""How fast: tokens and seconds of the steps, and what the seconds went into."""

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class Meter:
    """Counts tokens over wall time; paused while something other than training runs (validation, checkpoints).

    `on_phase` hears of every phase that begins: "data", "forward", "backward", "communication", "step", "validation",
    "checkpoint".
    """

    on_phase: Callable[[str], None] = lambda name: None
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step."""
        self.on_phase(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - started

    def got_data(self) -> None:
        """The step's batches are here: what passed since the last step was waiting for them."""
        self.phases["data"] = self.phases.get("data", 0.0) + time.perf_counter() - self._since

    def step(self, tokens: int, targets: int) -> float:
        """Add one step; return its seconds."""
        now = time.perf_counter()
        took, self._since = now - self._since, now
        self.tokens += tokens
        self.targets += targets
        self.seconds += took
        return took

    def resume(self) -> None:
        """Start the clock again after a pause."""
        self._since = time.perf_counter()
        self.on_phase("data")

    def rates(self) -> dict[str, float]:
        """Non-padding and trainable tokens per second over all ranks, and this rank's peak memory in MiB."""
        seconds = max(self.seconds, 1e-9)
        return {
            "tokens_per_second": self.tokens / seconds,
            "trainable_tokens_per_second": self.targets / seconds,
            "peak_memory_mib": peak_memory_mib(),
        }


def peak_memory_mib() -> float:
    """Largest device memory allocated on a GPU; on a CPU the process's largest resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
