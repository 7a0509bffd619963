"""What Prometheus reads of versions: weights, what each has answered, and what copies of requests came to."""

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ingot.serving.deployments import Deployments
from ingot.serving.versions import Version

GAUGES: dict[str, tuple[str, Callable[[Version], float]]] = {
    "ingot_version_weight": ("Share of an endpoint's requests, relative to its other versions.", lambda it: it.weight),
    "ingot_version_ready": ("Whether requests to it would be worked on.", lambda it: float(it.able)),
    "ingot_version_rolled_back": (
        "Whether it has lost its requests to others.",
        lambda it: float(bool(it.rolled_back)),
    ),
}
COUNTERS: dict[str, tuple[str, Callable[[Version], float]]] = {
    "ingot_version_requests": ("Requests that it has answered.", lambda it: it.answered.requests),
    "ingot_version_errors": ("Of them, those that it failed.", lambda it: it.answered.errors),
    "ingot_version_seconds": ("Until their answers began, in all.", lambda it: it.answered.seconds),
    "ingot_mirror_requests": ("Copies of others' requests that it was sent.", lambda it: it.mirrored.requests),
    "ingot_mirror_errors": ("Of them, those that it failed.", lambda it: it.mirrored.errors),
    "ingot_mirror_seconds": ("Until their answers began, in all.", lambda it: it.mirrored.seconds),
    "ingot_mirror_compared": ("Of them, those whose answers were compared.", lambda it: it.mirrored.compared),
    "ingot_mirror_different": ("Of those, the ones with another answer.", lambda it: it.mirrored.different),
    "ingot_mirror_skipped": ("Copies left out, as too many were under way.", lambda it: it.mirrored.skipped),
}


class VersionStates(Collector):
    """Every version of every endpoint, whenever the page is read."""

    def __init__(self, deployments: Deployments) -> None:
        self._deployments = deployments

    def collect(self) -> Iterable[Any]:
        """One family a number, one sample a version."""
        for family, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, (text, value) in table.items():
                found: Any = family(name, text, labels=["endpoint", "version"])
                for endpoint in self._deployments.endpoints.values():
                    for version in endpoint.versions.values():
                        found.add_metric([endpoint.name, version.name], value(version))
                yield found
