"""The outermost layer of the FastAPI part: request ids, body limits, crashes.

What comes in: every request that is not inference. What goes out: its answer with X-Request-Id,
whatever happened inside. What it must not know: which routes there are.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import telemetry
from app.errors import BodyTooLarge

logger = logging.getLogger(__name__)

#: Key of the scope under which a route finds its `BodyLimit`.
BODY_LIMIT = "loragate.body_limit"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(slots=True)
class BodyLimit:
    """How much of a body may arrive. A route that streams its body may raise it beforehand."""

    max_bytes: int
    setting: str = "LORAGATE_MAX_BODY_BYTES"


class Edge:
    """ASGI middleware. `crashed` makes the answer to an exception that nothing handled."""

    def __init__(self, app: ASGIApp, crashed: Callable[[Exception], Response]) -> None:
        self.app = app
        self.crashed = crashed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        rid = _request_id(headers.get("x-request-id"))
        token = telemetry.request_id.set(rid)
        started = False

        async def echo(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = rid
            await send(message)

        try:
            await self.app(scope, _bounded(scope, headers, receive), echo)
        except ClientDisconnect:
            # Left while uploading: nobody is there to answer, and nothing is wrong.
            return
        except Exception as exc:
            fields = {"method": scope["method"], "path": scope["path"]}
            event = telemetry.Event.REQUEST_CRASHED.value
            logger.error(event, exc_info=exc, extra={"fields": fields})
            if started:
                raise  # only cutting the connection can still say that it failed
            await self.crashed(exc)(scope, receive, echo)
        finally:
            telemetry.request_id.reset(token)


def _request_id(given: str | None) -> str:
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return f"req_{secrets.token_hex(12)}"


def _bounded(scope: Scope, headers: Headers, receive: Receive) -> Receive:
    """`receive`, which refuses a body over the limit, at once if the client declares its length."""
    limit = BodyLimit(scope["state"]["rooms"].settings.max_body_bytes)
    scope[BODY_LIMIT] = limit
    declared = headers.get("content-length", "")
    received = int(declared) if declared.isdigit() and len(declared) < 20 else 0
    counted = not received

    async def bounded() -> Message:
        nonlocal received
        if received > limit.max_bytes:
            raise _too_large(limit)
        message = await receive()
        if counted:
            received += len(message.get("body", b""))
            if received > limit.max_bytes:
                raise _too_large(limit)
        return message

    return bounded


def _too_large(limit: BodyLimit) -> BodyTooLarge:
    return BodyTooLarge(f"The body is over {limit.max_bytes} bytes; {limit.setting} is the limit.")
