"""Answers other than 200, in OpenAI's form: they name the field and never repeat the input."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ingot.model.sampling import InputError
from ingot.serving.engine import ClosedError, DeadlineError, QueueFullError
from ingot.serving.record import current

RETRY_AFTER_S = 2
LONGEST = 1000  # characters of what is wrong: a field's name may be the caller's, and as long as its body


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, message: str, kind: str, param: str | None = None, retry_after_s: int = RETRY_AFTER_S
    ) -> None:
        self.status, self.message, self.kind, self.param = status, message, kind, param
        self.retry_after_s = retry_after_s


def error_response(
    status: int, message: str, kind: str, param: str | None = None, retry_after_s: int = RETRY_AFTER_S
) -> JSONResponse:
    headers = {"Retry-After": str(retry_after_s)} if status in (429, 503) else {}
    told = {"message": _short(message), "type": kind, "param": None if param is None else _short(param)}
    return JSONResponse({"error": told}, status, headers)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error_response(error.status, error.message, error.kind, error.param, error.retry_after_s)

    @app.exception_handler(InputError)
    async def input_error(_: Request, error: InputError) -> JSONResponse:
        return error_response(400, str(error), "invalid_request_error", error.field)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(400, "the body is not valid JSON", "invalid_request_error")
        if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type"):
            needs = "the body must be a JSON object, sent with Content-Type: application/json"
            return error_response(400, needs, "invalid_request_error")
        # A union reports the tried types as parts of the place: only fields and positions are of use to a caller.
        place = [str(part) for part in first["loc"][1:] if isinstance(part, int) or str(part).isidentifier()]
        place = [part for part in place if part not in ("str", "list")]
        message = {"extra_forbidden": "this field is not supported"}.get(
            first["type"], first["msg"].removeprefix("Value error, ")
        )
        field = ".".join(place) or None
        return error_response(400, f"{field}: {message}" if field else message, "invalid_request_error", field)

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> JSONResponse:
        current().cause = error.cause
        what = f"too many {error.cause} are waiting; try again in {error.retry_after_s} s"
        return error_response(503, what, "overloaded_error", retry_after_s=error.retry_after_s)

    @app.exception_handler(ClosedError)
    async def closed(_: Request, error: ClosedError) -> JSONResponse:
        current().cause = "closed"
        return error_response(503, "the server is starting or stopping", "overloaded_error")

    @app.exception_handler(DeadlineError)
    async def late(_: Request, error: DeadlineError) -> JSONResponse:
        return error_response(504, "the time for this request is over, and its work was stopped", "timeout_error")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), "invalid_request_error")
