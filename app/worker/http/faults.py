"""Every exception's status and envelope: vLLM's, so that its clients understand ours."""

from __future__ import annotations

import logging
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from app.errors import BodyTooLarge, InvalidRequest, LoragateError, NotFound
from app.worker.errors import AdapterRefused, Malformed

logger = logging.getLogger(__name__)

INTERNAL = (500, "InternalServerError")
STATUS: dict[type[BaseException], tuple[int, str]] = {
    LoragateError: INTERNAL,
    InvalidRequest: (400, "BadRequestError"),
    Malformed: (400, "Bad Request"),
    AdapterRefused: (400, "InvalidUserInput"),
    BodyTooLarge: (413, "Request Entity Too Large"),
    NotFound: (404, "NotFoundError"),
}
REPORTED_ERRORS = 10
REPORTED_CHARACTERS = 200


def envelope(exc: BaseException) -> dict[str, dict[str, Any]]:
    """The body of an error; what is not ours says nothing of its insides."""
    status, kind = _status(exc)
    message, param = "Internal server error", None
    if isinstance(exc, LoragateError):
        message, param = str(exc), exc.param
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


async def answer(request: Request, exc: Exception) -> Response:
    """Starlette's handler for every exception a route lets out."""
    body = envelope(exc)
    if not isinstance(exc, LoragateError):
        logger.error("request failed", exc_info=exc)
    return JSONResponse(body, status_code=body["error"]["code"])


def malformed(exc: ValidationError) -> Malformed:
    """Pydantic's findings, the first of them naming the parameter; values are cut short."""
    found = exc.errors(include_url=False, include_context=False)
    label = "error" if len(found) == 1 else "errors"
    lines = [f"{len(found)} validation {label}:"]
    for one in found[:REPORTED_ERRORS]:
        value = str(one["input"])[:REPORTED_CHARACTERS]
        lines.append(f"  {_place(one['loc'])}: {one['msg']} (got {value})")
    return Malformed("\n".join(lines), param=_place(found[0]["loc"]))


def _place(location: tuple[int | str, ...]) -> str:
    """The field, without the names pydantic gives the branches of a union."""
    branches = {"str", "int", "float", "bool", "list", "dict", "TokenizeText", "TokenizeChat"}
    parts = [str(part) for part in location if isinstance(part, int) or part.isidentifier()]
    return ".".join(["body", *(part for part in parts if part not in branches)])


def _status(exc: BaseException) -> tuple[int, str]:
    for kind in type(exc).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return INTERNAL
