"""What Prometheus reads at /metrics: the state of the engines, their times and tokens, and what became of requests."""

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ingot.serving.deployments import Deployments
from ingot.serving.engine import Load, Meter

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
WHOLE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
GAUGES: dict[str, tuple[str, Callable[[Load], int]]] = {
    "ingot_queue_requests": ("Requests that wait.", lambda load: load.queue),
    "ingot_queue_tokens": ("Tokens of requests that wait, and may be written.", lambda load: load.waiting_tokens),
    "ingot_running_rows": ("Rows that are being worked on.", lambda load: load.running),
    "ingot_cache_tokens": ("Tokens whose keys and values are held, padding counted.", lambda load: load.tokens),
    "ingot_cache_tokens_limit": ("Most of them.", lambda load: load.tokens_limit),
}


class Metrics:
    """A registry of its own: nothing of the process or of other libraries is in it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

        self.requests = counter("ingot_requests_total", "Answered requests.", "route", "status")
        self.seconds = histogram("ingot_request_seconds", "From the request to its answer's end.", WHOLE_S, "route")
        self.rejects = counter("ingot_rejects_total", "Requests without an answer, by cause.", "model", "cause")
        self.first = histogram(
            "ingot_time_to_first_token_seconds", "From the request to its first token or answer.", FIRST_S, "model"
        )
        self.between = histogram("ingot_inter_token_seconds", "Between two tokens of a row.", BETWEEN_S, "model")
        self.prompt_tokens = counter("ingot_prompt_tokens_total", "Tokens of prompts that were run.", "model")
        self.new_tokens = counter("ingot_generated_tokens_total", "Tokens that were written.", "model")

    def of(self, model: str) -> "ModelMeter":
        """What an engine tells about this model."""
        return ModelMeter(self, model)

    def watch(self, deployments: Deployments) -> None:
        """Read the state of these engines whenever the page is read."""
        self.registry.register(_Loads(deployments))

    def page(self) -> bytes:
        """Prometheus' text."""
        return generate_latest(self.registry)


class ModelMeter(Meter):
    """Counts for one model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._rejects, self._model = metrics.rejects, model
        self._first, self._between = metrics.first.labels(model), metrics.between.labels(model)
        self._prompt, self._new = metrics.prompt_tokens.labels(model), metrics.new_tokens.labels(model)

    def entered(self, prompt_tokens: int) -> None:
        """A prompt was run."""
        self._prompt.inc(prompt_tokens)

    def first(self, seconds: float) -> None:
        """A request has its first token."""
        self._first.observe(seconds)

    def between(self, seconds: float, rows: int) -> None:
        """Rows have a further token."""
        for _ in range(rows):
            self._between.observe(seconds)

    def written(self, tokens: int) -> None:
        """Tokens were written."""
        self._new.inc(tokens)

    def refused(self, cause: str) -> None:
        """A request was not answered."""
        self._rejects.labels(self._model, cause).inc()


class _Loads(Collector):
    def __init__(self, deployments: Deployments) -> None:
        self._deployments = deployments

    def collect(self) -> Iterable[Any]:
        """One gauge a number, one sample a model."""
        loads: list[tuple[str, Load]] = [
            (f"{one.name}@{version}" if version else one.name, one.engine.load())
            for one, version in self._deployments.each()
        ]
        for name, (text, value) in GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for model, load in loads:
                gauge.add_metric([model], value(load))
            yield gauge
