"""What can go wrong with one request to a model server; the fake upstream plays it.

What comes in: a test's wish. What goes out: values the upstream acts on. `after` counts
streamed events (or, for a plain answer, halves of the body) that still go out; 0 means that
not even the head does.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field


class Fault:
    """One misbehaviour, used up by one request."""


@dataclass
class Status(Fault):
    """Answer with this status and body and do nothing."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)


@dataclass
class Raw(Fault):
    """Write these bytes, whatever they are, and close when `close` is set."""

    data: bytes
    close: bool = True


@dataclass
class Break(Fault):
    """Cut the connection: with a reset, or `politely`, as a dying process's kernel does."""

    after: int = 0
    politely: bool = False


@dataclass
class Slow(Fault):
    """Take this long before each event."""

    per_event_s: float


@dataclass
class EndlessHead(Fault):
    """Send header lines until the other side has had enough."""


@dataclass
class Flood(Fault):
    """Stream this many bytes of events as fast as they are taken; of this event, if given."""

    total_bytes: int
    event_bytes: int = 64 * 1024
    event: bytes = b""


@dataclass
class EngineDead(Fault):
    """The engine dies of this request: 500 now, and /health says 503 from here on."""


@dataclass(eq=False)
class Stall(Fault):
    """Fall silent after some events, until released. `Stall(after=1)` holds event 2.

    `reached` tells the test that the silence has begun.
    """

    after: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    _released: asyncio.Event = field(default_factory=asyncio.Event)
    _loop: asyncio.AbstractEventLoop | None = None

    async def hold(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.reached.set()
        await self._released.wait()

    def release(self) -> None:
        """Let the request go on; call it from any thread, before or after it stalled."""
        if self._loop is None:
            self._released.set()
        else:
            self._loop.call_soon_threadsafe(self._released.set)
