"""A circuit breaker for one replica: stops asking after failures, then tries one request.

What comes in: how requests ended, and the time. What goes out: whether to send another one. It
covers what a health probe does not see: a replica that accepts connections and answers /health,
but resets or fails what it is sent. (M. Nygard, Release It!, 2nd ed., section 5.2.)
"""

from __future__ import annotations

#: Failures in a row that open it.
FAILURES = 5
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Breaker:
    """Closed until `FAILURES` requests in a row fail; then open for a while that doubles.

    After the pause it is half open: one request may try. If that one succeeds it closes, else it
    opens for twice as long. `failures` are those in a row.
    """

    __slots__ = ("_opened_until", "_pause_s", "_trying", "closed", "failures")

    def __init__(self) -> None:
        self.closed = True
        self.failures = 0
        self._opened_until = 0.0
        self._pause_s = 0.0
        self._trying = False

    def allows(self, now: float) -> bool:
        """Whether a request may be sent at `now`, in monotonic seconds."""
        return self.closed or (now >= self._opened_until and not self._trying)

    def began(self) -> None:
        """A request is being sent: in a half-open breaker it is the one that tries."""
        if not self.closed:
            self._trying = True

    def abandoned(self) -> None:
        """It ended without telling anything: the client left, say."""
        self._trying = False

    def succeeded(self) -> None:
        self.closed = True
        self.failures = 0
        self._pause_s = 0.0
        self._trying = False

    def failed(self, now: float) -> bool:
        """Count a failure; whether that opened it."""
        self.failures += 1
        self._trying = False
        if self.closed and self.failures < FAILURES:
            return False
        if not self.closed and now < self._opened_until:
            return False  # one of those sent before it opened
        self._pause_s = min(self._pause_s * 2 or FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._opened_until = now + self._pause_s
        self.closed = False
        return True
