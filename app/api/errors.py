"""Error class -> HTTP status and OpenAI's error envelope. The one place that knows both.

What comes in: an exception. What goes out: `{"error": {message, type, param, code}}`, its status
and its headers, which make the `openai` client raise the class its users expect. The front door
calls `status_of`, `headers_of` and `envelope_bytes`; `install` teaches FastAPI the same.
What it must not know: what any error is about.
"""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app import errors, telemetry
from app.api.edge import Edge

logger = logging.getLogger(__name__)

_CALLER = "invalid_request_error"
_SERVER = "server_error"

#: Error class -> (HTTP status, the `type` OpenAI uses for it). A class not listed has its parent's.
KINDS: dict[type[errors.LoragateError], tuple[int, str]] = {
    errors.LoragateError: (500, _SERVER),
    errors.RequestError: (400, _CALLER),
    errors.InvalidRequest: (400, _CALLER),
    errors.InvalidJson: (400, _CALLER),
    errors.BodyTooLarge: (413, _CALLER),
    errors.Unauthenticated: (401, _CALLER),
    errors.Forbidden: (403, _CALLER),
    errors.ModelNotAllowed: (403, _CALLER),
    errors.NotFound: (404, _CALLER),
    errors.ModelNotFound: (404, _CALLER),
    errors.MethodNotAllowed: (405, _CALLER),
    errors.Conflict: (409, _CALLER),
    errors.AdapterRejected: (422, _CALLER),
    errors.InvalidTrainingFile: (400, _CALLER),
    errors.NotTrainable: (400, _CALLER),
    errors.TrainingFailed: (422, _CALLER),
    errors.NonFiniteLoss: (422, _CALLER),
    errors.OutOfMemory: (422, _CALLER),
    errors.PromptLogprobsUnsupported: (422, _CALLER),
    errors.NoReplicaAvailable: (503, _SERVER),
    errors.PoolFull: (503, _SERVER),
    errors.AdapterQueueFull: (429, _CALLER),
    errors.DeadlineExceeded: (504, _SERVER),
    errors.AdapterLoadFailed: (502, _SERVER),
    errors.ProbeFailed: (502, _SERVER),
    errors.UpstreamError: (502, _SERVER),
    errors.UpstreamRefused: (503, _SERVER),
    errors.UpstreamTimeout: (504, _SERVER),
    errors.UpstreamBroke: (502, _SERVER),
    errors.TrainerError: (502, _SERVER),
    errors.TrainerUnavailable: (503, _SERVER),
    errors.RunLost: (502, _SERVER),
    errors.TrainerBusy: (503, _SERVER),
    errors.Fenced: (409, _CALLER),
    errors.SourceUnavailable: (502, _SERVER),
    errors.StorageUnavailable: (503, _SERVER),
    errors.ConfigurationError: (500, _SERVER),
}

#: The `openai` client repeats 409 and 5xx by itself; here that would only say the same again.
_FINAL = (errors.Conflict, errors.AdapterLoadFailed, errors.DeadlineExceeded)

_JSON = "application/json"


def status_of(exc: BaseException) -> int:
    """The HTTP status that says `exc`."""
    return _kind(exc)[0]


def envelope(exc: BaseException) -> dict[str, Any]:
    """OpenAI's error object for `exc`. An error nobody planned for shows only the request id."""
    if not isinstance(exc, errors.LoragateError) or type(exc) is errors.LoragateError:
        return _error(_internal_message(), _SERVER, None, errors.LoragateError.code)
    found = _error(str(exc), _kind(exc)[1], exc.param, exc.code)
    if isinstance(exc, errors.AdapterRejected | errors.InvalidTrainingFile):
        found["error"]["details"] = exc.details()
    return found


def envelope_bytes(exc: BaseException) -> bytes:
    """`envelope(exc)` as a response body."""
    return _dump(envelope(exc))


def headers_of(exc: BaseException) -> dict[str, str]:
    """What a client's retry and login logic reads: Retry-After, WWW-Authenticate."""
    retry_after_s = getattr(exc, "retry_after_s", None)
    if retry_after_s is not None:
        return {"Retry-After": str(retry_after_s)}
    if isinstance(exc, errors.Unauthenticated):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(exc, _FINAL):
        return {"X-Should-Retry": "false"}
    return {}


def invalid(exc: RequestValidationError) -> errors.InvalidRequest:
    """What a client did wrong, of all that FastAPI says about it."""
    found = exc.errors()
    if found[0]["type"] == "json_invalid":
        reason = found[0].get("ctx", {}).get("error", "")
        return errors.InvalidJson(f"The body is not JSON: {reason}")
    faults = [(_field(f["loc"]), f["msg"].removeprefix("Value error, ")) for f in found]
    # The values stay out of the message: one of them may be a secret.
    message = "; ".join(f"{field}: {msg}" if field else msg for field, msg in faults)
    return errors.InvalidRequest(message, param=faults[0][0] or None)


def install(app: FastAPI) -> None:
    """Make every error of `app` an envelope."""
    app.add_exception_handler(errors.LoragateError, _answer)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_middleware(Edge, crashed=_crashed)


async def _answer(request: Request, exc: Exception) -> Response:
    status = status_of(exc)
    if status == 500 or isinstance(exc, errors.StorageUnavailable):
        fields = {"error": str(exc), "cause": str(exc.__cause__ or "")}
        telemetry.log(logger, logging.ERROR, telemetry.Event.REQUEST_FAILED, **fields)
    return Response(envelope_bytes(exc), status, headers_of(exc), _JSON)


async def _answer_invalid(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    error = invalid(exc)
    if isinstance(error, errors.InvalidJson):
        return await _answer(request, error)
    return Response(envelope_bytes(error), 422, media_type=_JSON)


async def _answer_http(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    if isinstance(exc.__cause__, errors.LoragateError):
        # FastAPI calls whatever went wrong while it read the body a 400.
        return await _answer(request, exc.__cause__)
    path = request.url.path
    if exc.status_code == 404:
        return await _answer(request, errors.NotFound(f"There is no {path} here; see /docs."))
    if exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "another method")
        error = errors.MethodNotAllowed(f"{path} takes {allowed}, not {request.method}.")
        return Response(envelope_bytes(error), 405, exc.headers, _JSON)
    code = HTTPStatus(exc.status_code).phrase.lower().replace(" ", "_")
    kind = _SERVER if exc.status_code >= 500 else _CALLER
    body = _dump(_error(str(exc.detail), kind, None, code))
    return Response(body, exc.status_code, exc.headers, _JSON)


def _crashed(exc: Exception) -> Response:
    return Response(envelope_bytes(exc), status_of(exc), headers_of(exc), _JSON)


def _kind(exc: BaseException) -> tuple[int, str]:
    for cls in type(exc).__mro__:
        if cls in KINDS:
            return KINDS[cls]
    return KINDS[errors.LoragateError]


def _field(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc[1:])


def _internal_message() -> str:
    rid = telemetry.request_id.get()
    where = f" Quote request id {rid} to the gateway's operator." if rid else ""
    return f"The gateway failed on this request.{where}"


def _error(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _dump(body: dict[str, Any]) -> bytes:
    # ASCII on purpose: a client's lone surrogate in a name must not break the answer about it.
    return json.dumps(body, separators=(",", ":"), default=str).encode()
