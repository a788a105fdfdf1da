"""Requests that wait for a place on one replica: in order within an adapter, adapters in turn.

What comes in: waiters under an adapter's name. What goes out: the next one that can be served. An
adapter with a thousand requests delays another's first one by one turn. Knows no replica.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

#: What a waiter is told: True, it has a claim; False, look for another replica.
Turn = asyncio.Future[bool]


class Waiter:
    """One request in line. `since` is when it came, in monotonic seconds."""

    __slots__ = ("name", "since", "turn")

    def __init__(self, name: str, since: float, turn: Turn) -> None:
        self.name = name
        self.since = since
        self.turn = turn


class Line:
    """The lines of all adapters before one replica."""

    __slots__ = ("_lines", "length")

    def __init__(self) -> None:
        self._lines: dict[str, deque[Waiter]] = {}
        self.length = 0

    @property
    def names(self) -> int:
        """How many adapters wait."""
        return len(self._lines)

    def counts(self) -> dict[str, int]:
        """How many wait, by name."""
        return {name: len(line) for name, line in self._lines.items()}

    def of(self, name: str) -> int:
        """How many wait under this name."""
        line = self._lines.get(name)
        return len(line) if line is not None else 0

    def join(self, waiter: Waiter) -> None:
        self._lines.setdefault(waiter.name, deque()).append(waiter)
        self.length += 1

    def leave(self, waiter: Waiter) -> bool:
        """It waits no longer: its client left. False if it was not in line any more."""
        line = self._lines.get(waiter.name)
        if line is None or waiter not in line:
            return False
        line.remove(waiter)
        self._shrunk(waiter.name, line)
        return True

    def pop(self, takes: Callable[[str], bool]) -> Waiter | None:
        """The next waiter whose name `takes`; its adapter then waits behind the others."""
        for name in self._lines:
            if takes(name):
                line = self._lines.pop(name)
                waiter = line.popleft()
                self._lines[name] = line
                self._shrunk(name, line)
                return waiter
        return None

    def eldest(self, waits: Callable[[str], bool]) -> float | None:
        """Since when the longest waiting of those whose name `waits` is here."""
        firsts = (line[0].since for name, line in self._lines.items() if waits(name))
        return min(firsts, default=None)

    def clear(self) -> list[Waiter]:
        """Everyone, in no particular order; the line is empty then."""
        everyone = [waiter for line in self._lines.values() for waiter in line]
        self._lines.clear()
        self.length = 0
        return everyone

    def _shrunk(self, name: str, line: deque[Waiter]) -> None:
        self.length -= 1
        if not line:
            del self._lines[name]
