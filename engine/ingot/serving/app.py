"""The application: routes over what is served, and what every request passes first."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response

from ingot.serving.admin import Admin
from ingot.serving.deployments import Deployed, Deployments
from ingot.serving.faults import add_error_handlers
from ingot.serving.gate import Gate, Rules
from ingot.serving.metrics import CONTENT_TYPE, Metrics
from ingot.serving.replay import Stored, prove
from ingot.serving.routes import add_routes
from ingot.serving.routing import Routing
from ingot.serving.tracing import Traces
from ingot.serving.version_metrics import VersionStates

WARM_UP_S = 120.0


class Probes:
    """Whether the server is alive, and whether it would work on a request."""

    def __init__(self, deployments: Deployments) -> None:
        self.deployments = deployments

    async def health(self) -> dict[str, str]:
        """GET /health: the process is alive."""
        return {"status": "alive"}

    async def ready(self) -> dict[str, str]:
        """GET /ready: every model has proved that it answers, and a request sent now would be worked on."""
        self.deployments.require_ready()
        return {"status": "ready"}


def create_app(
    deployments: Deployments,
    *,
    rules: Rules | None = None,
    metrics: Metrics | None = None,
    traces: Traces | None = None,
    admin_key: str | None = None,
    stored: Mapping[Deployed, Sequence[Stored]] | None = None,
    started: Callable[[asyncio.AbstractEventLoop], None] | None = None,
) -> FastAPI:
    """The application over what is served. `metrics`: those that the engines were given meters of; `traces`: where
    spans of requests go.

    `admin_key`: /admin is there, for who sends it. `stored`: rows that a model must answer as stored before it gets
    requests. `started` is called with what answers requests, and waited for, once they would be answered.
    """
    routing = Routing(deployments)
    metrics = metrics or Metrics()
    metrics.watch(deployments)
    metrics.registry.register(VersionStates(deployments))
    probes = Probes(deployments)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(deployments.wait_ready, WARM_UP_S)
        await prove(routing, deployments, stored or {})
        if started is not None:
            await asyncio.to_thread(started, asyncio.get_running_loop())
        yield
        deployments.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)

    app = FastAPI(title="Ingot", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.deployments = deployments
    app.add_middleware(routing.over)  # type: ignore[arg-type]  # what makes a middleware need not be a class
    app.add_middleware(Gate, rules=rules or Rules(), metrics=metrics, traces=traces)
    add_error_handlers(app)
    add_routes(app, deployments)
    app.get("/health")(probes.health)
    app.get("/ready")(probes.ready)
    app.get("/metrics", include_in_schema=False)(lambda: Response(metrics.page(), media_type=CONTENT_TYPE))
    if admin_key is not None:
        Admin(deployments, admin_key).add_to(app)
    return app
