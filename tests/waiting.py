"""Wait for a condition with a deadline, instead of sleeping and hoping.

What comes in: a function that says whether it is so yet. What goes out: its first true value,
or a failed test that names the condition.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

T = TypeVar("T")


async def until(
    condition: Callable[[], T] | Callable[[], Awaitable[T]],
    within_s: float = 5,
    every_s: float = 0.01,
) -> T:
    """Await until `condition()` (sync or async) is true; return what it returned."""
    deadline = time.monotonic() + within_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return cast(T, value)
        if time.monotonic() > deadline:
            raise AssertionError(_late(condition, within_s, value))
        await asyncio.sleep(every_s)


def wait_until(condition: Callable[[], T], within_s: float = 5, every_s: float = 0.01) -> T:
    """The same for a test without a loop."""
    deadline = time.monotonic() + within_s
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(_late(condition, within_s, value))
        time.sleep(every_s)


def _late(condition: Callable[[], object], within_s: float, value: object) -> str:
    try:
        text = inspect.getsource(condition).strip()
    except (OSError, TypeError):
        text = repr(condition)
    return f"not so within {within_s} s (last value {value!r}): {text}"
