"""Waiting for a worker: as long as patience lasts, and no longer than somebody wants.

What comes in: something to ask a worker, and a call of `stop` from elsewhere. What goes out: its
answer, `Stopped`, or the error that did not pass. It must not know: what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from app.clock import Clock
from app.errors import RunLost, TrainerBusy, TrainerUnavailable

T = TypeVar("T")

#: What a worker that is restarted, or has no room for a while, may answer.
PASSING = (TrainerUnavailable, RunLost, TrainerBusy)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0


class Stopped(Exception):
    """`stop` was called: what was waited for is cancelled, or was never begun."""


class Patience:
    """Who drives a run waits with this, for one thing at a time."""

    def __init__(self, clock: Clock, limit_s: float) -> None:
        self.stopped = False
        self._clock = clock
        self._limit_s = limit_s
        self._waiting: asyncio.Timeout | None = None

    def stop(self) -> None:
        """End every wait, this one and those to come."""
        self.stopped = True
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def once(self, begin: Callable[[], Awaitable[T]]) -> T:
        """Begin something and wait for it.

        Raises:
            Stopped: at once when `stop` is called, or was.
        """
        if self.stopped:
            raise Stopped
        try:
            async with asyncio.timeout(None) as self._waiting:
                return await begin()
        except TimeoutError:
            if not self.stopped:
                raise
            raise Stopped from None
        finally:
            self._waiting = None

    async def again(self, begin: Callable[[], Awaitable[T]]) -> T:
        """Ask again and again, with longer pauses, while the worker is away.

        Raises:
            Stopped: as `once`.
            TrainerUnavailable, RunLost, TrainerBusy: patience is at its end.
        """
        began, pause_s = self._clock.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                return await self.once(begin)
            except PASSING:
                if self._clock.monotonic() - began >= self._limit_s:
                    raise
            await self.pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def pause(self, seconds: float) -> None:
        await self.once(lambda: asyncio.sleep(seconds))
