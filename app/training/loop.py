"""Drives a run through its plan: hands over ops, collects outcomes, says what came of them.

What comes in: a plan, its examples, a run on a worker, and how far an earlier attempt had come.
What goes out: calls of a `Recorder`, one for each step and each epoch, in order, whatever was lost
on the way. It must not know: SQL, HTTP, adapters' names.

The worker executes ops in the order of their numbers, and the plan says what each number is. So
one number says how far a job is: `done`, the op that completed what was recorded last. Ops up to
it that the worker lost are repeated, and their outcomes dropped; ops after it that the worker did
while nobody listened are not repeated, and their outcomes fetched. The worker keeps outcomes until
it is told that they are recorded, and with every state those it had not been told of: none can be
missing.

When the state is saved depends on the clock, for what matters is how much time a lost worker
costs; op numbers must not. So `Saves` are decided from how long steps took, for steps of which
nobody has handed over anything, and recorded before an op that depends on them is handed over.

A few ops are handed over ahead of the outcome that is waited for, so that the worker never waits
for the gateway.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TypeVar

from app.clock import Clock
from app.domain import LoraSpec
from app.errors import InvalidRequest, RunLost, TrainerBusy, TrainerUnavailable, TrainingFailed
from app.ops import Result, RunStatus
from app.training.batches import Batches
from app.training.outcomes import Recorder, Tally
from app.training.plan import OpKind, PlannedOp, Saves
from app.training.run import Run

T = TypeVar("T")

#: Ops handed over and not yet collected: two steps, and a state.
LOOK_AHEAD = 5
#: Steps whose median time decides on saves.
TIMED_STEPS = 5
#: How many times more or less often than they should saves may come before they are decided anew.
DRIFT = 2
#: Losses at one place, with the worker back each time, before it is given up.
MAX_LOSSES = 3

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_SHORTEST_STEP_S = 1e-4


@dataclass(frozen=True, slots=True)
class Target:
    """What is trained where, and by which attempt."""

    run: Run
    base_model: str
    lora: LoraSpec
    fence: int


@dataclass(frozen=True, slots=True)
class Position:
    """How far a job is: the op that completed what was recorded last, and when states are saved."""

    done: int = 0
    saves: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a lost worker is waited for, and how much training may be lost with it."""

    patience_s: float
    checkpoint_s: float


class _Stopped(Exception):
    """`stop` was called."""


