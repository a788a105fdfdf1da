"""How often a pool may be asked again: a budget, so that retries cannot become a storm.

What comes in: requests and retries. What goes out: leave to retry, and how long to wait first.
Each request earns a fifth of a retry and time earns a few more, up to a reserve that a dying
replica full of requests does not use up. (As Finagle's RetryBudget; and full jitter after
M. Brooker, "Exponential Backoff And Jitter", 2015.)
"""

from __future__ import annotations

import random

PER_REQUEST = 0.2
PER_SECOND = 10.0
RESERVE = 512.0
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5


class RetryBudget:
    """Tokens for retries. Starts full."""

    __slots__ = ("_at", "_tokens")

    def __init__(self, now: float) -> None:
        self._at = now
        self._tokens = RESERVE

    def earn(self) -> None:
        """A request came."""
        if self._tokens < RESERVE:
            self._tokens += PER_REQUEST

    def spend(self, now: float) -> bool:
        """Whether one more retry is allowed; if so, it is counted."""
        self._tokens = min(RESERVE, self._tokens + (now - self._at) * PER_SECOND)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def pause_s(retries: int) -> float:
    """How long to wait before the `retries`-th retry (from 1) of an overloaded pool."""
    return random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (retries - 1)))
