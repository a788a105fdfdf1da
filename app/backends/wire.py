"""The upstream HTTP/1.1 client: asyncio.Protocol and httptools.

What comes in: the bytes of a request. What goes out: a `Response` whose body is read as it
arrives. One `Client` per replica keeps connections alive, bounds what is read ahead of the
reader, and ends what is silent. It knows nothing of JSON, models or the replies' meaning.

Deadlines are counted in ticks of one timer per client, not with a timer per request: setting
and cancelling a timer would cost more than the rest of a small exchange.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from dataclasses import dataclass
from math import ceil
from typing import cast

import httptools

from app.backends.base import Sink
from app.errors import UpstreamBroke, UpstreamError, UpstreamRefused, UpstreamTimeout

TICK_S = 0.1
#: A body up to this size, announced by content-length, is waited for before the head is handed
#: over: one wake-up for the whole reply instead of two.
WHOLE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one client. Times in seconds, sizes in bytes.

    `keep_alive_s` is below the 5 s after which vLLM's server closes an idle connection, so that
    a request seldom meets a connection that is being closed.
    """

    connections: int = 1024
    connect_s: float = 2.0
    first_byte_s: float = 600.0
    idle_s: float = 120.0
    keep_alive_s: float = 4.0
    head_bytes: int = 64 << 10
    read_ahead_bytes: int = 256 << 10


