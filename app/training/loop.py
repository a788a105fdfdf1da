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

A few ops are handed over ahead of the outcomes that are waited for, so that the worker never waits
for the gateway. One request hands over as many as come back with it: a step costs one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from statistics import median

from app.clock import Clock
from app.domain import LoraSpec
from app.errors import InvalidRequest, RunLost, TrainerError, TrainerUnavailable, TrainingFailed
from app.ops import Result, RunStatus
from app.training.batches import Batches
from app.training.outcomes import Recorder, Tally
from app.training.patience import FIRST_PAUSE_S, Patience, Stopped
from app.training.plan import OpKind, PlannedOp, Saves
from app.training.run import Run

#: Ops handed over and not yet collected: two steps, and a state.
LOOK_AHEAD = 5
#: Of these, the most that one request waits for, so that the worker has the others meanwhile.
COLLECTED = 3
#: Ops in one request at most: its size has a bound, and the first ones do not wait for more.
HANDED_OVER = 2
#: Steps whose median time decides on saves.
TIMED_STEPS = 5
#: How many times more or less often than they should saves may come before they are decided anew.
DRIFT = 2
#: Losses at one place, with the worker back each time, before it is given up.
MAX_LOSSES = 3

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


class Loop:
    """One attempt at driving a run."""

    def __init__(
        self,
        target: Target,
        batches: Batches,
        recorder: Recorder,
        clock: Clock,
        patience: Patience,
        start: Position,
        checkpoint_s: float,
    ) -> None:
        """`checkpoint_s`: about how much training a lost worker may cost, in seconds."""
        self._target = target
        self._run = target.run
        self._batches = batches
        self._plan = batches.plan
        self._recorder = recorder
        self._clock = clock
        self._patience = patience
        self._checkpoint_s = checkpoint_s
        self._saves = Saves(start.saves)
        self._done = start.done
        self._collected = 0  # the op whose outcome was fetched last
        self._furthest = start.done  # the last op that anybody handed over, as far as known
        self._losses = 0
        self._tally = Tally(batches)
        self._times: deque[float] = deque()
        self._ahead: deque[PlannedOp] = deque()  # handed over or new, and not collected
        self._new: list[PlannedOp] = []  # of these, the last ones, to be handed over next

    async def run(self) -> bool:
        """Drive the run to the end of its plan; False if it was to stop first.

        Then nothing more is begun, and what was done is still recorded.

        Raises:
            TrainingFailed, InvalidRequest: a step failed and would fail again; it is named.
            TrainerUnavailable, RunLost, TrainerBusy: the worker did not come back.
            TrainerError: it came back, and was lost again and again at one place.
            Fenced: a newer attempt has the run.
        """
        try:
            while True:
                status = await self._patience.again(self._adopt)
                try:
                    await self._drive(status)
                    return True
                except (TrainerUnavailable, RunLost) as exc:
                    self._losses += 1
                    if self._losses > MAX_LOSSES:
                        raise TrainerError(
                            f"The worker was lost {self._losses} times at one place, after op "
                            f"{self._done} of the run: {exc}"
                        ) from exc
                await self._patience.pause(FIRST_PAUSE_S)
        except Stopped:
            await self._halt()
            return False

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
        self._ahead.clear()
        self._new.clear()
        for op in self._plan.ops(self._saves, first):
            self._ahead.append(op)
            if op.seq >= status.next_seq:
                self._new.append(op)
            if len(self._ahead) == LOOK_AHEAD:
                await self._exchange(_due(self._ahead))
            elif len(self._new) == HANDED_OVER:
                await self._exchange([])
        while self._ahead:
            await self._exchange(_due(self._ahead))

    async def _exchange(self, due: Sequence[PlannedOp]) -> None:
        """Hand over what is new, and take what came of the ops that are due."""
        new = [(op.seq, self._batches.request(op)) for op in self._new]
        # What is repeated is asked for again, recorded or not.
        acked = min(self._recorder.recorded, self._collected)
        wanted = (due[0].seq, due[-1].seq) if due else None
        with self._naming((due or self._new)[0]):
            results = await self._patience.once(lambda: self._run.exchange(new, acked, wanted))
        self._new.clear()
        last = self._ahead[-1]
        self._furthest = max(self._furthest, last.seq)
        for op, result in zip(due, results, strict=False):
            self._ahead.popleft()
            await self._take(op, result)
            await self._decide_saves(op, last)

    @contextmanager
    def _naming(self, op: PlannedOp) -> Iterator[None]:
        """Say of what goes wrong for good which step it was."""
        try:
            yield
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
        if len(self._times) <= TIMED_STEPS and took_s < self._checkpoint_s:
            return
        step_s = median(later - one for one, later in pairwise(self._times))
        every = max(1, int(self._checkpoint_s / max(step_s, _SHORTEST_STEP_S)))
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
            for op in self._plan.ops(self._saves, self._done + 1):
                if op.seq >= status.next_seq:
                    return
                with self._naming(op):
                    result = await self._run.outcome(op.seq)
                await self._take(op, result)
        except (TrainerUnavailable, RunLost):
            return  # nothing goes on there; what was not told is in the run's last state


def _due(ahead: Iterable[PlannedOp]) -> list[PlannedOp]:
    """Whose outcomes are waited for next: up to the end of a step, which is told at once."""
    first = list(islice(ahead, COLLECTED))
    for count, op in enumerate(first, 1):
        if op.kind is OpKind.OPTIM_STEP:
            return first[:count]
    return first[:1]
