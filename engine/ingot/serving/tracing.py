"""A span for each request, sent to a collector by OpenTelemetry (`pip install ingot[otel]`); nothing of its texts."""

import logging
import os
import threading
import time
from typing import Any

from starlette.types import Scope

from ingot.errors import MissingPackage, ServeError
from ingot.serving.record import Record

VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PATH = "/v1/traces"  # behind a collector's address
CLOSE_S = 2.0  # for the last spans: to a collector that is gone OpenTelemetry's exporter tries for 10 s
# What OpenTelemetry's conventions for generative models call it -> the tasks that do it.
OPERATIONS = {
    "chat-completion": "chat",
    "text-generation": "text_completion",
    "language-modeling": "text_completion",
    "embeddings": "embeddings",
}
log = logging.getLogger("ingot.serve")


class Traces:
    """Spans of requests. The caller's own trace (W3C `traceparent`) goes on in them."""

    def __init__(self, exporter: Any) -> None:
        """`exporter`: one of OpenTelemetry's for spans."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        # Not the process's own provider: other libraries send their spans where they were told to.
        self._provider = TracerProvider(resource=Resource.create({} if named else {"service.name": "ingot"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("ingot.serving")
        self._context, self._kind = TraceContextTextMapPropagator(), SpanKind.SERVER
        self._error = Status(StatusCode.ERROR)

    def span(self, scope: Scope, record: Record, status: int) -> None:
        """Tell of a request that has ended just now."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        ended = time.time_ns()
        span = self._tracer.start_span(
            f"{scope['method']} {record.route}",
            context=self._context.extract(headers),
            kind=self._kind,
            attributes=_attributes(scope, record, status),
            start_time=ended - int((time.monotonic() - record.began) * 1e9),
        )
        if status >= 500:
            span.set_status(self._error)
        span.end(ended)

    def close(self) -> None:
        """Send what is left, for two seconds at most."""
        # `shutdown` takes no time limit, and the one that `force_flush` takes is not kept (SDK 1.45.2).
        closing = threading.Thread(target=self._provider.shutdown, name="ingot-traces", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            log.warning("the collector did not take the last spans within %g s; they are lost", CLOSE_S)


def _attributes(scope: Scope, record: Record, status: int) -> dict[str, str | int | float]:
    told: dict[str, str | int | float] = {
        "http.request.method": scope["method"],
        "http.route": record.route,
        "http.response.status_code": status,
        "ingot.request.id": record.id,
    }
    if status >= 400:
        told["error.type"] = record.cause or str(status)
    if not record.task:
        return told
    told |= {
        "ingot.task": record.task,
        "gen_ai.provider.name": "ingot",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.new_tokens,
    }
    if record.task in OPERATIONS:
        told["gen_ai.operation.name"] = OPERATIONS[record.task]
    if record.first_s is not None:
        told["gen_ai.response.time_to_first_chunk"] = record.first_s
    return told


def traces_to(collector: str | None) -> Traces | None:
    """Spans for `collector` (OTLP over HTTP), else for the one that OpenTelemetry's variables name; None without one.

    Raises ServeError for an address that is none, MissingPackage.
    """
    if collector is None and not any(os.environ.get(name) for name in VARIABLES):
        return None
    if collector is not None and not collector.startswith(("http://", "https://")):
        raise ServeError("--otel", collector, "give a collector's address for OTLP over HTTP: http://HOST:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        if collector is not None:
            raise MissingPackage("'ingot[otel]'", "serve --otel") from error
        log.warning("no traces are sent, though %s is set: pip install 'ingot[otel]'", VARIABLES[1])
        return None
    if collector is None:
        return Traces(OTLPSpanExporter())
    return Traces(OTLPSpanExporter(endpoint=collector.rstrip("/").removesuffix(PATH) + PATH))
