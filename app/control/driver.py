"""Runs the reconcile tasks: periodically, sooner when woken, each in its own asyncio task.

What comes in: coroutine functions that take no input. What goes out: their effects, and statuses
that say when each last ran, how long it took and what it reported. Knows nothing of what a task
does. A task that fails is logged, counted and run again at its next turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime

from app.clock import Clock
from app.telemetry import Event, log

logger = logging.getLogger(__name__)

#: What a run reports is shown at /admin/tasks; None reports nothing.
Activate = Callable[[], Awaitable[Mapping[str, object] | None]]


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """What /admin/tasks shows of one task. `details` is what its last good run returned."""

    name: str
    period_s: float
    running: bool
    runs: int
    failures: int
    last_started_at: datetime | None
    last_duration_s: float | None
    last_error: str | None
    details: Mapping[str, object] = field(default_factory=dict)


class Activator:
    """The handle of one task: wakes it, and waits for it."""

    def __init__(self, name: str, activate: Activate, period_s: float, clock: Clock) -> None:
        self.name = name
        self._activate = activate
        self._period_s = period_s
        self._clock = clock
        self._woken = asyncio.Event()
        self._ended = asyncio.Condition()
        self._asked = 0
        self._served = 0
        self._looping = False
        self._status = TaskStatus(name, period_s, False, 0, 0, None, None, None)

    def wake(self) -> None:
        """Run soon. Carries no data; waking a task that is running makes it run once more."""
        self._asked += 1
        self._woken.set()

    async def settle(self, within_s: float = 5.0) -> bool:
        """Wake, and wait until a run that began after this call has ended, well or not.

        False when that took longer than `within_s`: the change is committed all the same, and
        the task gets to it at its own pace. Also False, at once, while no driver runs.
        """
        self.wake()
        if not self._looping:
            return False
        ticket = self._asked
        try:
            async with asyncio.timeout(within_s), self._ended:
                await self._ended.wait_for(lambda: self._served >= ticket)
        except TimeoutError:
            return False
        return True

    def status(self) -> TaskStatus:
        return self._status

    async def loop(self) -> None:
        """Run forever: at once, then at each period or wake. Ends by cancellation."""
        self._looping = True
        try:
            while True:
                self._woken.clear()
                await self._run_once(self._asked)
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._period_s):
                        await self._woken.wait()
        finally:
            self._looping = False

    async def _run_once(self, ticket: int) -> None:
        before, started = self._status, self._clock.monotonic()
        error: str | None = None
        details = before.details
        self._status = replace(before, running=True, last_started_at=self._clock.now())
        try:
            details = await self._activate() or {}
        except Exception as exc:  # one task's failure must not end the others
            error = f"{type(exc).__name__}: {exc}"
            log(logger, logging.ERROR, Event.TASK_FAILED, task=self.name, error=error)
            logger.debug("task failed", exc_info=exc)
        finally:
            self._status = replace(
                self._status,
                running=False,
                runs=before.runs + 1,
                failures=before.failures + (error is not None),
                last_duration_s=self._clock.monotonic() - started,
                last_error=error,
                details=details,
            )
        self._served = ticket
        async with self._ended:
            self._ended.notify_all()


class Driver:
    """Owns the tasks. `run()` lives in the lifespan and ends them all when it is cancelled."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._activators: list[Activator] = []

    def add(self, name: str, activate: Activate, period_s: float) -> Activator:
        """Declare a task, before `run`."""
        activator = Activator(name, activate, period_s, self._clock)
        self._activators.append(activator)
        return activator

    async def run(self) -> None:
        """Run every task until cancelled."""
        async with asyncio.TaskGroup() as group:
            for activator in self._activators:
                group.create_task(activator.loop(), name=f"task:{activator.name}")

    def statuses(self) -> list[TaskStatus]:
        return [activator.status() for activator in self._activators]
