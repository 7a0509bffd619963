"""Routes as MLflow's own server has them: rows of any task."""

from fastapi.responses import JSONResponse, PlainTextResponse

from ingot.model.task_checks import schema_of
from ingot.serving.deployments import Deployments
from ingot.serving.schemas import InvocationRequest


class Rows:
    """The handlers over what is served. `version`: the server's."""

    def __init__(self, deployments: Deployments, version: str) -> None:
        self.deployments, self._version = deployments, version

    async def invocations(self, body: InvocationRequest) -> JSONResponse:
        """Answer rows of columns, one record each: as `predictions`, or by themselves to an unwrapped body."""
        model = self.deployments.choose(body.model)
        rows, params = body.read(schema_of(model.task))
        answers = await model.engine.answer(rows, params)
        # A response of its own: FastAPI would look through every value for what JSON cannot hold.
        return JSONResponse(answers if body.unwrapped else {"predictions": answers})

    async def ping(self) -> PlainTextResponse:
        """Whether a request sent now would be worked on."""
        self.deployments.require_ready()
        return PlainTextResponse("\n")

    async def version(self) -> PlainTextResponse:
        """The server's version."""
        return PlainTextResponse(self._version)
