"""What a handler has of the job it runs: its lease, kept alive, and what was asked meanwhile.

What comes in: a claimed job. What goes out: heartbeats, until the handler ends the job or the
lease is lost. Knows nothing of what the job does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.db.engine import Database
from app.domain import Job
from app.errors import StorageUnavailable
from app.jobs import queue
from app.jobs.queue import Flags, LeaseLost, NewEvent
from app.telemetry import Event, log

logger = logging.getLogger(__name__)

#: Heartbeats in the time of a lease: one or two may be lost.
BEATS = 3


class JobContext:
    """One attempt at a job. `flags` are as of the last heartbeat.

    `ended`: this attempt is over, by our own hand. `lost`: someone took the job away.
    """

    def __init__(self, db: Database, clock: Clock, job: Job, lease_s: float) -> None:
        self.db = db
        self.clock = clock
        self.job = job
        self.lease = queue.lease_of(job)
        self.lease_s = lease_s
        self.flags = Flags(job.cancel_requested, job.pause_requested)
        self.ended = False
        self.lost = False
        self._flagged = asyncio.Event()
        self._nudged = asyncio.Event()
        self._writing = asyncio.Lock()
        self._kept_at = clock.monotonic()
        self._see(self.flags)

    async def heartbeat(
        self, events: Sequence[NewEvent] = (), progress: Mapping[str, Any] | None = None
    ) -> Flags:
        """Record what happened, and see what was asked meanwhile. Raises LeaseLost."""
        asked_at = self.clock.monotonic()
        async with self.db.begin() as session:
            flags = await queue.heartbeat(
                session,
                self.clock,
                self.lease,
                lease_s=self.lease_s,
                events=events,
                progress=progress,
            )
        self._kept_at = asked_at
        self._see(flags)
        return flags

    async def flagged(self) -> Flags:
        """Wait until a cancellation or a pause is requested."""
        await self._flagged.wait()
        return self.flags

    @asynccontextmanager
    async def ending(self) -> AsyncIterator[AsyncSession]:
        """The transaction that ends the job: whatever is in it happens with the end, or not at all.

        No heartbeat of ours comes between, which would take our own end for a lost lease.
        """
        async with self._writing:
            async with self.db.begin() as session:
                yield session
            self.ended = True

    def nudge(self) -> None:
        """Look at the flags now: someone in this process has just set one."""
        self._nudged.set()

    async def renew(self) -> None:
        """Keep the lease while the handler works; raises LeaseLost once it cannot be kept."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.lease_s / BEATS):
                    await self._nudged.wait()
            self._nudged.clear()
            async with self._writing:
                if self.ended:
                    return
                try:
                    await self._beat()
                except LeaseLost:
                    self.lost = True
                    raise

    async def _beat(self) -> None:
        """One heartbeat. While the database is away the lease is ours until its time is over."""
        left_s = self._kept_at + self.lease_s - self.clock.monotonic()
        try:
            async with asyncio.timeout(left_s):
                await self.heartbeat()
        except TimeoutError as exc:
            raise LeaseLost(f"job {self.job.id}: the database did not answer in time") from exc
        except StorageUnavailable as exc:
            log(logger, logging.WARNING, Event.JOB_UNRECORDED, job=self.job.id, error=str(exc))

    def _see(self, flags: Flags) -> None:
        self.flags = flags
        if flags.cancel or flags.pause:
            self._flagged.set()
        else:
            self._flagged.clear()
