"""Inference requests straight on the socket: the HTTP protocol `loragate serve` gives uvicorn.

What comes in: a client's connection. What goes out: exchanges for `inference`. A connection whose
request is for anything else is handed, with the bytes it sent, to uvicorn's own protocol, which
keeps it from then on; so FastAPI, HTTP's rarer features and every ASGI middleware stay uvicorn's.

Why: an ASGI cycle costs more than the rest of forwarding a request. Here a whole response is one
write, a client that leaves cancels the connection's task without a second task waiting for that,
and there are no scopes and no message dictionaries (docs/adr/0003).
"""

from __future__ import annotations

import asyncio
import re
from asyncio import TimerHandle
from collections import deque
from typing import Any, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from app.api.direct_exchange import STATUS_LINES, DirectExchange
from app.api.exchange import Address
from app.api.front_door import FrontDoor
from app.api.inference import PATHS
from app.api.rooms import Rooms

HEAD_BYTES = 64 << 10
#: How much of a response may wait in the socket's buffer before its source is held back.
WRITE_AHEAD_BYTES = 64 << 10
#: A body up to this size is read before its request is looked at; a longer one, not before its
#: sender is known.
SMALL_BODY_BYTES = 64 << 10
REQUEST_S = 60.0
#: How long a client that was refused inside its request may go on sending it.
PARTING_S = 5.0
_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:[^\r\n]*", re.IGNORECASE)
_SMALL = range(SMALL_BODY_BYTES + 1)

_URLS = {path.encode(): path for path in PATHS}


