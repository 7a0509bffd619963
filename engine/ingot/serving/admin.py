"""/admin: the weights of versions, changed while they serve. Off unless asked for; for this machine and one key."""

import hmac
import ipaddress
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from ingot.serving.deployments import Deployments
from ingot.serving.endpoint_file import Mirror
from ingot.serving.faults import ApiError
from ingot.serving.versions import Versioned

KEY_HEADER = "x-ingot-admin-key"
FORWARDING = ("forwarded", "x-forwarded-for", "x-real-ip")


class Body(BaseModel):
    """Base of all bodies: no unknown fields."""

    model_config = ConfigDict(extra="forbid")


class Weighing(Body):
    """PUT /admin/endpoints/NAME: what is given is set. `mirror`: null ends mirroring."""

    weights: dict[str, float] = Field(default_factory=dict)
    mirror: Mirror | None = None


class Named(Body):
    """Which version is promoted."""

    version: str


class Reasoned(Named):
    """Which version is rolled back, and why."""

    reason: str = Field(default="by hand", max_length=200)


class Admin:
    """The handlers over what is served."""

    def __init__(self, deployments: Deployments, key: str) -> None:
        self.deployments, self._key = deployments, key

    def add_to(self, app: FastAPI) -> None:
        """Put the routes into `app`."""
        app.get("/admin/endpoints")(self.endpoints)
        app.get("/admin/endpoints/{name}")(self.endpoint)
        app.put("/admin/endpoints/{name}")(self.weigh)
        app.post("/admin/endpoints/{name}/promote")(self.promote)
        app.post("/admin/endpoints/{name}/rollback")(self.roll_back)

    def _check(self, request: Request) -> None:
        host = request.client.host if request.client is not None else ""
        try:
            near = ipaddress.ip_address(host).is_loopback
        except ValueError:
            near = False
        # A proxy on this machine speaks for others.
        if not near or any(header in request.headers for header in FORWARDING):
            raise ApiError(403, "/admin answers on this machine only", "permission_error")
        sent = request.headers.get(KEY_HEADER, "").encode("utf-8", "replace")
        if not hmac.compare_digest(sent, self._key.encode()):
            raise ApiError(401, f"a valid key is needed: {KEY_HEADER}: KEY", "authentication_error")

    def _endpoint(self, request: Request, name: str) -> Versioned:
        self._check(request)
        endpoints = self.deployments.endpoints
        if name not in endpoints:
            known = ", ".join(endpoints) or "none"
            raise ApiError(404, f"no such endpoint of several versions; this server has: {known}", "not_found_error")
        return endpoints[name]

    async def endpoints(self, request: Request) -> dict[str, Any]:
        """GET /admin/endpoints."""
        self._check(request)
        return {"endpoints": [one.as_dict() for one in self.deployments.endpoints.values()]}

    async def endpoint(self, request: Request, name: str) -> dict[str, Any]:
        """GET /admin/endpoints/NAME."""
        return self._endpoint(request, name).as_dict()

    async def weigh(self, request: Request, name: str, body: Weighing) -> dict[str, Any]:
        """PUT /admin/endpoints/NAME."""
        endpoint = self._endpoint(request, name)
        if any(not 0.0 <= weight < float("inf") for weight in body.weights.values()):
            raise ApiError(400, "weights: each must be a number of 0 or more", "invalid_request_error", "weights")
        if body.mirror is not None and body.mirror.version not in endpoint.versions:
            raise ApiError(400, "mirror.version: there is no such version", "invalid_request_error", "mirror.version")
        if body.weights:
            endpoint.weigh(body.weights, by="admin")
        if "mirror" in body.model_fields_set:
            endpoint.mirror_to(body.mirror, by="admin")
        return endpoint.as_dict()

    async def promote(self, request: Request, name: str, body: Named) -> dict[str, Any]:
        """POST /admin/endpoints/NAME/promote."""
        endpoint = self._endpoint(request, name)
        endpoint.promote(body.version, by="admin")
        return endpoint.as_dict()

    async def roll_back(self, request: Request, name: str, body: Reasoned) -> dict[str, Any]:
        """POST /admin/endpoints/NAME/rollback."""
        endpoint = self._endpoint(request, name)
        endpoint.roll_back(body.version, body.reason, by="admin")
        return endpoint.as_dict()
