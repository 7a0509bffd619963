"""Which handler answers which route, and the OpenAPI document that says so."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from ingot.model.task_checks import output_schema, params_model, row_model, schema_of
from ingot.serving import openai_answers as answers
from ingot.serving.azure import Azure
from ingot.serving.deployments import Deployments
from ingot.serving.kserve import KServe
from ingot.serving.openai import OpenAI
from ingot.serving.rows import Rows

SCHEMAS = "#/components/schemas/"
try:
    VERSION = version("ingot")
except PackageNotFoundError:  # run from a checkout that was not installed
    VERSION = "0"


class Error(BaseModel):
    """What is wrong. `param`: the field of the request, where there is one."""

    message: str
    type: str
    param: str | None


class Fault(BaseModel):
    """Every answer other than 200."""

    error: Error


WRONG = {
    400: "A field is wrong, unknown, or cannot be honoured by this model.",
    401: "The server wants an API key.",
    403: "The server has no keys, and the request was not sent to localhost.",
    404: "No such model.",
    413: "The body is too large.",
    429: "Too many requests of this key; Retry-After says when.",
    500: "The server failed.",
    503: "The server has no room, is stopping or not ready; Retry-After says when.",
    504: "The time for the request is over.",
}
FAULTS: dict[int | str, dict[str, Any]] = {s: {"model": Fault, "description": text} for s, text in WRONG.items()}
TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
EVENT = {
    "type": "object",
    "description": "Each event's data are a chunk as JSON; the last ones are [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
EVENTS = {"text/event-stream": {"schema": EVENT}}


def _answers(model: type[BaseModel], streams: bool = False) -> dict[int | str, dict[str, Any]]:
    return FAULTS | {200: {"model": model, "description": "Answered."} | ({"content": EVENTS} if streams else {})}


def add_routes(app: FastAPI, deployments: Deployments) -> None:
    """All dialects over what is served, and their description."""
    openai, rows = OpenAI(deployments), Rows(deployments, VERSION)
    azure, kserve = Azure(deployments), KServe(deployments, VERSION)
    chat, text = _answers(answers.ChatCompletion, True), _answers(answers.TextCompletion, True)
    # Azure's image for foundation models has these without /v1.
    for path, handler, found in (("chat/completions", openai.chat, chat), ("completions", openai.completions, text)):
        for prefix in ("/v1/", "/"):
            app.post(prefix + path, response_model=None, responses=found, tags=["OpenAI"])(handler)
    app.post("/v1/embeddings", response_model=None, responses=_answers(answers.Embeddings), tags=["OpenAI"])(
        openai.embeddings
    )
    app.get("/v1/models", response_model=None, responses=_answers(answers.Models), tags=["OpenAI"])(openai.models)
    app.get("/v1/models/{model:path}", response_model=None, responses=_answers(answers.Model), tags=["OpenAI"])(
        openai.model
    )
    app.post("/invocations", response_model=None, responses=FAULTS, tags=["MLflow"])(rows.invocations)
    app.get("/ping", response_model=None, responses=FAULTS | TEXT, tags=["MLflow"])(rows.ping)
    app.get("/version", response_model=None, responses=FAULTS | TEXT, tags=["MLflow"])(rows.version)
    app.post("/score", response_model=None, responses=FAULTS, tags=["Azure ML"])(azure.score)
    for path in ("/score", "/"):
        app.get(path, response_model=None, responses=FAULTS | TEXT, tags=["Azure ML"])(azure.health)

    async def swagger(version: Literal["3"] = "3") -> dict[str, Any]:
        """This document, in that version of OpenAPI."""
        return app.openapi()

    app.get("/swagger.json", response_model=None, responses=FAULTS, tags=["Azure ML"])(swagger)
    _add_kserve(app, kserve)
    app.openapi = lambda: _document(app, deployments)  # type: ignore[method-assign]


def _add_kserve(app: FastAPI, kserve: KServe) -> None:
    options: dict[str, Any] = {"response_model": None, "responses": FAULTS, "tags": ["KServe"]}
    app.get("/v2", **options)(kserve.server)
    app.get("/v2/health/live", **options)(kserve.live)
    app.get("/v2/health/ready", **options)(kserve.ready)
    for place in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        app.get(place, **options)(kserve.model)
        app.get(f"{place}/ready", **options)(kserve.model_ready)
        app.post(f"{place}/infer", **options)(kserve.infer)


def _document(app: FastAPI, deployments: Deployments) -> dict[str, Any]:
    """OpenAPI: what the handlers declare, with the rows, parameters and answers of the tasks that are served."""
    document = get_openapi(title=app.title, version=VERSION, routes=app.routes)
    schemas, paths = document["components"]["schemas"], document["paths"]
    for operations in paths.values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own; here it is a 400
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    names = {"enum": [one.name for one in deployments.all()]}
    for name in ("ChatRequest", "CompletionRequest", "EmbeddingRequest", "InvocationRequest"):
        schemas[name]["properties"]["model"]["anyOf"][0] |= names
    for operations in paths.values():
        for parameter in (one for operation in operations.values() for one in operation.get("parameters", [])):
            if parameter["name"] == "model":
                parameter["schema"] |= names
    tasks = sorted({one.task for one in deployments.all()})
    rows, params = [_added(schemas, _row(task)) for task in tasks], [_added(schemas, _params(task)) for task in tasks]
    bare = [_added(schemas, _bare(task, names)) for task in tasks]
    form = schemas["InvocationRequest"]
    form["additionalProperties"] = False
    form["properties"]["dataframe_records"]["anyOf"][0]["items"] = {"anyOf": rows}
    form["properties"]["params"]["anyOf"][0] = {"anyOf": params}
    body = {"anyOf": [{"$ref": f"{SCHEMAS}InvocationRequest"}, *bare]}
    paths["/invocations"]["post"]["requestBody"]["content"]["application/json"]["schema"] = body
    predictions = {"type": "array", "items": {"anyOf": [output_schema(task) for task in tasks]}}
    answered = {"type": "object", "properties": {"predictions": predictions}, "required": ["predictions"]}
    found = paths["/invocations"]["post"]["responses"]["200"]
    found["content"] = {"application/json": {"schema": {"anyOf": [answered, predictions]}}}
    return document


def _added(schemas: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    schemas.update(schema.pop("$defs", {}))
    schemas[schema["title"]] = schema
    return {"$ref": SCHEMAS + schema["title"]}


def _row(task: str) -> dict[str, Any]:
    """A row, with the other names that its columns may have."""
    schema = row_model(task).model_json_schema(ref_template=SCHEMAS + "{model}")
    for column in schema_of(task).inputs:
        for alias in column.aliases:
            # A column of its own may have the name that is another's alias.
            schema["properties"].setdefault(alias, schema["properties"][column.name])
    schema.pop("required", None)  # by which name is open
    return schema | {"minProperties": 1}


def _params(task: str) -> dict[str, Any]:
    return params_model(task).model_json_schema(ref_template=SCHEMAS + "{model}")


def _bare(task: str, names: dict[str, Any]) -> dict[str, Any]:
    """One row as the body: its parameters beside it."""
    row, params = _row(task), _params(task)
    more = {"model": {"type": "string"} | names, "stream": {"const": False}}
    properties = row["properties"] | params.get("properties", {}) | more
    return row | {"title": f"Bare{row['title']}", "properties": properties}
