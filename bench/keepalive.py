"""A client that is hardly there: kept-alive connections, one request at a time on each.

What comes in: whole HTTP requests as bytes. What goes out: the bodies of their answers, which must
be 200. It must not know what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httptools

from bench.client import Unready


class Connection(asyncio.Protocol):
    """One connection; what it brings is parsed as HTTP and nothing else."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._answered: asyncio.Future[bytes] | None = None
        self._transport: asyncio.Transport | None = None

    async def ask(self, request: bytes) -> bytes:
        """The body of the answer, which must be a 200."""
        assert self._transport is not None
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answered

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(exc or ConnectionResetError("closed before the answer"))

    def on_message_begin(self) -> None:
        self._body = bytearray()

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        if self._answered is None or self._answered.done():
            return
        status = self._parser.get_status_code()
        if status == 200:
            self._answered.set_result(bytes(self._body))
        else:
            text = self._body.decode(errors="replace")[:500]
            self._answered.set_exception(Unready(f"answered {status}: {text}"))


@contextlib.asynccontextmanager
async def connections(port: int, count: int) -> AsyncIterator[list[Connection]]:
    """Open before the clock starts."""
    loop = asyncio.get_running_loop()
    opened = [
        (await loop.create_connection(Connection, "127.0.0.1", port))[1] for _ in range(count)
    ]
    try:
        yield opened
    finally:
        for each in opened:
            each.close()