class Loop:
    """One attempt at driving a run."""

    def __init__(
        self,
        target: Target,
        batches: Batches,
        recorder: Recorder,
        clock: Clock,
        limits: Limits,
        start: Position,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._target = target
        self._run = target.run
        self._batches = batches
        self._plan = batches.plan
        self._recorder = recorder
        self._clock = clock
        self._limits = limits
        self._sleep = sleep
        self._saves = Saves(start.saves)
        self._done = start.done
        self._collected = 0  # the op whose outcome was fetched last
        self._furthest = start.done  # the last op that anybody handed over, as far as known
        self._losses = 0
        self._tally = Tally(batches)
        self._times: deque[float] = deque()
        self._stopping = False
        self._waiting: asyncio.Timeout | None = None

    def stop(self) -> None:
        """Let `run` return soon: nothing more is begun, and what was done is still recorded."""
        self._stopping = True
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> bool:
        """Drive the run to the end of its plan; False if `stop` came first.

        Raises:
            TrainingFailed, InvalidRequest: a step failed and would fail again; it is named.
            TrainerUnavailable, RunLost, TrainerBusy: the worker did not come back.
            Fenced: a newer attempt has the run.
        """
        try:
            while True:
                status = await self._open()
                try:
                    await self._drive(status)
                    return True
                except (TrainerUnavailable, RunLost):
                    self._losses += 1
                    if self._losses > MAX_LOSSES:
                        raise
                await self._pause(_FIRST_PAUSE_S)
        except _Stopped:
            await self._halt()
            return False

    async def _open(self) -> RunStatus:
        """Take the run up, waiting for a worker that is away as long as patience lasts."""
        began, pause_s = self._clock.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                return await self._unless_stopped(self._adopt)
            except (TrainerUnavailable, RunLost, TrainerBusy):
                if self._clock.monotonic() - began >= self._limits.patience_s:
                    raise
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _pause(self, seconds: float) -> None:
        await self._unless_stopped(lambda: self._sleep(seconds))

    async def _adopt(self) -> RunStatus:
        target = self._target
        status = await self._run.open(target.base_model, target.lora, target.fence)
        if status.origin == "live":
            # What waits was handed over by someone who is gone: it is handed over anew.
            status = await self._run.cancel_ops()
        if status.first_outcome > self._done + 1:
            # An outcome is gone that nobody recorded: only all over again brings it back.
            await self._run.delete()
            status = await self._run.open(target.base_model, target.lora, target.fence)
        return status

    async def _drive(self, status: RunStatus) -> None:
        """Go through the plan, from the first op that is not done or whose outcome is missing."""
        first = min(status.next_seq, self._done + 1)
        self._collected = first - 1
        self._furthest = max(self._furthest, status.next_seq - 1)
        self._tally = Tally(self._batches)
        self._times = deque([self._clock.monotonic()], TIMED_STEPS + 1)
        ahead: deque[PlannedOp] = deque()
        for op in self._plan.ops(self._saves, first):
            if op.seq >= status.next_seq:
                await self._submit(op)
            ahead.append(op)
            if len(ahead) == LOOK_AHEAD:
                taken = ahead.popleft()
                await self._collect(taken)
                await self._decide_saves(taken, op)
        while ahead:
            await self._collect(ahead.popleft())

    async def _submit(self, op: PlannedOp) -> None:
        request = self._batches.request(op)
        # What is repeated is asked for again, recorded or not.
        acked = min(self._recorder.recorded, self._collected)
        await self._unless_stopped(lambda: self._run.submit(op.seq, request, acked))
        self._furthest = max(self._furthest, op.seq)

    async def _collect(self, op: PlannedOp) -> None:
        await self._take(op, await self._unless_stopped(lambda: self._outcome(op)))

    async def _outcome(self, op: PlannedOp) -> Result:
        try:
            return await self._run.outcome(op.seq)
        except (TrainingFailed, InvalidRequest) as exc:
            what = f"Step {op.step} of {self._plan.steps} failed: {exc}"
            raise type(exc)(what, param=exc.param, code=exc.code) from exc

    async def _take(self, op: PlannedOp, result: Result) -> None:
        """Tell what an outcome completes, unless that was told before."""
        self._collected = op.seq
        done = self._tally.add(op, result)
        if op.seq <= self._done:
            return
        self._losses = 0
        if done is not None:
            await done.tell(self._recorder)
            self._done = op.seq

    async def _decide_saves(self, taken: PlannedOp, ahead: PlannedOp) -> None:
        """Save the state every so many steps, if they take longer or shorter than was thought.

        `ahead` was handed over last. While ops are repeated nothing is decided: the numbers of
        those that follow were given already.
        """
        if taken.kind is not OpKind.OPTIM_STEP or ahead.seq < self._furthest:
            return
        self._times.append(self._clock.monotonic())
        took_s = self._times[-1] - self._times[0]
        if len(self._times) <= TIMED_STEPS and took_s < self._limits.checkpoint_s:
            return
        step_s = median(later - one for one, later in pairwise(self._times))
        every = max(1, int(self._limits.checkpoint_s / max(step_s, _SHORTEST_STEP_S)))
        known = self._saves.every
        first = ahead.step + 1
        if first + every > self._plan.steps:
            return  # none would come
        if known is None or every > DRIFT * known or known > DRIFT * every:
            changed = Saves((*self._saves.changes, (first, every)))
            await self._recorder.saves(changed)
            self._saves.changes = changed.changes

    async def _halt(self) -> None:
        """Cancel what has not begun, and tell what was done by then."""
        try:
            status = await self._run.cancel_ops()
            self._tally = Tally(self._batches)
            for op in self._plan.ops(self._saves, self._done + 1):
                if op.seq >= status.next_seq:
                    return
                await self._take(op, await self._outcome(op))
        except (TrainerUnavailable, RunLost):
            return  # nothing goes on there; what was not told is in the run's last state

    async def _unless_stopped(self, begin: Callable[[], Awaitable[T]]) -> T:
        if self._stopping:
            raise _Stopped
        try:
            async with asyncio.timeout(None) as self._waiting:
                return await begin()
        except TimeoutError:
            if not self._stopping:
                raise
            raise _Stopped from None
        finally:
            self._waiting = None
