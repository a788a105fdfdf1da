"""The thread between one request and the engine: deltas go one way, a flag the other.

What comes in: deltas from the engine thread. What goes out: the same, awaited on the event loop.
It must not know: what a delta says.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from app.worker.samplers.delta import Delta


class Ticket:
    """Ends after `expected` sequences have finished, or with the error that ended it.

    `add` and `fail` are called by the engine thread, `wake` on the loop once per step; appending
    to a deque and setting a flag need no lock.
    """

    def __init__(self, expected: int) -> None:
        self.cancelled = False
        self._expected = expected
        self._news: deque[Delta] = deque()
        self._error: Exception | None = None
        self._awake = asyncio.Event()

    def add(self, delta: Delta) -> None:
        self._news.append(delta)

    def fail(self, error: Exception) -> None:
        self._error = error

    def wake(self) -> None:
        self._awake.set()

    def cancel(self) -> None:
        """Nobody waits any more; the engine drops the rows before its next step."""
        self.cancelled = True

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What happened since the last time, until all sequences have finished."""
        while self._expected:
            news: list[Delta] = []
            while self._news:
                news.append(self._news.popleft())
            self._expected -= sum(delta.finish_reason is not None for delta in news)
            if news:
                yield news
            elif self._error is not None:
                raise self._error
            else:
                self._awake.clear()
                if not self._news and self._error is None:
                    await self._awake.wait()
