"""Errors as HTTP carries them: one shape, with the remedy, and nothing of what was going on inside."""

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lora.errors import (
    Busy,
    ConfigError,
    DataError,
    Denied,
    LetheError,
    ModelError,
    RunError,
    Unavailable,
    Unknown,
    WrongUpdate,
)
from server.service.bodies import Problem, ProblemBody
from server.service.identity import NoKey, TooMany
from strategies.personal.events import EventRefused

log = logging.getLogger("lethe.service")

TOO_LARGE = "PayloadTooLarge"
_STATUS: tuple[tuple[type[LetheError], int], ...] = (
    (NoKey, 401),
    (Denied, 403),
    (Unknown, 404),
    (TooMany, 429),
    (Busy, 503),
    (Unavailable, 503),
    (RunError, 503),
    (DataError, 422),
    (ConfigError, 422),
    (ModelError, 422),
    (WrongUpdate, 422),
)
_KINDS = {400: "BadRequest", 404: "NoSuchRoute", 405: "MethodNotAllowed", 413: TOO_LARGE}
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    400: {"model": ProblemBody, "description": "The body cannot be read"},
    401: {"model": ProblemBody, "description": "No valid API key"},
    403: {"model": ProblemBody, "description": "The key does not open this"},
    404: {"model": ProblemBody, "description": "There is no such user, adapter or request"},
    409: {"model": ProblemBody, "description": "What is there already contradicts the request"},
    413: {"model": ProblemBody, "description": "The body is too large"},
    422: {"model": ProblemBody, "description": "The request is wrong"},
    429: {"model": ProblemBody, "description": "Too many requests of this key; Retry-After says when"},
    503: {"model": ProblemBody, "description": "Too much is waiting, or database or disk fail; Retry-After says when"},
}


def status_of(error: LetheError) -> int:
    """Return the HTTP status of an error."""
    if isinstance(error, EventRefused) and error.reason in ("duplicate", "backwards"):
        return 409
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def problem(kind: str, message: str) -> dict[str, Any]:
    """Return an error's body; the remedy is what follows the last semicolon."""
    what, _, remedy = message.rpartition("; ")
    # Half of a surrogate pair, which JSON may carry, is no text that can be sent back.
    clean = message.encode("utf-8", "replace").decode()
    told = remedy.encode("utf-8", "replace").decode() if what else None
    return ProblemBody(error=Problem(type=kind, message=clean, remedy=told)).model_dump()


def answer_of(error: LetheError) -> JSONResponse:
    """Return the response to an error."""
    status, headers = status_of(error), {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(getattr(error, "retry_after", 1.0))))
    if status == 500:
        log.error("a request failed: %s", type(error).__name__)
    return JSONResponse(problem(type(error).__name__, str(error)), status, headers)


def install(app: FastAPI) -> None:
    """Have every error of an app answered in the one shape."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        return answer_of(error) if isinstance(error, LetheError) else await unknown(_, error)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        found = error.errors() if isinstance(error, RequestValidationError) else []
        return JSONResponse(problem("RequestError", faults(found)), 422)

    async def routed(_: Request, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 500
        detail = str(error.detail) if isinstance(error, HTTPException) else "error"
        headers = error.headers if isinstance(error, HTTPException) else None
        message = f"{detail.lower()}; GET /openapi.json lists what there is"
        return JSONResponse(problem(_KINDS.get(status, "RequestError"), message), status, dict(headers or {}))

    async def unknown(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        told = "something went wrong here, which is in the log; ask again, or report it"
        return JSONResponse(problem("InternalError", told), 500)

    app.add_exception_handler(LetheError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, routed)
    app.add_exception_handler(Exception, unknown)


def faults(found: Any) -> str:
    """Name every fault at its place; values are not repeated, since they may be long, or private."""
    lines = [f"{'.'.join(str(part) for part in each['loc'])}: {each['msg'].lower()}" for each in found[:10]]
    return f"{'; '.join(lines) or 'the request is wrong'}; GET /openapi.json says what is expected"
