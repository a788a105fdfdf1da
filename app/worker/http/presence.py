"""Is the client still there? Work that nobody waits for any more is given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.errors import LoragateError

T = TypeVar("T")
CLIENT_CLOSED_REQUEST = 499


class ClientGone(Exception):
    """The client closed its connection."""


async def while_present(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, unless the client leaves first: then `work` is cancelled."""
    failure: LoragateError | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            watcher = tasks.create_task(_departure(receive))
            try:
                result = await work
            except LoragateError as exc:
                failure = exc
            finally:
                watcher.cancel()
    except* ClientGone:
        raise ClientGone from None
    if failure is not None:
        raise failure
    return result


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGone


class Cancellable(Protocol):
    """Something that goes on until told otherwise."""

    def cancel(self) -> None:
        """Stop; harmless when it is over."""


class EventStream(Response):
    """Server-sent events. However it ends, what feeds it is cancelled once.

    A response and not a generator's `finally`: a generator that never started never runs its
    `finally`.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncIterator[bytes], source: Cancellable) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_present(receive, self._send(send))
        except ClientGone:
            pass
        finally:
            self._source.cancel()

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for chunk in self._rest:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
