"""A loop whose clock jumps to the next timer: minutes of waiting in milliseconds.

What comes in: coroutines that wait for each other and for time, and for nothing else. What goes
out: their results, and time that passed without anybody waiting for it. One thread, no sockets: a
loop on which nothing is left that could ever happen says so instead of hanging.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

T = TypeVar("T")

_AT = datetime(2030, 1, 1, tzinfo=UTC)


class Stuck(RuntimeError):
    """Every task waits, and no timer is set."""


class _Jump(selectors.SelectSelector):
    """Instead of waiting it lets the time be later."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck("nothing is left that could happen")
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop on a clock that starts at zero and only moves when all tasks wait."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


class VirtualClock:
    """The `Clock` of a `VirtualLoop`; only for code that runs on one."""

    def now(self) -> datetime:
        return _AT + timedelta(seconds=self.monotonic())

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end of `main`; fails if it leaves a task behind."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(main)
        left = [repr(task.get_coro()) for task in asyncio.all_tasks(runner.get_loop())]
    assert not left, f"{len(left)} task(s) left behind: {left[:5]}"
    return result
