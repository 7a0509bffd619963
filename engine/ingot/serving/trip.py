"""What a request carries on its way to a version, and which one it came to."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ingot.serving.record import new_id


@dataclass
class Trip:
    """One request. `id` decides on the version; `forced` names it; `meant` is a model whatever else is said."""

    id: str = field(default_factory=new_id)
    forced: str | None = None
    meant: Any = None
    endpoint: Any = None
    version: Any = None


_current: ContextVar[Trip | None] = ContextVar("ingot_trip", default=None)


def begin(trip: Trip) -> None:
    """Make `trip` that of everything that this task goes on to do."""
    _current.set(trip)


def current() -> Trip:
    """The trip of the request that this task answers; a new one outside of a request."""
    return _current.get() or Trip()
