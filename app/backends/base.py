"""The one seam between the data plane and model servers.

What comes in: a finished request (path, body, headers). What goes out: a `Reply`. Knows nothing
of routing, keys or adapters' versions.
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

#: Sends bytes on at once. A future in answer means: no more until it is done.
Push = Callable[[bytes], Future[None] | None]


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What an engine's metrics say of it.

    `running` and `waiting` are requests of everybody; `kv_cache_usage` is in [0, 1]. `started_at`,
    in seconds since the epoch, tells one process from the next; None if it does not say.
    """

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    started_at: float | None = None


class ReplyBody(Protocol):
    """Where a reply's bytes come from."""

    @property
    def complete(self) -> bool:
        """Whether every byte has arrived (they may not all have been read)."""

    async def next(self) -> bytes:
        """The next bytes; empty at the end.

        Raises:
            UpstreamBroke: the replica closed before the end.
            UpstreamTimeout: it was silent for too long.
        """

    async def pipe(self, push: Push, push_chunk: Push | None = None) -> None:
        """Push the bytes on as they arrive, until the end. Raises as `next` does.

        `push_chunk`, where given, takes whole chunks of HTTP/1.1's chunked coding as they came,
        size and line ends included: so they are not taken apart and put together again.
        """

    def take(self) -> bytes:
        """What has arrived and was not read, without waiting."""

    def close(self) -> None:
        """Give the connection back, or cut it if bytes are still to come. May run twice."""


class Tap(Protocol):
    """Sees the bytes of a reply pass and may withhold some of them."""

    def feed(self, data: bytes) -> bytes: ...

    def around(self, push: Push) -> Push:
        """`push` behind `feed`, in one call where nothing has to be withheld."""

    def around_chunks(self, push: Push, push_chunk: Push) -> Push:
        """The same for whole chunks as they came; one that is changed goes to `push`."""

    def finish(self) -> bytes:
        """What was held back and belongs to the client after all."""

    def last(self, data: bytes) -> bytes:
        """`feed` and `finish` in one call, for bytes that nothing follows."""


class Reply:
    """What one replica answers: a status, headers, and bytes as they come.

    Closing runs its callbacks exactly once, however the reply ends. They hang here and not in a
    generator's `finally`, because a generator that never started never runs its `finally`.
    """

    __slots__ = ("_body", "_callbacks", "_ended", "_tap", "headers", "replica", "status", "version")

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: ReplyBody) -> None:
        self.status = status
        self.headers = headers
        self.replica = ""
        self.version = ""
        self._body = body
        self._tap: Tap | None = None
        self._callbacks: list[Callable[[], None]] | None = []
        self._ended = False

    @property
    def complete(self) -> bool:
        """Whether every byte has arrived: `take` returns the whole reply."""
        return self._body.complete

    def on_close(self, callback: Callable[[], None]) -> Self:
        """Run `callback` when the reply ends; at once if it already has."""
        if self._callbacks is None:
            callback()
        else:
            self._callbacks.append(callback)
        return self

    def through(self, tap: Tap) -> Self:
        """Let `tap` see, and filter, the bytes on their way."""
        self._tap = tap
        return self

    async def next(self) -> bytes:
        """The next bytes for the client; empty at the end.

        Raises:
            UpstreamBroke: the replica closed before the end.
            UpstreamTimeout: it was silent for too long.
        """
        while not self._ended:
            data = await self._body.next()
            if not data:
                self._ended = True
                return self._tap.finish() if self._tap else b""
            if self._tap is None or (data := self._tap.feed(data)):
                return data
        return b""

    async def pipe(self, push: Push, push_chunk: Push | None = None) -> None:
        """Push the reply on as it arrives: `next` without a task step for each piece.

        `push_chunk`: see `ReplyBody.pipe`.

        Raises:
            UpstreamBroke: the replica closed before the end.
            UpstreamTimeout: it was silent for too long.
        """
        tap = self._tap
        if tap is None:
            await self._body.pipe(push, push_chunk)
            return
        if push_chunk is not None:
            push_chunk = tap.around_chunks(push, push_chunk)
        await self._body.pipe(tap.around(push), push_chunk)
        if held := tap.finish():
            push(held)

    def take(self) -> bytes:
        """The rest of a complete reply."""
        self._ended = True
        data = self._body.take()
        return data if self._tap is None else self._tap.last(data)

    async def read(self, limit: int) -> bytes:
        """The whole body, cut at `limit` bytes."""
        parts: list[bytes] = []
        size = 0
        while size < limit and (data := await self.next()):
            parts.append(data)
            size += len(data)
        return b"".join(parts)[:limit]

    def close(self) -> None:
        """End the reply. A body that is not complete is cut off, which cancels it upstream."""
        callbacks, self._callbacks = self._callbacks, None
        if callbacks is None:
            return
        self._body.close()
        for callback in callbacks:
            callback()


class BufferedBody:
    """A body that is already here in full."""

    __slots__ = ("_data",)

    complete = True

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def next(self) -> bytes:
        return self.take()

    async def pipe(self, push: Push, push_chunk: Push | None = None) -> None:
        push(self.take())

    def take(self) -> bytes:
        data, self._data = self._data, b""
        return data

    def close(self) -> None:
        self._data = b""


@dataclass(frozen=True, slots=True)
class Features:
    """What a replica gets right beyond its dialect.

    `prompt_logprobs`: asking for them is safe and right for the base, as long as no adapter that
    changes lm_head is loaded beside it. `lora_prompt_logprobs`: so it is for adapters that leave
    lm_head alone. `lm_head_prompt_logprobs`: for those that change it as well, and beside them.
    `dtype`: what it computes in, if it says so.
    """

    prompt_logprobs: bool
    lora_prompt_logprobs: bool
    lm_head_prompt_logprobs: bool
    dtype: str | None = None


class Backend(Protocol):
    """A dialect of model server: one of these for each replica."""

    async def send(self, path: str, body: bytes, headers: bytes) -> Reply:
        """Post a JSON body and return once the reply's head is here.

        `headers` are extra header lines, each ended by CRLF.

        Raises:
            UpstreamRefused: nothing arrived; safe to send elsewhere.
            UpstreamTimeout: no first byte in time.
            UpstreamBroke: the connection died or the answer was not HTTP.
        """

    async def load_adapter(self, name: str, path: str) -> None:
        """Make the replica serve the adapter at `path` as `name`.

        Raises:
            AdapterLoadFailed: it will never serve these weights.
            UpstreamError: it could not be asked.
        """

    async def unload_adapter(self, name: str) -> None:
        """Make the replica forget `name`; one it does not know is fine."""

    async def list_adapters(self) -> dict[str, str]:
        """The adapters it has: name -> path."""

    async def score(self, name: str, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """The logprob under `name` of every id but the first of each row.

        One row a request: some engines die of two rows' prompt logprobs in one step.

        Raises:
            UpstreamError: it did not answer, or refused.
        """

    async def healthy(self) -> bool:
        """Whether it takes requests."""

    async def status(self) -> EngineStatus:
        """How busy it is, and which process it is.

        Raises:
            UpstreamError: it could not be asked.
        """

    async def features(self) -> Features:
        """Which prompt logprobs it gets right.

        Raises:
            UpstreamError: it could not be asked.
        """

    async def close(self) -> None:
        """Close idle connections, and the others as they finish."""
