"""Blocking work in a thread that ends when its caller is cancelled.

What comes in: a function that calls `check()` between its steps. What goes out: its result. A
thread cannot be cancelled, so it is asked to stop and waited for: whoever cleans up after it (a
staging folder) then knows that nobody still writes there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

Check = Callable[[], None]


class Stopped(Exception):
    """The caller is gone. Never seen outside: the caller's cancellation goes on instead."""


async def in_thread(work: Callable[[Check], T]) -> T:
    """Run `work(check)` in a thread; on cancellation, make `check` raise and wait for the end."""
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    running = asyncio.get_running_loop().run_in_executor(None, work, check)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError:  # asked twice: the answer is the same
                continue
        if not running.cancelled():
            running.exception()  # seen: nobody else will ask for it
        raise
