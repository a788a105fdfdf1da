"""Which ops are done next, and which together.

What comes in: runs with due ops. What goes out: their outcomes. A turn does the cheap ops first,
up to a few of each run, and then the passes of all runs that have one, as one call of the
engine: gradients of eight runs cost little more than those of one. It must not know: what an op
does, HTTP.

    optim A ─ optim B ─ save C (aside) ─┬─ pass of A, B and D ─┬─ optim A ─ …
                     a short wait for D ┘                      └ outcomes
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from app.clock import Clock
from app.errors import LoragateError, TrainingFailed
from app.ops import ForwardBackward, LoadState, OptimStep, Result
from app.telemetry import Event, log
from app.worker.trainers.live import LiveRun
from app.worker.trainers.oplog import Waiting
from app.worker.trainers.perform import Performer

logger = logging.getLogger(__name__)

#: Ops other than passes that one run may have done while passes of others wait.
OTHERS_A_TURN = 4
#: Runs that were in the last pass are waited for this share of its time before the next,
#: but never longer than this many seconds: a pass alone costs more than that.
GATHER_SHARE = 0.25
GATHER_MOST_S = 0.1


@dataclass(slots=True)
class Spent:
    """How often something was done, and how many seconds that took altogether."""

    times: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.times += 1
        self.seconds += seconds


class Turns:
    """The one task that begins ops.

    `passing` and `stepping` are what calls of the engine for passes and optimizer steps took,
    `shared` how many of the former had more than one run in them, `tokens` the targets that
    gradients were computed of.
    """

    def __init__(self, runs: Mapping[str, LiveRun], performer: Performer, clock: Clock) -> None:
        self.passing = Spent()
        self.stepping = Spent()
        self.shared = 0
        self.tokens = 0
        self._runs = runs
        self._performer = performer
        self._clock = clock
        self._arrived = asyncio.Event()
        self._last: set[LiveRun] = set()
        self._last_s = 0.0
        self._done: Counter[LiveRun] = Counter()

    def wake(self) -> None:
        """An op arrived, or a run can go on."""
        self._arrived.set()

    async def serve(self) -> None:
        """Take turns until cancelled."""
        async with asyncio.TaskGroup() as asides:
            while True:
                await self._turn(asides)

    async def _turn(self, asides: asyncio.TaskGroup) -> None:
        self._arrived.clear()
        await self._others(asides)
        if self._passing():
            await self._gather(asides)
            await self._pass()
            self._done.clear()
            return
        self._done.clear()
        if self._next_other() is None:
            await self._arrived.wait()

    async def _others(self, asides: asyncio.TaskGroup) -> None:
        """What is due and is not a pass, fewest done first."""
        while (live := self._next_other()) is not None:
            self._done[live] += 1
            begun = live.log.begin()
            # Writing waits for disks, and sampling for the sampler: the trainer need not.
            if isinstance(begun.op, OptimStep | LoadState):
                await self._do(live, begun)
            else:
                asides.create_task(self._do(live, begun))

    def _next_other(self) -> LiveRun | None:
        due = [
            live
            for live in self._runs.values()
            if (op := live.due) is not None
            and not isinstance(op.op, ForwardBackward)
            and self._done[live] < OTHERS_A_TURN
        ]
        return min(due, key=lambda live: self._done[live], default=None)

    def _passing(self) -> list[tuple[LiveRun, ForwardBackward]]:
        return [
            (live, due.op)
            for live in self._runs.values()
            if (due := live.due) is not None and isinstance(due.op, ForwardBackward)
        ]

    async def _gather(self, asides: asyncio.TaskGroup) -> None:
        """Wait a little for the runs that were in the last pass and have none due yet."""
        now = self._clock.monotonic()
        until = now + min(GATHER_MOST_S, GATHER_SHARE * self._last_s)
        while self._missing() and (now := self._clock.monotonic()) < until:
            self._arrived.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(until - now):
                    await self._arrived.wait()
            await self._others(asides)

    def _missing(self) -> bool:
        there = {live for live, _ in self._passing()}
        alive = {live for live in self._runs.values() if live.log.failure is None}
        return bool((self._last & alive) - there)

    async def _pass(self) -> None:
        due = self._passing()
        for live, _ in due:
            live.log.begin()
        started = self._clock.monotonic()
        try:
            answers = await self._performer.passes([(live.id, op) for live, op in due])
        except Exception as exc:  # noqa: BLE001 - an op is not the worker
            answers = [_failed(exc)] * len(due)
        for (live, op), answer in zip(due, answers, strict=True):
            if isinstance(answer, Result) and not op.forward_only:
                self.tokens += int(answer.metrics.get("tokens:sum", 0))
            self._settle(live, answer)
        self.shared += len(due) > 1
        self._last = {live for live, _ in due}
        self._last_s = self._clock.monotonic() - started
        self.passing.add(self._last_s)

    async def _do(self, live: LiveRun, begun: Waiting) -> None:
        started = self._clock.monotonic()
        try:
            answer: Result | LoragateError = await self._performer.do(live, begun.op)
        except LoragateError as exc:
            answer = exc
        except Exception as exc:  # noqa: BLE001 - an op is not the worker
            answer = _failed(exc)
        if isinstance(begun.op, OptimStep):
            self.stepping.add(self._clock.monotonic() - started)
        self._settle(live, answer)

    def _settle(self, live: LiveRun, answer: Result | LoragateError) -> None:
        live.touched = self._clock.monotonic()
        if isinstance(answer, LoragateError):
            live.fail(answer)
        else:
            live.finish(answer)
        self.wake()


def _failed(exc: Exception) -> TrainingFailed:
    """What a client is told of an exception that is nobody's plan; the log has the rest."""
    log(logger, logging.ERROR, Event.WORKER_STEP_FAILED, error=repr(exc))
    logger.debug("op failed", exc_info=exc)
    return TrainingFailed(
        f"The trainer failed on this op with {type(exc).__name__}; the worker's log says more."
    )