class Response:
    """One answer. `headers` have lower-case names."""

    __slots__ = (
        "_chunks",
        "_connection",
        "_error",
        "_loop",
        "_sink",
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
        self._sink: Sink | None = None

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

    async def pipe(self, sink: Sink) -> None:
        """Push bytes into `sink` from the moment they arrive, until the end."""
        while self._chunks:  # read ahead until now, and while the sink was blocked
            blocked = sink.push(self.take())
            if blocked is not None:
                await blocked
        self._sink = sink
        while not self.complete and self._error is None:
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._chunks:  # they came with the end
            sink.push(self.take())
        if self._error is not None:
            raise self._error

    def _push_on(self, sink: Sink) -> None:
        """Push what one read of the socket brought; one piece of it is the common case."""
        chunks = self._chunks
        if not chunks:
            return
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._size = 0
        blocked = sink.push(data)
        if blocked is not None and self._connection is not None:
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
        if self._connection is not None and self._sink is None:
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
        self.deadline = self.client.tick + self.client.first_byte_ticks
        self.transport.write(message)
        return head, response

    @property
    def overdue(self) -> bool:
        """Silent past its deadline, and not because the reader made it wait."""
        return self._response is not None and not self._paused and self.client.tick >= self.deadline

    @property
    def usable(self) -> bool:
        return not self._closed and not self.transport.is_closing()

    def abort(self) -> None:
        """Cut the connection; whoever waits on it is told."""
        self._fail(UpstreamBroke(f"the exchange with {self.client.name} was cut"))

    def timed_out(self) -> None:
        waited_for = "go on with" if self._in_body else "begin"
        self._fail(
            UpstreamTimeout(f"replica {self.client.name} did not {waited_for} its answer in time")
        )

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
        if not self._in_body:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            # After the end of a response, this only closes the connection.
            self._fail(UpstreamBroke(f"replica {self.client.name} did not answer in HTTP: {exc}"))
            return
        if self._response is not response:
            return
        if self._in_body:
            self._body_received(response)
        elif self._head_bytes > self.client.limits.head_bytes:
            self._fail(UpstreamBroke(f"replica {self.client.name} sent too large a header"))

    def _body_received(self, response: Response) -> None:
        self.deadline = self.client.tick + self.client.idle_ticks
        if self._head is not None:
            if self._length is None or self._length > self.client.whole_bytes:
                self._hand_over(response)
        elif response._sink is not None:
            response._push_on(response._sink)
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
            self._fail(
                UpstreamBroke(f"replica {self.client.name} {reason} before its answer ended")
            )
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


class Client:
    """Connections to one server.

    `name` stands in messages for the server's address. At most `limits.connections` are open;
    further requests wait for one.
    """

    def __init__(
        self, host: str, port: int, *, name: str, limits: Limits, tls: ssl.SSLContext | None = None
    ) -> None:
        self.name = name
        self.limits = limits
        self.loop = asyncio.get_running_loop()
        self.tick = 0
        self.first_byte_ticks = ceil(limits.first_byte_s / TICK_S) + 1
        self.idle_ticks = ceil(limits.idle_s / TICK_S) + 1
        self.whole_bytes = min(WHOLE_BYTES, limits.read_ahead_bytes)
        self._keep_alive_ticks = ceil(limits.keep_alive_s / TICK_S)
        self._host = host
        self._port = port
        self._tls = tls
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._free = limits.connections
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def request(self, message: bytes) -> Response:
        """Send a whole HTTP/1.1 request and return its response once the head is here.

        A kept-alive connection that the server closed without a byte of an answer is replaced:
        that is the server's idle timeout crossing our request (RFC 9112, section 9.3.1).

        Raises:
            UpstreamRefused: no connection could be made.
            UpstreamTimeout: no first byte in time.
            UpstreamBroke: the connection died, or what came was not HTTP.
        """
        while True:
            if self._free:
                self._free -= 1
            else:
                await self._turn()
            connection = self._take() or await self._open()
            self._busy.add(connection)
            head, response = connection.exchange(message)
            try:
                return await head
            except UpstreamBroke:
                if not (connection.reused and connection.nothing_received):
                    raise
            except asyncio.CancelledError:
                response.close()
                raise

    def _take(self) -> Connection | None:
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.usable:
                connection.reused = True
                return connection
        return None

    async def _turn(self) -> None:
        """Wait, first come first served, until an exchange ends and leaves its place."""
        place = self.loop.create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():
                self._leave()  # it was given, but nobody is there to use it
            raise

    def _leave(self) -> None:
        """Give a place to whoever waits longest."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._free += 1

    async def _open(self) -> Connection:
        if self._timer is None:
            self._timer = self.loop.call_later(TICK_S, self._ticked)
        try:
            connection = await self._connect()
            if not connection.usable:
                raise UpstreamRefused(f"replica {self.name} closed a new connection at once")
        except BaseException:
            self._leave()
            raise
        return connection

    async def _connect(self) -> Connection:
        try:
            async with asyncio.timeout(self.limits.connect_s):
                _, connection = await self.loop.create_connection(
                    lambda: Connection(self), self._host, self._port, ssl=self._tls
                )
        except TimeoutError as exc:
            raise UpstreamRefused(
                f"replica {self.name} did not accept a connection in time"
            ) from exc
        except (OSError, UnicodeError) as exc:  # the latter: no host can have that name
            reason = getattr(exc, "strerror", None) or exc
            raise UpstreamRefused(f"replica {self.name} cannot be reached: {reason}") from exc
        return connection

    def finished(self, connection: Connection, *, reusable: bool) -> None:
        """An exchange ended, or an idle connection broke the rules."""
        if reusable and not self._closed:
            connection.deadline = self.tick + self._keep_alive_ticks
            self._idle.append(connection)
        elif not connection._closed:
            connection._closed = True
            connection.transport.close()
        if connection in self._busy:
            self._busy.remove(connection)
            self._leave()

    def lost(self, connection: Connection) -> None:
        """A connection closed."""
        if connection in self._idle:
            self._idle.remove(connection)

    def _ticked(self) -> None:
        self.tick += 1
        for connection in [c for c in self._busy if c.overdue]:
            connection.timed_out()
        stale = [c for c in self._idle if self.tick >= c.deadline]
        for connection in stale:
            self._idle.remove(connection)
            connection.transport.close()
        if self._idle or self._free < self.limits.connections:
            self._timer = self.loop.call_later(TICK_S, self._ticked)
        else:
            self._timer = None

    def close(self) -> None:
        """Close idle connections now, and busy ones as they finish."""
        self._closed = True
        if self._timer is not None and self._free == self.limits.connections:
            self._timer.cancel()
            self._timer = None
        for connection in self._idle:
            connection.transport.close()
        self._idle.clear()
