"""Which model answers a request: what is served, by name."""

import time
from dataclasses import dataclass, field
from threading import Thread

from ingot.serving import record, trip
from ingot.serving.engine import ClosedError, Engine
from ingot.serving.faults import ApiError
from ingot.serving.versions import Versioned


@dataclass(frozen=True)
class Deployed:
    """A model that is served. `parent`: the base that it is an adapter over. `created`: seconds since 1970."""

    name: str
    engine: Engine
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def task(self) -> str:
        """What it is for."""
        return self.engine.runtime.task


class Deployments:
    """Models by name, some of them with several versions. The first one answers requests that name none."""

    def __init__(self, *served: Deployed | Versioned) -> None:
        self._by_name = {one.name: one for one in served}
        self.held: dict[str, str] = {}  # name -> why this model gets no requests
        if len(self._by_name) < len(served):
            raise ValueError("two served models have one name")

    @property
    def endpoints(self) -> dict[str, Versioned]:
        """Names with several versions."""
        return {name: one for name, one in self._by_name.items() if isinstance(one, Versioned)}

    def all(self) -> list[Deployed]:
        """What callers can name, the default first; of several versions the main one."""
        return [one.main.deployed if isinstance(one, Versioned) else one for one in self._by_name.values()]

    def each(self) -> list[tuple[Deployed, str]]:
        """Every model that is loaded, and the name of the version that it is."""
        found: list[tuple[Deployed, str]] = []
        for one in self._by_name.values():
            if isinstance(one, Versioned):
                found += [(version.deployed, version.name) for version in one.versions.values()]
            else:
                found.append((one, ""))
        return found

    def choose(self, name: str | None = None) -> Deployed:
        """The model that a request means. Raises ApiError: 404, or 503 for one that gets no requests."""
        asked = trip.current()
        if asked.meant is not None:
            found: Deployed = asked.meant
            return found
        if name is None:
            name = next(iter(self._by_name))
        if name not in self._by_name:
            known = ", ".join(map(repr, self._by_name))
            raise ApiError(404, f"no such model; this server has {known}", "not_found_error", "model")
        record.current().model = name
        one = self._by_name[name]
        if isinstance(one, Versioned):
            if asked.endpoint is not one:
                asked.endpoint, asked.version = one, one.choose(asked.id, asked.forced)
            deployed: Deployed = asked.version.deployed
            record.current().task = deployed.task
            return deployed
        if name in self.held:
            raise ApiError(503, f"{name} gets no requests: {self.held[name]}", "overloaded_error")
        record.current().task = one.task
        return one

    def hold(self, deployed: Deployed, reason: str) -> None:
        """Let no request reach a model for this reason; "" lets them again."""
        for one in self._by_name.values():
            if isinstance(one, Versioned):
                for version in one.versions.values():
                    if version.deployed is deployed:
                        version.held = reason
        if self._by_name.get(deployed.name) is deployed:
            self.held[deployed.name] = reason
            if not reason:
                del self.held[deployed.name]

    @property
    def working(self) -> bool:
        """Whether every name has a model at work behind it."""
        return all(
            any(version.weight > 0 and version.deployed.engine.ready for version in one.versions.values())
            if isinstance(one, Versioned)
            else one.engine.ready
            for one in self._by_name.values()
        )

    @property
    def ready(self) -> bool:
        """Whether a request to any of them would be worked on."""
        return self.working and not self.problem()

    def problem(self) -> str:
        """Why requests to one of them are held back, though it works; empty where none are."""
        found = [f"{name}: {reason}" for name, reason in self.held.items()]
        return next(iter([*found, *(one.problem() for one in self.endpoints.values() if not one.ready)]), "")

    def require_ready(self) -> None:
        """Raise ApiError, with what speaks against it, or ClosedError where a request would not be worked on."""
        if problem := self.problem():
            raise ApiError(503, problem, "overloaded_error")
        if not self.working:
            raise ClosedError

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until all have proved that they answer; whether they do."""
        until = time.monotonic() + timeout_s
        return all(one.engine.wait_ready(max(0.0, until - time.monotonic())) for one, _ in self.each())

    def close(self, drain_s: float = 0.0) -> None:
        """Stop their work; what runs has `drain_s` seconds."""
        threads = [Thread(target=one.engine.close, kwargs={"drain_s": drain_s}) for one, _ in self.each()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
