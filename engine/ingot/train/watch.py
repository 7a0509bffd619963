"""What is looked at beside the loss while a model trains: metrics of tasks, the base model's first, as step 0."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ingot.parallel.sharded import Sharded

VALIDATION_LOSS = "validation_loss"  # what `train.best_by` calls it; any other name is a metric's


class Reading(NamedTuple):
    """A metric's value with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """All metrics after `step` optimizer steps; 0: of the base model."""

    step: int
    scores: dict[str, Reading]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Measured":
        """What `asdict` and JSON made of one."""
        return cls(values["step"], {name: Reading(*score) for name, score in values["scores"].items()})


@dataclass(frozen=True)
class Watch:
    """Measure before the first step, every `every_steps` and after the last one.

    `measure` changes nothing that training reads: no weight, gradient, mode of a module or random state. All ranks call
    it alike and get the same. `best_by`: what decides which step is the best one, a metric or VALIDATION_LOSS.
    """

    every_steps: int
    measure: Callable[[Sharded], dict[str, Reading]]
    best_by: str = VALIDATION_LOSS
    higher_is_better: bool = False

    def due(self, step: int, steps: int) -> bool:
        """Whether to measure after `step` of `steps`."""
        return step % self.every_steps == 0 or step == steps
