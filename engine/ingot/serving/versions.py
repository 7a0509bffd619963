"""Versions of a model behind one name: who answers a request, how each does, and when one loses its requests."""

import hashlib
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from ingot.serving.endpoint_file import EndpointSection, Mirror, Rollback
from ingot.serving.faults import ApiError
from ingot.serving.weights import Weights

log = logging.getLogger("ingot.serve")
SURE = 3.0  # standard errors between two versions' shares of failures: what both suffer alike is seldom so far apart
KEPT_CHANGES = 50
KEPT_REQUESTS = 10_000  # of a window


@dataclass
class Counted:
    """Requests that a version has answered. `seconds`: until the answers began, in all."""

    requests: int = 0
    errors: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, failed: bool) -> None:
        """Count one more."""
        self.requests, self.errors, self.seconds = self.requests + 1, self.errors + failed, self.seconds + seconds


@dataclass
class Copied(Counted):
    """Copies of requests that a version was sent; `skipped`: was not, because too many were under way."""

    compared: int = 0
    different: int = 0
    skipped: int = 0


@dataclass
class Version:
    """One of them. `held`: why it gets no request at all; empty where nothing speaks against it."""

    name: str
    target: str
    deployed: Any
    weight: float
    held: str = "not proved yet"
    rolled_back: str = ""
    answered: Counted = field(default_factory=Counted)
    mirrored: Copied = field(default_factory=Copied)
    window: deque[tuple[float, float, bool]] = field(default_factory=lambda: deque(maxlen=KEPT_REQUESTS))

    @property
    def able(self) -> bool:
        """Whether a request to it would be worked on."""
        return not self.held and bool(self.deployed.engine.ready)

    def since(self, start: float) -> list[tuple[float, float, bool]]:
        """(when, seconds until the answer began, failed) of its requests after `start`."""
        while self.window and self.window[0][0] < start:
            self.window.popleft()
        return list(self.window)


