"""Runs jobs: claims them, gives each to its handler, and sees it end.

What comes in: handlers by kind, and how many jobs each trainer takes. What goes out: jobs that
ended, or that someone else goes on with. Knows nothing of what a job does.

A handler ends its job itself, in `ctx.ending()`. If it raises instead, the class of the error says
what becomes of the job: the caller's to mend (`RequestError`) fails it; any other `LoragateError`
gives it back, after a pause that doubles with each attempt; what was never foreseen fails it.
Neither a trainer that is away nor a gateway that stops counts as an attempt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol

from app.clock import Clock
from app.db.engine import Database
from app.domain import Job, JobError, JobKind
from app.errors import (
    LoragateError,
    RequestError,
    StorageUnavailable,
    TrainerBusy,
    TrainerError,
    TrainerUnavailable,
)
from app.jobs import queue
from app.jobs.context import JobContext
from app.jobs.queue import LeaseLost
from app.telemetry import Event, log

logger = logging.getLogger(__name__)

#: The code of a job whose trainer failed it once too often.
TRAINER_LOST = "trainer_lost"
#: The longest pause before a job is tried again.
MAX_DELAY_S = 60.0

_STOPPED = JobError(queue.GATEWAY_LOST, "The gateway that ran the job stops.")
_CRASHED = JobError("internal_error", "The gateway failed at this job; its log says why.")


class Handler(Protocol):
    """Does the jobs of one kind."""

    async def __call__(self, job: Job, ctx: JobContext) -> None:
        """Do the job and end it, or raise; cancelled when the lease is lost or the gateway stops.

        Called again for the same job after any loss: `job.progress` is what it recorded last.
        """


class Runner:
    """The jobs of this gateway. `run()` lives in the lifespan and is ended by cancelling it."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        handlers: Mapping[JobKind, Handler],
        capacities: Mapping[str | None, int],
        *,
        token: str,
        lease_s: float,
        poll_s: float = 1.0,
    ) -> None:
        """`capacities`: most jobs each trainer runs at once, over all gateways."""
        self._db = db
        self._clock = clock
        self._handlers = handlers
        self._capacities = capacities
        self._token = token
        self._lease_s = lease_s
        self._poll_s = poll_s
        self._woken = asyncio.Event()
        #: Not by job: one that was lost may come back while its first attempt still ends.
        self._running: set[JobContext] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def running(self) -> list[str]:
        """The ids of the jobs that run here now."""
        return sorted({context.job.id for context in self._running})

    def wake(self) -> None:
        """Look for a job soon. Carries no data; without it the queue is looked at now and then."""
        self._woken.set()

    def nudge(self, job_id: str) -> None:
        """A flag of this job was set: if it runs here, let it see that at once."""
        for context in self._running:
            if context.job.id == job_id:
                context.nudge()

    async def run(self) -> None:
        """Claim and run jobs until cancelled; gives back what still runs."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._woken.clear()
                while (job := await self._claim()) is not None:
                    context = JobContext(self._db, self._clock, job, self._lease_s)
                    self._running.add(context)
                    self._idle.clear()
                    group.create_task(self._see_through(context), name=f"job:{job.id}")
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_s):
                        await self._woken.wait()

    async def drain(self, within_s: float) -> bool:
        """Claim nothing more, and wait for what runs; False if something still does after that."""
        self._draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        return not self._running

    async def _claim(self) -> Job | None:
        if self._draining:
            return None
        try:
            async with self._db.begin() as session:
                job = await queue.claim(
                    session,
                    self._clock,
                    capacities=self._capacities,
                    kinds=list(self._handlers),
                    token=self._token,
                    lease_s=self._lease_s,
                )
        except Exception as exc:  # the jobs that run must not end because no new one can begin
            error = f"{type(exc).__name__}: {exc}"
            log(logger, logging.WARNING, Event.JOBS_UNAVAILABLE, error=error)
            logger.debug("no claim", exc_info=exc)
            return None
        if job is not None:
            log(
                logger,
                logging.INFO,
                Event.JOB_CLAIMED,
                job=job.id,
                kind=job.kind.value,
                trainer=job.trainer,
                attempt=job.attempts,
                waited_s=round((self._clock.now() - job.created_at).total_seconds(), 3),
            )
        return job

    async def _see_through(self, context: JobContext) -> None:
        """Run a job to an end of some kind. One job's failure must not end the others."""
        try:
            await self._hold(context)
        except* LeaseLost as lost:
            _log(Event.JOB_LEASE_LOST, context, error=str(lost.exceptions[0]))
        except* StorageUnavailable as exc:  # its lease will end, and someone else go on
            _log(Event.JOB_UNRECORDED, context, error=str(exc.exceptions[0]))
        except* Exception as exc:  # this job's failure must not end the others
            logger.error(Event.JOB_CRASHED.value, exc_info=exc, extra=_extra(context))
        finally:
            self._running.discard(context)
            if not self._running:
                self._idle.set()
            self.wake()

    async def _hold(self, context: JobContext) -> None:
        """Work at the job and keep its lease, each until the other ends."""
        async with asyncio.TaskGroup() as group:
            renewal = group.create_task(context.renew(), name=f"lease:{context.job.id}")
            await self._work(context)
            renewal.cancel()

    async def _work(self, context: JobContext) -> None:
        job = context.job
        try:
            await self._handlers[job.kind](job, context)
            if not context.ended:
                raise RuntimeError(f"the handler of {job.kind} did not end its job")
        except LeaseLost:
            raise
        except RequestError as exc:
            await _fail(context, JobError(exc.code, str(exc), exc.param))
        except LoragateError as exc:
            code = TRAINER_LOST if isinstance(exc, TrainerError) else exc.code
            away = isinstance(exc, TrainerUnavailable | TrainerBusy)
            await _give_back(context, JobError(code, str(exc)), count=not away, pause=True)
        except asyncio.CancelledError as exc:
            if context.lost:
                raise
            if not _being_cancelled():
                logger.error(Event.JOB_CRASHED.value, exc_info=exc, extra=_extra(context))
                await _fail(context, _CRASHED)
                return
            await _give_back(context, _STOPPED, count=False)
            raise
        except Exception as exc:
            logger.error(Event.JOB_CRASHED.value, exc_info=exc, extra=_extra(context))
            await _fail(context, _CRASHED)
        else:
            _log(Event.JOB_FINISHED, context)


async def _fail(context: JobContext, error: JobError) -> None:
    if context.ended:
        return
    async with context.ending() as session:
        await queue.fail(session, context.clock, context.lease, error)
    _log(Event.JOB_FINISHED, context, error=error.code)


async def _give_back(
    context: JobContext, reason: JobError, *, count: bool, pause: bool = False
) -> None:
    if context.ended:
        return
    delay_s = min(2.0 ** (context.lease.attempt - 1), MAX_DELAY_S) if pause else 0.0
    async with context.ending() as session:
        status = await queue.give_back(
            session, context.clock, context.lease, reason, count=count, delay_s=delay_s
        )
    _log(Event.JOB_GIVEN_BACK, context, reason=reason.code, error=reason.message, status=status)


def _extra(context: JobContext) -> dict[str, object]:
    return {"fields": {"job": context.job.id, "attempt": context.lease.attempt}}


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _log(event: Event, context: JobContext, **fields: object) -> None:
    log(logger, logging.INFO, event, job=context.job.id, attempt=context.lease.attempt, **fields)
