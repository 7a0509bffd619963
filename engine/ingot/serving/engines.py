"""Which engine a model gets."""

from ingot.model.runtime import WRITING, Runtime
from ingot.serving.continuous import ContinuousEngine
from ingot.serving.engine import Engine, Limits, Meter
from ingot.serving.static import StaticEngine


def start_engine(runtime: Runtime, limits: Limits | None = None, meter: Meter | None = None) -> Engine:
    """An engine at work: its warm-up has begun."""
    kind = ContinuousEngine if runtime.task in WRITING else StaticEngine
    return kind(runtime, limits, meter)
