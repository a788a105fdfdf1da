"""The inference paths: a request's bytes in, an answer's bytes out.

What comes in: an `Exchange` on one of `PATHS`. What goes out: the replica's answer as it arrives,
or OpenAI's error envelope. Knows nothing of the registry beyond the snapshot, nor of replicas,
nor of which server carries the exchange.
"""

from __future__ import annotations

import logging
import os
import re
from asyncio import CancelledError, get_running_loop, timeout_at
from itertools import count
from typing import Any

from app.api.auth import authenticate, permit
from app.api.errors import envelope_bytes, headers_of, status_of
from app.api.exchange import ClientLeft, Exchange, Headers
from app.api.rooms import Rooms
from app.backends.base import Reply
from app.domain import Principal, Scope
from app.errors import DeadlineExceeded, InvalidRequest, LoragateError, MethodNotAllowed
from app.serving.request import parse
from app.telemetry import Event, log, request_id

logger = logging.getLogger(__name__)

PATHS = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
    }
)
#: Client headers that mean something to a model server. The caller's key is never among them.
_FORWARDED = frozenset({b"traceparent", b"tracestate", b"x-session-id", b"x-vllm-priority"})
_RETURNED = frozenset({b"content-type", b"retry-after"})
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_TIMEOUT_MS = re.compile(rb"[1-9][0-9]{0,8}")
_SSE = b"text/event-stream"
CLIENT_LEFT = 499


class Inference:
    """Answers requests to the inference paths."""

    def __init__(self) -> None:
        self._ids = count()
        self._id_prefix = os.urandom(8).hex().encode()

    async def answer(self, exchange: Exchange, rooms: Rooms) -> None:
        """Serve one request. Every end is counted, and only a shutdown's cancellation leaves."""
        started = rooms.clock.monotonic()
        answer = _Answer(exchange, self._request_id(exchange.headers))
        try:
            try:
                await self._serve(exchange, rooms, answer)
            except LoragateError as exc:
                await answer.fail(exc)
            except ClientLeft:
                raise
            except Exception as exc:
                token = request_id.set(answer.request_id.decode())
                logger.exception(Event.REQUEST_CRASHED.value)
                request_id.reset(token)  # the task goes on to the connection's next request
                await answer.fail(exc)
        except ClientLeft:
            answer.status = CLIENT_LEFT
        except CancelledError:
            answer.status = CLIENT_LEFT
            if not exchange.left:
                raise
        finally:
            duration_s = rooms.clock.monotonic() - started
            rooms.meter.ended(exchange.path, answer.status, duration_s)
            level = rooms.settings.access_log
            if level == "all" or (level == "errors" and (answer.status >= 400 or answer.error)):
                _log_access(exchange.path, answer, duration_s)

    async def _serve(self, exchange: Exchange, rooms: Rooms, answer: _Answer) -> None:
        if exchange.method != "POST":
            raise MethodNotAllowed(f"{exchange.path} takes POST, not {exchange.method}.")
        headers = exchange.headers
        if b"x-request-timeout-ms" in headers:
            answer.deadline = _deadline(headers[b"x-request-timeout-ms"])
        snapshot = rooms.snapshots.current
        principal = authenticate(exchange, headers, snapshot, rooms.clock)
        answer.principal = permit(principal, Scope.INFERENCE)
        if b"content-encoding" in headers:
            raise InvalidRequest(
                "Content-Encoding is not supported; send plain JSON.",
                code="unsupported_content_encoding",
            )
        body = await exchange.body(rooms.settings.max_body_bytes)
        request = parse(exchange.path, body)
        request.headers = _upstream_headers(headers, answer.request_id)
        if b"x-session-id" in headers:
            request.session = headers[b"x-session-id"].decode("latin-1")
        answer.model = request.model
        if answer.deadline is None:
            reply = await rooms.request_path.serve(request, principal, snapshot)
        else:
            try:
                async with timeout_at(answer.deadline):
                    reply = await rooms.request_path.serve(request, principal, snapshot)
            except TimeoutError as exc:
                raise _too_late() from exc
        try:
            await answer.relay(reply)
        finally:
            reply.close()

    def _request_id(self, headers: dict[bytes, bytes]) -> bytes:
        given = headers.get(b"x-request-id")
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given
        return b"req_%b%08x" % (self._id_prefix, next(self._ids))


