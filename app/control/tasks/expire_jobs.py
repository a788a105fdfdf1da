"""Takes jobs away from gateways that were lost, and counts what waits.

What comes in: leases whose time is over. What goes out: jobs that are queued again, paused,
cancelled or failed, as `jobs.queue` says, a wake for the runner of this gateway, and the numbers
that /metrics shows of the queue, which it must not ask the database for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from app.clock import Clock
from app.db.engine import Database
from app.domain import JobStatus
from app.jobs import queue
from app.jobs.queue import Depth
from app.telemetry import Event, log

logger = logging.getLogger(__name__)

#: A job whose gateway was lost waits for the rest of its lease, and at most this much longer.
PERIOD_S = 2.0


class ExpireJobs:
    """Reconciles running jobs with the leases on them. `depth` is as of its last run."""

    def __init__(self, db: Database, clock: Clock, wake: Callable[[], None]) -> None:
        self._db = db
        self._clock = clock
        self._wake = wake
        self.depth: Sequence[Depth] = ()

    async def activate(self) -> dict[str, object]:
        """End the leases that ran out, and count."""
        async with self._db.begin() as session:
            expired = await queue.expire(session, self._clock)
        for job in expired:
            fields = {"job": job.id, "attempt": job.attempts, "status": job.status.value}
            log(logger, logging.WARNING, Event.JOB_EXPIRED, **fields)
        if expired:
            self._wake()
        async with self._db.read() as session:
            self.depth = await queue.depth(session)
        return {
            "expired": len(expired),
            **{status.value: self._count(status) for status in queue.UNFINISHED},
        }

    def waits(self) -> dict[str, float]:
        """How long the oldest waiting job of each trainer has waited, in seconds."""
        now = self._clock.now()
        return {
            depth.trainer or "": (now - depth.oldest_created_at).total_seconds()
            for depth in self.depth
            if depth.status is JobStatus.QUEUED
        }

    def _count(self, status: JobStatus) -> int:
        return sum(depth.jobs for depth in self.depth if depth.status is status)
