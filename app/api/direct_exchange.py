"""One inference request on a `direct.DirectProtocol`, and how its answer is written.

What comes in: the pieces of a body from the protocol. What goes out: one write for a whole answer,
or one for each piece of a stream. Knows nothing of HTTP parsing or of the connection's order.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

from app.api.exchange import ClientLeft, Headers
from app.backends.base import Reply
from app.errors import BodyTooLarge

if TYPE_CHECKING:
    from app.api.direct import DirectProtocol

STATUS_LINES = {
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
        "expects_continue",
        "headers",
        "keep_alive",
        "left",
        "method",
        "path",
        "server",
        "taken_up",
    )

    def __init__(self, connection: DirectProtocol, path: str) -> None:
        self.method = "POST"
        self.path = path
        self.headers: dict[bytes, bytes] = {}
        self.server = connection.server
        self.client = connection.client
        self.keep_alive = True
        self.complete = False
        self.expects_continue = False
        self.left = False
        self.taken_up = False
        self._connection = connection
        self._body: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._chunked = False

    async def body(self, limit: int) -> bytes:
        if not self.complete:
            await self._rest(limit)
        if self._size > limit:
            raise _too_large(limit)
        body = self._body
        return body[0] if len(body) == 1 else b"".join(body)

    async def _rest(self, limit: int) -> None:
        """Wait for the body's end, unless it is known to be too large before."""
        announced = self.headers.get(b"content-length", b"0")
        if len(announced) > 18 or int(announced) > limit:
            raise _too_large(limit)
        if self.expects_continue:
            self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not self.complete and self._size <= limit:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        connection = self._connection
        if connection.transport.is_closing():
            raise ClientLeft
        parts = [STATUS_LINES.get(status) or _status_line(status), connection.default_headers()]
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
        parts = [STATUS_LINES.get(status) or _status_line(status), connection.default_headers()]
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

    def push_chunk(self, framed: bytes) -> asyncio.Future[None] | None:
        """Send a chunk on that is framed as this connection frames its own."""
        connection = self._connection
        transport = connection.transport
        if transport.is_closing():
            return None
        transport.write(framed)
        return connection.writable

    async def write(self, data: bytes) -> None:
        blocked = self.push(data)
        if blocked is not None:
            await blocked

    async def relay(self, reply: Reply) -> None:
        await reply.pipe(self.push, self.push_chunk if self._chunked else None)

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


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is over the limit of {limit} bytes. Send it in parts.")


def _status_line(status: int) -> bytes:
    return b"HTTP/1.1 %d \r\n" % status
