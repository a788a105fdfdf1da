"""Many clients at little cost: kept-alive connections, one request at a time on each.

What comes in: JSON to post. What goes out: whole answers, with when each was sent and when it
began and ended. Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import httptools


@dataclass
class Answer:
    """One answer; its times are monotonic seconds, `began_at` that of its first byte."""

    sent_at: float
    began_at: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)

    @property
    def version(self) -> str:
        return self.headers["x-loragate-adapter-version"]

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The events of a stream, which must have ended as it should."""
        *events, done, rest = bytes(self.body).split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b""), bytes(self.body)
        return [json.loads(event.removeprefix(b"data: ")) for event in events]


class Connection(asyncio.Protocol):
    """One connection to a server on this machine."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer = Answer(0.0)
        self._ended: asyncio.Future[Answer] | None = None

    async def post(self, path: str, payload: Any, **headers: str) -> Answer:
        """Send a request and return its whole answer; header names are given with `_` for `-`."""
        body = json.dumps(payload).encode()
        lines = {"host": "127.0.0.1", "content-type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in _with_length(lines, body).items())
        self._ended = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        self._answer = Answer(monotonic())
        self._transport.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        return await self._ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self._answer.began_at:
            self._answer.began_at = monotonic()
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(exc or ConnectionResetError("closed before the answer ended"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # What the parser says

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode().lower()] = value.decode()

    def on_body(self, data: bytes) -> None:
        self._answer.body += data

    def on_message_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(self._answer)


def _with_length(lines: Mapping[str, str], body: bytes) -> dict[str, str]:
    return {**lines, "content-length": str(len(body))}


@asynccontextmanager
async def crowd(port: int, count: int) -> AsyncIterator[list[Connection]]:
    """So many connections to a port of this machine."""
    loop = asyncio.get_running_loop()
    opened = [
        (await loop.create_connection(Connection, "127.0.0.1", port))[1] for _ in range(count)
    ]
    try:
        yield opened
    finally:
        for connection in opened:
            connection.close()
