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

from app.backends.connection import Connection, Response
from app.errors import UpstreamBroke, UpstreamRefused

TICK_S = 0.1
#: A body up to this size, announced by content-length, is waited for before the head is handed
#: over: one wake-up for the whole reply instead of two.
WHOLE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one client. Times in seconds, sizes in bytes.

    `keep_alive_s` is below the 5 s after which vLLM's server closes an idle connection, so that
    a request seldom meets a connection that is being closed. All but `connect_s` are kept to a
    `tick_s`.
    """

    connections: int = 1024
    connect_s: float = 2.0
    first_byte_s: float = 600.0
    idle_s: float = 120.0
    keep_alive_s: float = 4.0
    tick_s: float = TICK_S
    head_bytes: int = 64 << 10
    read_ahead_bytes: int = 256 << 10


class Client:
    """Connections to one server.

    `name` is what messages call the server: "replica host:port", say. At most
    `limits.connections` are open; further requests wait for one.
    """

    def __init__(
        self, host: str, port: int, *, name: str, limits: Limits, tls: ssl.SSLContext | None = None
    ) -> None:
        self.name = name
        self.limits = limits
        self.loop = asyncio.get_running_loop()
        self.tick = 0
        self.first_byte_ticks = ceil(limits.first_byte_s / limits.tick_s) + 1
        self.idle_ticks = ceil(limits.idle_s / limits.tick_s) + 1
        self.whole_bytes = min(WHOLE_BYTES, limits.read_ahead_bytes)
        self._keep_alive_ticks = ceil(limits.keep_alive_s / limits.tick_s)
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
            self._timer = self.loop.call_later(self.limits.tick_s, self._ticked)
        try:
            connection = await self._connect()
            if not connection.usable:
                raise UpstreamRefused(f"{self.name} closed a new connection at once")
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
            raise UpstreamRefused(f"{self.name} did not accept a connection in time") from exc
        except (OSError, UnicodeError) as exc:  # the latter: no host can have that name
            reason = getattr(exc, "strerror", None) or exc
            raise UpstreamRefused(f"{self.name} cannot be reached: {reason}") from exc
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
            self._timer = self.loop.call_later(self.limits.tick_s, self._ticked)
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
