"""Loss spikes, told from the losses of the steps before."""

from collections.abc import Sequence
from statistics import median

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
