"""Inference requests under any ASGI server: `uvicorn app.main:app`, hypercorn, a test client.

What comes in: an ASGI scope. What goes out: exchanges for `inference`. The protocol of
`loragate serve` (`direct`) does the same with less between the sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from app.api.exchange import ClientLeft, Headers
from app.backends.base import Reply
from app.errors import BodyTooLarge

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class AsgiExchange:
    """One request of an ASGI server. Use as a context manager around its answering.

    Once the body is read, a second task waits for the client to leave and then cancels the first.
    """

    def __init__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.server = scope.get("server")
        self.client = scope.get("client")
        self.left = False
        self._receive = receive
        self._send = send
        self._task = asyncio.current_task()
        self._watch: asyncio.Task[None] | None = None
        self._over = False

    async def __aenter__(self) -> AsgiExchange:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._over = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])

    async def body(self, limit: int) -> bytes:
        too_large = BodyTooLarge(
            f"The request body is over the limit of {limit} bytes. Send it in parts."
        )
        announced = self.headers.get(b"content-length", b"0")
        if len(announced) > 18 or int(announced) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
            more = message.get("more_body", False)
        self._watch = asyncio.get_running_loop().create_task(self._watch_client())
        return b"".join(parts)

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        await self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        await self._send({"type": "http.response.body", "body": body})

    async def start(self, status: int, headers: Headers) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def relay(self, reply: Reply) -> None:
        while data := await reply.next():
            await self.write(data)

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    def abort(self) -> None:
        """Nothing to do: a server cuts a response whose app returns before its end."""

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._over and self._task is not None:
            self.left = True
            self._task.cancel()