class Versioned:
    """A name with several versions. For the event loop's thread alone.

    `weights`: where decisions are kept for the next start; None keeps none. `clock`: seconds.
    """

    def __init__(
        self,
        section: EndpointSection,
        deployed: Mapping[str, Any],
        weights: Weights | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.mirror, self.rollback = section.name, section.mirror, section.rollback
        self._kept, self._clock = weights, clock
        self.changes: deque[dict[str, Any]] = deque(maxlen=KEPT_CHANGES)
        self.versions = {
            name: Version(name, one.target, deployed[name], one.weight) for name, one in section.versions.items()
        }
        kept = None if weights is None else weights.read(section)
        if kept is not None:
            for name, was in kept["versions"].items():
                self.versions[name].weight, self.versions[name].rolled_back = was["weight"], was["rolled_back"]
            self.mirror = kept["mirror"]
            self.changes.extend(kept["changes"])
            shares = ", ".join(f"{name} {one.weight:g}" for name, one in self.versions.items())
            log.warning("endpoint %s goes on with the weights of its last change: %s", self.name, shares)
        self._section = section

    # --- who answers --------------------------------------------------------------------------------------------------

    @property
    def main(self) -> Version:
        """The version with the largest share."""
        return max(self.versions.values(), key=lambda one: one.weight)

    @property
    def ready(self) -> bool:
        """Whether a request would be worked on."""
        return any(one.weight > 0 and one.able for one in self.versions.values())

    def choose(self, request_id: str, forced: str | None = None) -> Version:
        """The version for a request: one id always gets the same while weights stay. Raises ApiError, 400 or 503."""
        if forced is not None:
            if forced not in self.versions:
                known = ", ".join(self.versions)
                raise ApiError(400, f"x-ingot-version: there is no such version; use one of: {known}", *_BAD)
            if self.versions[forced].held:
                raise ApiError(503, f"version {forced} gets no requests: {self.versions[forced].held}", *_DOWN)
            return self.versions[forced]
        ways = [one for one in self.versions.values() if one.weight > 0 and one.able]
        if not ways:
            raise ApiError(503, self.problem(), *_DOWN)
        place = share_of(self.name, request_id) * sum(one.weight for one in ways)
        for one in ways:
            place -= one.weight
            if place < 0:
                return one
        return ways[-1]

    def copied(self, request_id: str, answered_by: Version) -> Version | None:
        """The version that is to get a copy of this request."""
        if self.mirror is None or self.mirror.version == answered_by.name:
            return None
        other = self.versions[self.mirror.version]
        wanted = share_of(f"{self.name} mirror", request_id) * 100.0 < self.mirror.percent
        return other if wanted and other.able else None

    def problem(self) -> str:
        """Why no version answers."""
        held = {f"{one.name}: {one.held}" for one in self.versions.values() if one.held and one.weight > 0}
        return f"endpoint {self.name}: " + ("; ".join(sorted(held)) or "the versions that have a weight are stopping")

    # --- how they do --------------------------------------------------------------------------------------------------

    def answered(self, version: Version, seconds: float, failed: bool) -> None:
        """Note a request that `version` has answered; roll it back where that was one too many."""
        version.answered.add(seconds, failed)
        version.window.append((self._clock(), seconds, failed))
        if self.rollback is not None and version.weight > 0 and (why := self._verdict(version, self.rollback)):
            self.roll_back(version.name, why, by="itself")

    def _verdict(self, version: Version, rule: Rollback) -> str:
        """Why `version` is worse than the others by the rule; empty where it is not, or where no other could answer."""
        start = self._clock() - rule.window_s
        own = version.since(start)
        others = [one for one in self.versions.values() if one is not version and one.weight > 0 and one.able]
        if len(own) < rule.min_requests or not others:
            return ""
        theirs = [it for one in others for it in one.since(start)]
        rate, their_rate = (sum(it[2] for it in them) / max(1, len(them)) for them in (own, theirs))
        both = (sum(it[2] for it in own) + sum(it[2] for it in theirs)) / (len(own) + len(theirs))
        chance = math.sqrt(both * (1.0 - both) * (1.0 / len(own) + 1.0 / max(1, len(theirs))))
        if rate - their_rate > max(rule.error_rate, SURE * chance):
            failed = sum(it[2] for it in own)
            return f"{failed} of its last {len(own)} requests failed ({rate:.1%}; others {their_rate:.1%})"
        if rule.latency_ratio is None or len(theirs) < rule.min_requests:
            return ""
        slow, usual = (statistics.median(it[1] for it in them) for them in (own, theirs))
        if slow > rule.latency_ratio * usual:
            return f"its median latency is {slow:.3f} s, {slow / max(usual, 1e-9):.1f} times that of the others"
        return ""

    # --- changes ------------------------------------------------------------------------------------------------------

    def roll_back(self, name: str, why: str, *, by: str) -> None:
        """Give the requests of a version to the others; what it has begun it finishes. Raises ApiError, 409, where no
        other could answer.
        """
        version = self._known(name)
        others = [one for one in self.versions.values() if one is not version and one.able]
        if not others:
            raise ApiError(409, f"no other version of {self.name} could answer in its place", *_BAD)
        if not any(one.weight > 0 for one in others):
            others[0].weight = version.weight
        version.weight, version.rolled_back = 0.0, why
        version.window.clear()
        self._changed("rolled back", name, why, by)

    def promote(self, name: str, *, by: str) -> None:
        """Give all requests to one version. Raises ApiError, 409, for one that is held."""
        version = self._known(name)
        self._require(version)
        for one in self.versions.values():
            one.weight = 100.0 if one is version else 0.0
        version.rolled_back = ""
        if self.mirror is not None and self.mirror.version == name:
            self.mirror = None
        self._changed("promoted", name, "", by)

    def weigh(self, weights: Mapping[str, float], *, by: str) -> None:
        """Set the weights of some versions. Raises ApiError: 400 for an unknown one, 409 for one that is held."""
        after = {one.name: one.weight for one in self.versions.values()} | dict(weights)
        for name, weight in weights.items():
            if weight > 0:
                self._require(self._known(name))
            self._known(name)
        if not any(after.values()):
            raise ApiError(400, "weights: no version would be left with a weight above 0", *_BAD)
        for name, weight in weights.items():
            version = self.versions[name]
            if weight > 0 and version.weight == 0:
                version.window.clear()
                version.rolled_back = ""
            version.weight = weight
        self._changed("weighed", "", ", ".join(f"{name} {weight:g}" for name, weight in after.items()), by)

    def mirror_to(self, mirror: Mirror | None, *, by: str) -> None:
        """Send copies to another version, or another share of them; None: no more. Raises ApiError, 400, for a version
        that is unknown.
        """
        if mirror is not None:
            self._known(mirror.version)
        self.mirror = mirror
        why = "" if mirror is None else f"{mirror.percent:g} % of the requests"
        self._changed("mirrored", "" if mirror is None else mirror.version, why, by)

    def _known(self, name: str) -> Version:
        if name not in self.versions:
            known = ", ".join(self.versions)
            raise ApiError(400, f"version: there is no such version; use one of: {known}", *_BAD)
        return self.versions[name]

    def _require(self, version: Version) -> None:
        if version.held:
            raise ApiError(409, f"version {version.name} gets no requests: {version.held}", *_BAD)

    def _changed(self, what: str, version: str, why: str, by: str) -> None:
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        shares = {one.name: one.weight for one in self.versions.values()}
        self.changes.append({"at": at, "what": what, "version": version, "why": why, "by": by, "weights": shares})
        log.warning("endpoint %s: %s %s by %s; %s; weights now %s", self.name, what, version, by, why or "-", shares)
        if self._kept is not None:
            self._kept.write(self._section, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "name": self.name,
            "mirror": None if self.mirror is None else self.mirror.model_dump(),
            "rollback": None if self.rollback is None else self.rollback.model_dump(),
            "versions": {
                one.name: {
                    "target": one.target,
                    "weight": one.weight,
                    "ready": one.able,
                    "held": one.held,
                    "rolled_back": one.rolled_back,
                    "answered": asdict(one.answered),
                    "mirrored": asdict(one.mirrored),
                }
                for one in self.versions.values()
            },
            "changes": list(self.changes),
        }


_BAD, _DOWN = ("invalid_request_error", "version"), ("overloaded_error", None)


def share_of(name: str, request_id: str) -> float:
    """A number in [0, 1) that depends on these alone."""
    digest = hashlib.sha256(f"{name}\n{request_id}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56
