"""How fast: tokens and seconds of the steps since the last reading."""

import resource
import time
from dataclasses import dataclass, field

import torch


@dataclass
class Meter:
    """Counts tokens over wall time; paused while something other than training runs (validation, checkpoints)."""

    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

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