class DirectProtocol(asyncio.Protocol):
    """A client's connection: inference requests, one after another, until another kind comes.

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
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        #: The request whose body is coming in, and those to answer: the first is being answered.
        self._receiving: DirectExchange | None = None
        self._queue: deque[DirectExchange] = deque()
        #: The bytes of a request of which it is not known yet whose it is.
        self._raw = b""
        self._apart = True
        self._foreign = False
        self._task: asyncio.Task[None] | None = None
        self._idle: asyncio.Future[None] | None = None
        self._active_at = self._loop.time()
        self._timer: TimerHandle | None = None
        self._rendered: tuple[list[tuple[bytes, bytes]] | None, bytes] = (None, b"")

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_AHEAD_BYTES)
        self.server = transport.get_extra_info("sockname")
        self.client = transport.get_extra_info("peername")
        self._state.connections.add(cast(Any, self))
        self._timer = self._loop.call_later(self._config.timeout_keep_alive, self._look_at_time)

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        if self._receiving is None:
            self._raw = self._raw + data if self._raw else data
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self._apart and self._url in _URLS and self._parser.get_method() == b"POST":
                self._decline_upgrade()
                return
            self._foreign = True
        except httptools.HttpParserError:
            if not self._foreign:
                self._reject(400)
                return
        if self._foreign:
            self._hand_over()
        elif self._receiving is None and len(self._raw) > HEAD_BYTES:
            self._reject(431)

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(cast(Any, self))
        if self._timer is not None:
            self._timer.cancel()
        self.resume_writing()
        for exchange in self._queue:
            exchange.left = True
        if self._task is not None:
            self._task.cancel()

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
        if not self._queue:
            self.transport.close()

    # httptools callbacks

    def on_message_begin(self) -> None:
        self._apart = not self._queue
        self._active_at = self._loop.time()
        self._url = b""
        self._headers = {}

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        path = _URLS.get(self._url)
        parser = self._parser
        if path is None or parser.get_method() != b"POST" or parser.should_upgrade():
            self._foreign = True
        if path is None or self._foreign:
            return
        self._raw = b""
        headers = self._headers
        exchange = self._receiving = DirectExchange(self, path)
        exchange.headers = headers
        self.http_1_0 = parser.get_http_version() == "1.0"
        exchange.keep_alive = parser.should_keep_alive() and not self.http_1_0
        exchange.expects_continue = b"expect" in headers
        small = int(headers.get(b"content-length", b"-1")[:18]) in _SMALL
        if not small or exchange.expects_continue:
            self._begin(exchange)

    def on_body(self, data: bytes) -> None:
        exchange = self._receiving
        if exchange is not None:
            exchange.received(data)
            if exchange.taken_up:  # a long one: as long as it comes, it is not too slow
                self._active_at = self._loop.time()

    def on_message_complete(self) -> None:
        exchange, self._receiving = self._receiving, None
        if exchange is not None:
            exchange.all_received()
            if not exchange.taken_up:
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
        queue = self._queue
        queue.popleft()
        if not exchange.keep_alive or (self.closing and not queue):
            self.closing = True
            if exchange.complete:
                self.transport.close()
            else:
                self._part()
        elif len(queue) == 1:
            self.transport.resume_reading()
        self._active_at = self._loop.time()

    def _begin(self, exchange: DirectExchange) -> None:
        """Let the connection's task answer: one task for all its exchanges, not one for each."""
        exchange.taken_up = True
        self._queue.append(exchange)
        if self._task is None:
            self._task = self._loop.create_task(self._answer_all())
            self._state.tasks.add(self._task)
            self._task.add_done_callback(self._state.tasks.discard)
        elif self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        if len(self._queue) == 2:  # pipelined: what else comes may wait in the socket
            self.transport.pause_reading()

    async def _answer_all(self) -> None:
        """Answer the connection's exchanges in their order, until it is lost."""
        rooms: Rooms = self._app_state["rooms"]
        inference = self._front_door.inference
        queue = self._queue
        try:
            while True:
                if queue:
                    exchange = queue[0]
                    await inference.answer(exchange, rooms)
                    if exchange.left or self.transport.is_closing():
                        return
                else:
                    self._idle = self._loop.create_future()
                    await self._idle
        except asyncio.CancelledError:
            if queue:  # the server is stopping: no half answer looks whole
                self.transport.abort()
            raise

    # ends

    def _decline_upgrade(self) -> None:
        """Read a request again without the offer of another protocol that came with it.

        Some clients offer HTTP/2 in their first request; the parser takes its body for that.
        """
        head, end, rest = self._raw.partition(b"\r\n\r\n")
        self._raw = b""
        self._foreign = False
        self._parser = httptools.HttpRequestParser(self)
        self.data_received(_UPGRADE.sub(b"", head) + end + rest)

    def _hand_over(self) -> None:
        """Give the connection, with the bytes of the request that began, to uvicorn."""
        if not self._apart:
            # It came behind a request that was being answered, so its bytes are not apart. That
            # one is answered; the client asks the other again, as HTTP/1.1 has it do.
            self.closing = True
            if not self._queue:
                self.transport.close()
            return
        self._state.connections.discard(cast(Any, self))
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        protocol = HttpToolsProtocol(self._config, self._state, self._app_state, self._loop)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        protocol.data_received(self._raw)
        self._raw = b""

    def _reject(self, status: int) -> None:
        """Refuse what is coming in; what came before it is answered first."""
        self.closing = True
        broken, self._receiving = self._receiving, None
        if broken is not None and broken.taken_up:
            self._queue.remove(broken)
            broken.left = True
        if not self._queue:
            self.transport.write(
                b"%b%bcontent-length: 0\r\nconnection: close\r\n\r\n"
                % (STATUS_LINES[status], self.default_headers())
            )
            self._part()

    def _part(self) -> None:
        """Close, but let a client that is still sending read what it was answered.

        A socket closed with bytes unread resets the connection, and the reset may overtake the
        answer. So our side ends, and what the client still sends is read and dropped.
        """
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(PARTING_S, self.transport.close)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def _look_at_time(self) -> None:
        """One timer a connection: closes it when idle, or when its request is too slow to come."""
        idle_s = self._loop.time() - self._active_at
        receiving = self._receiving is not None or bool(self._raw)
        limit_s = REQUEST_S if receiving else self._config.timeout_keep_alive
        waiting_for_client = receiving or not self._queue
        if waiting_for_client and idle_s >= limit_s:
            self.transport.close()
            return
        pause_s = max(limit_s - idle_s, 1.0) if waiting_for_client else 5.0
        self._timer = self._loop.call_later(pause_s, self._look_at_time)
