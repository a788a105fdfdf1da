"""Inference requests straight on the socket: the HTTP protocol `loragate serve` gives uvicorn.

What comes in: a client's connection. What goes out: exchanges for `inference`. A connection whose
request is for anything else is handed, with the bytes it sent, to uvicorn's own protocol, which
keeps it from then on; so FastAPI, HTTP's rarer features and every ASGI middleware stay uvicorn's.

Why: an ASGI cycle costs more than the rest of forwarding a request. Here a whole response is one
write, a client that leaves cancels its task without a second task waiting for that, and there is
no scope, no message dictionaries and no queue (docs/adr/0003).
"""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from http import HTTPStatus
from typing import Any, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from app.api.exchange import Address, ClientLeft, Headers
from app.api.front_door import FrontDoor
from app.api.inference import PATHS
from app.api.rooms import Rooms
from app.backends.base import Reply
from app.errors import BodyTooLarge

HEAD_BYTES = 64 << 10
#: How much of a response may wait in the socket's buffer before its source is held back.
WRITE_AHEAD_BYTES = 64 << 10
#: A body up to this size is read before its request is looked at; a longer one, not before its
#: sender is known.
SMALL_BODY_BYTES = 64 << 10
REQUEST_S = 60.0

_URLS = {path.encode(): path for path in PATHS}
_STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode())
    for status in HTTPStatus
}
_CHUNKED = b"transfer-encoding: chunked\r\n"
_CLOSE = b"connection: close\r\n"


class DirectExchange:
    """One request on a `DirectProtocol`."""

    __slots__ = (
        "_body",
        "_chunked",
        "_connection",
        "_size",
        "_waiter",
        "client",
        "complete",
        "headers",
        "keep_alive",
        "left",
        "method",
        "path",
        "server",
        "task",
    )

    def __init__(self, connection: DirectProtocol, path: str) -> None:
        self.method = "POST"
        self.path = path
        self.headers: dict[bytes, bytes] = {}
        self.server = connection.server
        self.client = connection.client
        self.keep_alive = True
        self.complete = False
        self.left = False
        self.task: asyncio.Task[None] | None = None
        self._connection = connection
        self._body: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._chunked = False

    async def body(self, limit: int) -> bytes:
        announced = self.headers.get(b"content-length", b"0")
        if len(announced) > 18 or int(announced) > limit:
            raise _too_large(limit)
        while not self.complete:
            if self._size > limit:
                raise _too_large(limit)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._size > limit:
            raise _too_large(limit)
        return self._body[0] if len(self._body) == 1 else b"".join(self._body)

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        connection = self._connection
        if connection.transport.is_closing():
            raise ClientLeft
        parts = [_STATUS_LINES.get(status) or _status_line(status), connection.default_headers()]
        for pair in headers:
            parts.append(b"%b: %b\r\n" % pair)
        if not self._may_stay():
            parts.append(_CLOSE)
        parts.append(b"content-length: %d\r\n\r\n" % len(body))
        parts.append(body)
        connection.transport.write(b"".join(parts))
        connection.answered(self)

    async def start(self, status: int, headers: Headers) -> None:
        connection = self._connection
        if connection.transport.is_closing():
            raise ClientLeft
        parts = [_STATUS_LINES.get(status) or _status_line(status), connection.default_headers()]
        for pair in headers:
            parts.append(b"%b: %b\r\n" % pair)
        # HTTP/1.0 knows no chunks: there the end of the connection ends the body.
        self._chunked = not connection.http_1_0
        parts.append(_CHUNKED if self._chunked else b"")
        parts.append(b"\r\n" if self._may_stay() else b"connection: close\r\n\r\n")
        connection.transport.write(b"".join(parts))

    def push(self, data: bytes) -> asyncio.Future[None] | None:
        connection = self._connection
        transport = connection.transport
        if transport.is_closing():
            return None  # the client left, and the task is about to hear of it
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        return connection.writable

    async def write(self, data: bytes) -> None:
        blocked = self.push(data)
        if blocked is not None:
            await blocked

    async def relay(self, reply: Reply) -> None:
        await reply.pipe(self)

    async def end(self) -> None:
        if self._connection.transport.is_closing():
            raise ClientLeft
        if self._chunked:
            self._connection.transport.write(b"0\r\n\r\n")
        self._connection.answered(self)

    def abort(self) -> None:
        self._connection.transport.abort()

    def received(self, data: bytes) -> None:
        self._body.append(data)
        self._size += len(data)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def all_received(self) -> None:
        self.complete = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _may_stay(self) -> bool:
        """Whether the connection can take another request after this one."""
        self.keep_alive = self.keep_alive and self.complete and not self._connection.closing
        return self.keep_alive