class _Answer:
    """What is sent to one client, and what is logged about it."""

    __slots__ = (
        "_exchange",
        "_started",
        "deadline",
        "error",
        "model",
        "principal",
        "replica",
        "request_id",
        "status",
    )

    def __init__(self, exchange: Exchange, request_id: bytes) -> None:
        self._exchange = exchange
        self._started = False
        self.request_id = request_id
        self.deadline: float | None = None
        self.status = 500
        self.model = ""
        self.replica = ""
        self.principal: Principal | None = None
        self.error: BaseException | None = None

    async def relay(self, reply: Reply) -> None:
        """Send a reply on as it comes. A stream that breaks says so in its own format."""
        exchange = self._exchange
        self.replica = reply.replica
        self.status = reply.status
        self._started = True
        headers = [pair for pair in reply.headers if pair[0] in _RETURNED]
        headers.append((b"x-request-id", self.request_id))
        if reply.replica:
            headers.append((b"x-loragate-replica", reply.replica.encode()))
        if reply.version:
            headers.append((b"x-loragate-adapter-version", reply.version.encode()))
        if reply.complete:
            await exchange.respond(reply.status, headers, reply.take())
            return
        await exchange.start(reply.status, headers)
        try:
            await self._relay(reply)
        except LoragateError as exc:
            self.error = exc
            if not _is_event_stream(headers):
                exchange.abort()  # a body that ends early must not look whole
                return
            await exchange.write(b"data: %b\n\n" % envelope_bytes(exc))
        await exchange.end()

    async def _relay(self, reply: Reply) -> None:
        if self.deadline is None:
            await self._exchange.relay(reply)
            return
        try:
            async with timeout_at(self.deadline):
                await self._exchange.relay(reply)
        except TimeoutError as exc:
            raise _too_late() from exc

    async def fail(self, exc: BaseException) -> None:
        """Send an error instead of a reply; if one was begun, cut it."""
        self.error = exc
        if self._started:
            self._exchange.abort()
            return
        self.status = status_of(exc)
        self._started = True
        headers = [(b"content-type", b"application/json"), (b"x-request-id", self.request_id)]
        for name, value in headers_of(exc).items():
            headers.append((name.lower().encode(), value.encode()))
        if isinstance(exc, MethodNotAllowed):
            headers.append((b"allow", b"POST"))
        await self._exchange.respond(self.status, headers, envelope_bytes(exc))


def _deadline(given: bytes) -> float:
    """The loop's time at which the client stops waiting."""
    if not _TIMEOUT_MS.fullmatch(given):
        raise InvalidRequest(
            "X-Request-Timeout-Ms must be a whole number of milliseconds, from 1 to 999999999.",
            param="X-Request-Timeout-Ms",
        )
    return get_running_loop().time() + int(given) / 1000


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded(
        "The answer was not there, or not whole, within the X-Request-Timeout-Ms of the request. "
        "Allow more time, or ask for less."
    )


def _upstream_headers(headers: dict[bytes, bytes], rid: bytes) -> bytes:
    lines = b"x-request-id: %b\r\n" % rid
    if not _FORWARDED.isdisjoint(headers):
        for name in sorted(_FORWARDED.intersection(headers)):
            lines += b"%b: %b\r\n" % (name, headers[name])
    return lines


def _is_event_stream(headers: Headers) -> bool:
    return any(name == b"content-type" and value.startswith(_SSE) for name, value in headers)


def _log_access(path: str, answer: _Answer, duration_s: float) -> None:
    failed = answer.status >= 400 or answer.error is not None
    fields: dict[str, Any] = {
        "request_id": answer.request_id.decode(),
        "path": path,
        "status": answer.status,
        "duration_s": round(duration_s, 4),
        "model": answer.model[:200],
        "key": answer.principal.key_id if answer.principal else None,
        "replica": answer.replica or None,
    }
    if answer.error is not None:
        fields["error"] = str(answer.error)[:500]
    level = logging.ERROR if answer.status >= 500 else logging.INFO
    log(logger, level, Event.REQUEST_FAILED if failed else Event.REQUEST_DONE, **fields)
