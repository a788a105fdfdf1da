"""A loop in a thread of its own, so that a server under test keeps going while a test blocks.

What comes in: coroutines and functions from the test's thread. What goes out: their results.
The real, synchronous clients need it, and so does whoever counts on not sharing a loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
LoopFactory = Callable[[], asyncio.AbstractEventLoop]


class LoopThread:
    """Runs until `close`, which fails if a task was left behind."""

    def __init__(self, name: str, loop_factory: LoopFactory | None = None) -> None:
        self.name = name
        self._loop_factory = loop_factory
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._left: list[str] = []
        self._thread.start()
        self._ready.wait()

    def run(self, coroutine: Coroutine[Any, Any, T], within_s: float = 30) -> T:
        """Run a coroutine there and wait for its result here."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(within_s)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a plain function there and wait for its result here."""

        async def run() -> T:
            return function(*args)

        return self.run(run())

    def close(self) -> None:
        if self.loop.is_closed():
            return
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=15)
        assert not self._thread.is_alive(), f"the loop of {self.name} does not end"
        assert not self._left, f"tasks left behind by {self.name}: {self._left}"

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=self._loop_factory) as runner:
            self.loop = runner.get_loop()
            runner.run(self._until_stopped())

    async def _until_stopped(self) -> None:
        self._stop = asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        await asyncio.sleep(0)
        mine = asyncio.current_task()
        self._left = [repr(task.get_coro()) for task in asyncio.all_tasks() if task is not mine]
