"""One keep-alive connection to a server, and the response that comes over it.

What comes in: bytes from the socket, parsed by httptools. What goes out: a `Response` whose body is
read, or pushed on, as it arrives. Which connection takes which request is `wire.Client`'s.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import httptools

from app.backends.base import Push
from app.errors import UpstreamBroke, UpstreamError, UpstreamTimeout

if TYPE_CHECKING:
    from app.backends.wire import Client


_HEX = b"0123456789abcdefABCDEF"


class Response:
    """One answer. `headers` have lower-case names."""

    __slots__ = (
        "_chunks",
        "_connection",
        "_error",
        "_loop",
        "_push",
        "_push_chunk",
        "_size",
        "_waiter",
        "complete",
        "headers",
        "status",
    )

    def __init__(self, connection: Connection) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        self._connection: Connection | None = connection
        self._loop = connection.client.loop
        self._chunks: list[bytes] = []
        self._size = 0
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._push: Push | None = None
        self._push_chunk: Push | None = None

    async def next(self) -> bytes:
        """All bytes that have arrived since the last call; empty at the end."""
        while not self._chunks:
            if self.complete:
                return b""
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.take()

    async def pipe(self, push: Push, push_chunk: Push | None = None) -> None:
        """Push bytes on from the moment they arrive, until the end."""
        while self._chunks:  # read ahead until now, and while the sink was blocked
            blocked = push(self.take())
            if blocked is not None:
                await blocked
        self._push = push
        self._push_chunk = push_chunk
        while not self.complete and self._error is None:
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._chunks:  # they came with the end
            push(self.take())
        if self._error is not None:
            raise self._error

    def _hold(self, blocked: asyncio.Future[None]) -> None:
        """Read no more until the sink has room again."""
        if self._connection is not None:
            self._connection.pause()
            blocked.add_done_callback(self._unblocked)

    def _unblocked(self, _: asyncio.Future[None]) -> None:
        if self._connection is not None:
            self._connection.resume()

    def take(self) -> bytes:
        """What has arrived since the last call, without waiting."""
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self._size = 0
        if self._connection is not None and self._push is None:
            self._connection.resume()
        return data

    def close(self) -> None:
        """Stop reading. A connection with bytes still to come is cut."""
        connection, self._connection = self._connection, None
        if connection is not None and not self.complete:
            connection.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self, error: UpstreamError | None) -> None:
        self._connection = None
        self._error = error
        self.complete = error is None
        self._wake()


class Connection(asyncio.Protocol):
    """One keep-alive connection: one exchange at a time."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.deadline = 0
        self.heard = False
        self.reused = False
        self.transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._head: asyncio.Future[Response] | None = None
        self._response: Response | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._in_body = False
        self._length: int | None = None
        self._chunked = False
        self._between_chunks = False
        self._paused = False
        self._closed = False

    def exchange(self, message: bytes) -> tuple[asyncio.Future[Response], Response]:
        """Send a request; the future is done once the response has a head, or cannot have one."""
        head = self._head = self.client.loop.create_future()
        response = self._response = Response(self)
        self._headers = response.headers
        self._head_bytes = 0
        self._in_body = False
        self._length = None
        self._chunked = False
        self._between_chunks = False
        self.heard = False
        self.deadline = self.client.tick + self.client.first_byte_ticks
        self.transport.write(message)
        return head, response

    @property
    def overdue(self) -> bool:
        """Silent past its deadline, and not because the reader made it wait. Asked every tick."""
        if self.heard:
            self.heard = False
            self.deadline = self.client.tick + self.client.idle_ticks
        return self._response is not None and not self._paused and self.client.tick >= self.deadline

    @property
    def usable(self) -> bool:
        return not self._closed and not self.transport.is_closing()

    def abort(self) -> None:
        """Cut the connection; whoever waits on it is told."""
        self._fail(UpstreamBroke(f"the exchange with {self.client.name} was cut"))

    def timed_out(self) -> None:
        waited_for = "go on with" if self._in_body else "begin"
        self._fail(UpstreamTimeout(f"{self.client.name} did not {waited_for} its answer in time"))

    def pause(self) -> None:
        """The reader is slower than the server."""
        if not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """The reader took what was read ahead."""
        if self._paused:
            self._paused = False
            self.deadline = self.client.tick + self.client.idle_ticks
            self.transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:  # nothing was asked: not a server to trust with the next request
            self._fail(None)
            return
        if self._between_chunks and response._push_chunk is not None and _is_one_chunk(data):
            # A stream's usual piece, passed on as it came. The parser keeps nothing from one
            # chunk to the next, so it need not see this one.
            self.heard = True
            if (blocked := response._push_chunk(data)) is not None:
                response._hold(blocked)
            return
        if not self._in_body:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            # After the end of a response, this only closes the connection.
            self._fail(UpstreamBroke(f"{self.client.name} did not answer in HTTP: {exc}"))
            return
        if self._response is response:
            self._parsed(response)

    def _parsed(self, response: Response) -> None:
        """More of a response is here, and not yet all of it."""
        if not self._in_body:
            if self._head_bytes > self.client.limits.head_bytes:
                self._fail(UpstreamBroke(f"{self.client.name} sent too large a header"))
            return
        self.heard = True
        push = response._push
        if push is None:
            self._body_received(response)
        elif chunks := response._chunks:
            data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            chunks.clear()
            response._size = 0
            if (blocked := push(data)) is not None:
                response._hold(blocked)

    def _body_received(self, response: Response) -> None:
        if self._head is not None:
            if self._length is None or self._length > self.client.whole_bytes:
                self._hand_over(response)
        elif response._chunks:
            response._wake()
        if response._size > self.client.limits.read_ahead_bytes:
            self.pause()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        response = self._response
        unmeasured = self._in_body and self._length is None and not self._chunked
        if response is not None and unmeasured and exc is None:
            self._finish(response)  # a body without a length ends with the connection
        elif response is not None:
            reason = "closed the connection" if exc is None else f"reset the connection ({exc})"
            self._fail(UpstreamBroke(f"{self.client.name} {reason} before its answer ended"))
        self.client.lost(self)

    # httptools callbacks

    def on_message_begin(self) -> None:
        if self._response is None:
            raise ValueError("bytes after the end of a response")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-length":
            self._length = int(value)
        elif name == b"transfer-encoding":
            self._chunked = True
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        response = self._response
        assert response is not None
        if not 100 <= status < 600:
            raise ValueError(f"status {status}")
        if status < 200:  # an interim answer; the real one follows
            self._headers.clear()
            self._length = None
            self._chunked = False
            return
        response.status = status
        self._in_body = True

    def on_body(self, data: bytes) -> None:
        response = self._response
        if response is not None:
            response._chunks.append(data)
            response._size += len(data)

    def on_chunk_header(self) -> None:
        self._between_chunks = False

    def on_chunk_complete(self) -> None:
        self._between_chunks = True

    def on_message_complete(self) -> None:
        if self._in_body and self._response is not None:
            self._finish(self._response)

    # ends

    def _hand_over(self, response: Response) -> None:
        head, self._head = self._head, None
        if head is not None and not head.done():
            head.set_result(response)

    def _finish(self, response: Response) -> None:
        self._response = None
        response._end(None)
        self._hand_over(response)
        if self._paused:
            self._paused = False
            self.transport.resume_reading()
        self.client.finished(self, reusable=not self._closed and self._parser.should_keep_alive())

    def _fail(self, error: UpstreamError | None) -> None:
        response, self._response = self._response, None
        head, self._head = self._head, None
        self._closed = True
        self.transport.abort()
        if response is not None:
            response._end(error)
        if head is not None and not head.done() and error is not None:
            head.set_exception(error)
        self.client.finished(self, reusable=False)

    @property
    def nothing_received(self) -> bool:
        return self._head_bytes == 0


def _is_one_chunk(data: bytes) -> bool:
    """Whether these bytes are one chunk with data in it, whole, and without extensions.

    (RFC 9112, section 7.1.) Anything else is left to the parser.
    """
    end = data.find(b"\r\n", 0, 10)
    if end < 1 or data[:end].strip(_HEX) or not data.endswith(b"\r\n"):
        return False
    length = int(data[:end], 16)
    return length > 0 and len(data) == end + 4 + length
