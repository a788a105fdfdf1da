"""One gateway's runner as a program of its own, to be one of several on a database, and killed.

What comes in: a database's URL, a name, and at which of its jobs it hangs (0: at none). What goes
out: a line for each job it begins. It ends when it is told to terminate.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from app.clock import SystemClock
from app.control.tasks.expire_jobs import ExpireJobs
from app.db.engine import Database
from app.domain import Job, JobEventType, JobKind
from app.jobs import queue
from app.jobs.context import JobContext
from app.jobs.queue import NewEvent
from app.jobs.runner import Runner

#: Short, so that a job is soon taken over; long beside the pauses of a busy machine.
LEASE_S = 2.0
CAPACITY = 6
TRAINER = "gpu"


class Worker:
    """The handler: a step, then the end; it hangs at one job."""

    def __init__(self, hangs_at: int) -> None:
        self._hangs_at = hangs_at
        self._begun = 0

    async def __call__(self, job: Job, ctx: JobContext) -> None:
        self._begun += 1
        hangs = self._begun == self._hangs_at
        say("hangs" if hangs else "begins", job)
        for step in (1, 2):
            await ctx.heartbeat([NewEvent(JobEventType.METRICS, f"Step {step}", step=step)])
            if hangs:
                await asyncio.Event().wait()
        async with ctx.ending() as session:
            await queue.finish(session, ctx.clock, ctx.lease, {"attempt": job.attempts})


def say(word: str, job: Job) -> None:
    sys.stdout.write(f"{word} {job.id} {job.attempts}\n")
    sys.stdout.flush()


async def main(url: str, name: str, hangs_at: int) -> None:
    db, clock = Database(url), SystemClock()
    runner = Runner(
        db,
        clock,
        {JobKind.FINE_TUNE: Worker(hangs_at)},
        {TRAINER: CAPACITY},
        token=name,
        lease_s=LEASE_S,
        poll_s=0.1,
    )
    task = ExpireJobs(db, clock, runner.wake)

    async def expire() -> None:
        while True:
            await task.activate()
            await asyncio.sleep(0.3)

    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(runner.run()), group.create_task(expire())]
        await told.wait()
        for each in tasks:
            each.cancel()
    await db.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