class DirectProtocol(asyncio.Protocol):
    """A client's connection: inference requests, one at a time, until another kind comes.

    Has the constructor and the `shutdown` that uvicorn expects of a protocol class.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.transport: asyncio.Transport
        self.server: Address = None
        self.client: Address = None
        self.writable: asyncio.Future[None] | None = None
        self.closing = False
        self.http_1_0 = False
        self._config = config
        self._state = server_state
        self._app_state = app_state
        self._loop = _loop or asyncio.get_running_loop()
        self._front_door = cast(FrontDoor, config.app)
        self._parser = httptools.HttpRequestParser(self)
        self._exchange: DirectExchange | None = None
        self._raw = b""
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._in_body = False
        self._foreign = False
        self._pipelined = False
        self._active_at = self._loop.time()
        self._timer: TimerHandle | None = None
        self._rendered: tuple[list[tuple[bytes, bytes]] | None, bytes] = (None, b"")

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_AHEAD_BYTES)
        self.server = transport.get_extra_info("sockname")
        self.client = transport.get_extra_info("peername")
        self._state.connections.add(self)  # type: ignore[arg-type]  # needs only `shutdown`
        self._timer = self._loop.call_later(self._config.timeout_keep_alive, self._look_at_time)

    def data_received(self, data: bytes) -> None:
        if self._pipelined:
            return
        if not self._in_body:
            self._raw = self._raw + data if self._raw else data
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._foreign = True
        except httptools.HttpParserError:
            if not self._foreign:
                self._reject(400)
                return
        if self._foreign:
            self._hand_over()
        elif not self._in_body and len(self._raw) > HEAD_BYTES:
            self._reject(431)

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self.resume_writing()
        exchange = self._exchange
        if exchange is not None and exchange.task is not None:
            exchange.left = True
            exchange.task.cancel()

    def pause_writing(self) -> None:
        if self.writable is None:
            self.writable = self._loop.create_future()

    def resume_writing(self) -> None:
        writable, self.writable = self.writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def shutdown(self) -> None:
        """uvicorn asks every connection to finish what it does and close."""
        self.closing = True
        if self._exchange is None:
            self.transport.close()

    # httptools callbacks

    def on_message_begin(self) -> None:
        if self._exchange is not None:
            self._pipelined = True
        self._url = b""
        self._headers = {}

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._foreign or self._pipelined:
            return
        path = _URLS.get(self._url)
        parser = self._parser
        if path is None or parser.get_method() != b"POST" or parser.should_upgrade():
            self._foreign = True
            return
        self._in_body = True
        self._raw = b""
        self._active_at = self._loop.time()
        exchange = self._exchange = DirectExchange(self, path)
        exchange.headers = self._headers
        exchange.keep_alive = parser.should_keep_alive()
        self.http_1_0 = parser.get_http_version() == "1.0"
        if b"expect" in self._headers:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if int(self._headers.get(b"content-length", b"-1")[:18]) not in _SMALL:
            self._begin(exchange)

    def on_body(self, data: bytes) -> None:
        if self._in_body and self._exchange is not None:
            self._active_at = self._loop.time()
            self._exchange.received(data)

    def on_message_complete(self) -> None:
        exchange = self._exchange
        if not self._in_body or exchange is None or self._pipelined:
            return
        self._in_body = False
        exchange.all_received()
        if exchange.task is None:
            self._begin(exchange)

    # the exchange's side

    def default_headers(self) -> bytes:
        """uvicorn's own response headers (the date), rendered once a second."""
        current = self._state.default_headers
        if self._rendered[0] is not current:
            self._rendered = (current, b"".join(b"%b: %b\r\n" % pair for pair in current))
        return self._rendered[1]

    def answered(self, exchange: DirectExchange) -> None:
        """The response is written: make room for the next request, or close."""
        self._state.total_requests += 1
        self._exchange = None
        if not exchange.keep_alive or self._pipelined or self.closing:
            self.transport.close()
        self._active_at = self._loop.time()

    def _begin(self, exchange: DirectExchange) -> None:
        exchange.task = self._loop.create_task(self._run(exchange))
        self._state.tasks.add(exchange.task)

    async def _run(self, exchange: DirectExchange) -> None:
        rooms: Rooms = self._app_state["rooms"]
        try:
            await self._front_door.inference.answer(exchange, rooms)
        except asyncio.CancelledError:
            self.transport.abort()
            raise
        finally:
            if exchange.task is not None:
                self._state.tasks.discard(exchange.task)
                exchange.task = None

    # ends

    def _hand_over(self) -> None:
        """Give the connection, with the bytes of the request that began, to uvicorn."""
        if self._exchange is not None:
            self._pipelined = True  # answer first; the client asks again on a new connection
            self._foreign = False
            return
        self._state.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        protocol = HttpToolsProtocol(self._config, self._state, self._app_state, self._loop)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        protocol.data_received(self._raw)
        self._raw = b""

    def _reject(self, status: int) -> None:
        if self._exchange is None:
            self.transport.write(
                b"%b%bcontent-length: 0\r\nconnection: close\r\n\r\n"
                % (_STATUS_LINES[status], self.default_headers())
            )
        self.transport.close()

    def _look_at_time(self) -> None:
        """One timer a connection: closes it when idle, or when its request is too slow to come."""
        idle_s = self._loop.time() - self._active_at
        waiting_for_client = self._exchange is None or not self._exchange.complete
        limit_s = REQUEST_S if self._in_body or self._raw else self._config.timeout_keep_alive
        if waiting_for_client and idle_s >= limit_s:
            self.transport.close()
            return
        pause_s = max(limit_s - idle_s, 1.0) if waiting_for_client else 5.0
        self._timer = self._loop.call_later(pause_s, self._look_at_time)


_SMALL = range(SMALL_BODY_BYTES + 1)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is over the limit of {limit} bytes. Send it in parts.")


def _status_line(status: int) -> bytes:
    return b"HTTP/1.1 %d \r\n" % status
