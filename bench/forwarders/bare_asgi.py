"""The least a Python gateway can cost: raw ASGI in front, asyncio.Protocol and httptools behind.

    UPSTREAMS=http://a:8000,http://b:8000 uvicorn --app-dir bench/forwarders bare_asgi:app

No authentication, no routing, no metrics, no deadlines, no back-pressure, no error handling: not
something to run, only the floor that loragate's features stand on.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Exchange(asyncio.Protocol):
    """One upstream connection and the reply that is arriving on it."""

    def begin(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.content_type = b"application/json"
        self.chunks: list[bytes] = []
        self.complete = False
        self.arrival = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)
        if (self.chunks or self.complete) and not self.arrival.done():
            self.arrival.set_result(None)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self.content_type = value

    def on_body(self, data: bytes) -> None:
        self.chunks.append(data)

    def on_message_complete(self) -> None:
        self.complete = True

    async def take(self) -> bytes:
        """Wait for something to arrive, and take all that did."""
        if not (self.chunks or self.complete):
            self.arrival = asyncio.get_running_loop().create_future()
            await self.arrival
        taken, self.chunks = b"".join(self.chunks), []
        return taken


class Replica:
    """An address and its idle connections."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = str(parts.hostname), parts.port or 80
        self.idle: list[Exchange] = []

    async def ask(self, body: bytes) -> Exchange:
        if self.idle:
            exchange = self.idle.pop()
        else:
            loop = asyncio.get_running_loop()
            _, exchange = await loop.create_connection(Exchange, self.host, self.port)
        exchange.begin()
        exchange.transport.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: replica\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        return exchange


replicas = itertools.cycle([Replica(url) for url in os.environ["UPSTREAMS"].split(",")])


async def app(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    message = await receive()
    body = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    replica = next(replicas)
    exchange = await replica.ask(body)
    data = await exchange.take()
    headers = [(b"content-type", exchange.content_type)]
    if exchange.complete:
        headers.append((b"content-length", b"%d" % len(data)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while not exchange.complete:
        await send({"type": "http.response.body", "body": data, "more_body": True})
        data = await exchange.take()
    replica.idle.append(exchange)
    await send({"type": "http.response.body", "body": data})


async def lifespan(receive: Receive, send: Send) -> None:
    while (await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})
