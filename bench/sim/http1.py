"""One keep-alive connection to a simulated replica: requests in, bytes out, and who has left.

What comes in: a socket's bytes. What goes out: `Request`s to an application, which answers on the
`Connection` when it likes. It knows nothing of models.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass, field
from typing import Protocol, cast

import httptools

REASONS = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    404: b"Not Found",
    405: b"Method Not Allowed",
    500: b"Internal Server Error",
    503: b"Service Unavailable",
}
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
LAST_CHUNK = b"0\r\n\r\n"
JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"


@dataclass(slots=True)
class Request:
    """One request as it came."""

    method: str = ""
    path: str = ""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""


class Application(Protocol):
    """What stands behind a port."""

    def opened(self, connection: Connection) -> None: ...
    def closed(self, connection: Connection) -> None: ...
    def handle(self, request: Request, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """Answers one request at a time: the next is read when the last was answered."""

    def __init__(self, application: Application) -> None:
        self.application = application
        self.gone = False
        self._parser = httptools.HttpRequestParser(self)
        self._request = Request()
        self._parts: list[bytes] = []
        self._keep_alive = True

    # What the application does with it

    def answer(self, status: int, body: bytes = b"", kind: bytes = JSON) -> None:
        if self.gone:
            return
        reason = REASONS.get(status, b"Unknown")
        head = b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(head % (status, reason, kind, len(body)) + body)
        self._answered()

    def begin_stream(self, data: bytes) -> None:
        self.transport.write(STREAM_HEAD + (_chunk(data) if data else b""))

    def send(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self, data: bytes) -> None:
        if self.gone:
            return
        self.transport.write(_chunk(data) + LAST_CHUNK)
        self._answered()

    def reset(self) -> None:
        """Close with a RST, as a killed process does."""
        if self.gone:
            return
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    # What asyncio and httptools do with it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.application.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self.application.closed(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.answer(400)
            self.transport.close()

    def on_message_begin(self) -> None:
        self._request = Request()
        self._parts = []

    def on_url(self, url: bytes) -> None:
        self._request.path = url.decode("latin-1").partition("?")[0]

    def on_header(self, name: bytes, value: bytes) -> None:
        self._request.headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._request.method = self._parser.get_method().decode("latin-1")
        self._request.body = b"".join(self._parts)
        self._keep_alive = self._parser.should_keep_alive()
        self.application.handle(self._request, self)

    def _answered(self) -> None:
        if not self._keep_alive:
            self.transport.close()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
