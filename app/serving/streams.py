"""The streams of a batch's parts, passed on as one while they come.

What comes in: ways to send each part. What goes out: a reply body of their events, merged by
`gather.Merger`. A slow client holds all of them back: nothing is kept here but the beginning of an
event whose end has not come.
"""

from __future__ import annotations

import asyncio
from asyncio import Future, Task
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import TypeVar

from app.backends.base import Push, Reply
from app.errors import UpstreamBroke, UpstreamError
from app.serving.gather import DONE, Merger
from app.serving.offender import Refused

T = TypeVar("T")

#: How often a part is sent before the batch fails.
MAX_ATTEMPTS = 3
#: The longest event: of a prompt with its logprobs, say.
_EVENT_BYTES = 64 << 20
#: What `next` may leave untaken before the parts are held back.
_READ_AHEAD_BYTES = 64 << 10


async def together(jobs: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """All results; the first failure ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


class Stream:
    """One part. It is sent again if it is lost before anything of it has gone on.

    Args:
        places: its prompts in the client's array.
        send: sends it, for the n-th time, and returns a reply that is no error.
    """

    def __init__(self, places: Sequence[int], send: Callable[[int], Awaitable[Reply]]) -> None:
        self.places = places
        self.replica = ""
        self._send = send
        self._attempt = 0
        self._reply: Reply | None = None
        self._held = b""
        self._final = False

    async def open(self) -> None:
        """Have a reply that has begun."""
        self._reply = await self._send(self._attempt)
        self.replica = self._reply.replica

    async def pipe(self, push: Push) -> None:
        """Push the reply on, and another if this one is lost in time."""
        while True:
            assert self._reply is not None
            try:
                await self._reply.pipe(push)
            except UpstreamError:
                self._attempt += 1
                if self._final or self._attempt >= MAX_ATTEMPTS:
                    raise
                self._reply.close()
                self._held = b""
                await self.open()
            else:
                self._reply.close()
                return

    def events(self, data: bytes) -> list[bytes]:
        """The events that are whole now.

        Raises:
            UpstreamBroke: one does not end.
        """
        data = self._held + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._held = data.split(b"\n\n")
        if len(self._held) > _EVENT_BYTES:
            raise UpstreamBroke(f"The replica {self.replica} sent an event without an end.")
        return [event + b"\n\n" for event in events]

    def passed_on(self) -> None:
        """The client has something of it: sending it again would say that twice."""
        self._final = True

    def close(self) -> None:
        """End it where it is."""
        self._final = True
        if self._reply is not None:
            self._reply.close()


class MergedBody:
    """A `ReplyBody` of several streams, each with its own choices. `n`: choices for a prompt."""

    complete = False

    def __init__(self, streams: Sequence[Stream], n: int) -> None:
        self._streams = streams
        self._merger = Merger(n)
        self._failure: UpstreamError | None = None
        self._told = False
        self._task: Task[None] | None = None
        self._untaken: list[bytes] = []
        self._waiter: Future[None] | None = None
        self._room: Future[None] | None = None

    async def pipe(self, push: Push, push_chunk: Push | None = None) -> None:
        try:
            await together(
                [stream.pipe(partial(self._passed, push, stream)) for stream in self._streams]
            )
        except UpstreamError:
            if self._failure is None and not self._told:
                raise
        except Refused as exc:  # a part that was sent again: too late for a status
            self._told = True
            push(b"data: %b\n\n" % exc.refusal.body)
        if self._failure is not None:
            raise self._failure
        push(DONE if self._told else self._merger.end())

    def _passed(self, push: Push, stream: Stream, data: bytes) -> Future[None] | None:
        """Push on what of a part's data is for the client. May not raise: a socket calls it."""
        if self._told or self._failure is not None:
            return None
        try:
            events = [self._merger.event(event, stream.places) for event in stream.events(data)]
        except UpstreamError as exc:
            self._failure = exc
            self._stop()
            return None
        if self._merger.told:
            self._told = True
            self._stop()
        found = b"".join(events)
        if not found:
            return None
        stream.passed_on()
        return push(found)

    def _stop(self) -> None:
        for stream in self._streams:
            stream.close()

    async def next(self) -> bytes:
        """What has come since the last call: `pipe`, for a reader that asks."""
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._task = loop.create_task(self.pipe(self._keep))
            self._task.add_done_callback(self._ended)
        while not self._untaken:
            if self._task.done():
                self._task.result()
                return b""
            self._waiter = loop.create_future()
            await self._waiter
        return self.take()

    def take(self) -> bytes:
        data = b"".join(self._untaken)
        self._untaken.clear()
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)
        return data

    def _keep(self, data: bytes) -> Future[None] | None:
        self._untaken.append(data)
        self._wake()
        if self._room is None and sum(map(len, self._untaken)) > _READ_AHEAD_BYTES:
            self._room = asyncio.get_running_loop().create_future()
        return self._room

    def _ended(self, task: Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # seen, even if the reader has left
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._stop()
