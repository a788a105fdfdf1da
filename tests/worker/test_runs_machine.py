"""Whatever happens between a driver and a worker, each op is done once and in its place.

A model of one run beside the real thing: duplicates, numbers out of order, other attempts,
failures, cancellations, kills and restarts from disk. The engine's weights are the words of the
ops it did, so they must be those of the ops below `next_seq`, no more and no fewer.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from app.errors import Conflict, Fenced, RunLost
from app.ops import ForwardBackward, Op, OptimStep, RunStatus, SaveState
from tests.worker.made_runs import Worker, passing


def word(op: Op) -> list[str]:
    """What the fake engine's weights say of an op."""
    if isinstance(op, ForwardBackward):
        return [f"pass:{int.from_bytes(op.data[0].tokens.data[:4], 'little')}"]
    return [f"optim:{op.learning_rate:g}"] if isinstance(op, OptimStep) else []


OPS = st.one_of(
    st.integers(1, 90).map(passing),
    st.integers(1, 90).map(lambda tag: OptimStep(tag / 4)),
    st.just(SaveState()),
    st.integers(1, 90).map(lambda tag: passing(tag, fail=1)),
)


class RunsMachine(RuleBasedStateMachine):
    """`sent` are the ops that the numbers stand for; `floor` is what a restart cannot undo."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.root = Path(tempfile.mkdtemp())
        self.worker = Worker(self.root)
        self.sent: dict[int, Op] = {}
        self.fence = 1
        self.next = 1
        self.floor = 1

    def teardown(self) -> None:
        self.runner.run(self.worker.runs.stop())
        self.runner.close()
        shutil.rmtree(self.root)

    @initialize()
    def begin(self) -> None:
        self.runner.run(self.worker.start())
        assert self.runner.run(self.worker.open()).origin == "created"

    @rule(ahead=st.integers(0, 3), op=OPS, times=st.integers(1, 2))
    def submit(self, ahead: int, op: Op, times: int) -> None:
        """A new op or a known one, now or early; the same again changes nothing."""
        seq = self.next + ahead
        op = self.sent.setdefault(seq, op)
        self.runner.run(self.send(seq, op, times))

    @rule(behind=st.integers(1, 5))
    def submit_again(self, behind: int) -> None:
        seq = self.next - behind
        if seq in self.sent:
            self.runner.run(self.send(seq, self.sent[seq], 1))

    @rule(op=OPS)
    def contradict(self, op: Op) -> None:
        seq = self.next
        if self.sent.get(seq, op) != op:
            with pytest.raises(Conflict):
                self.runner.run(self.send(seq, op, 1))

    @rule()
    def old_attempt(self) -> None:
        with pytest.raises(Fenced):
            self.worker.submit(self.next, passing(1), fence=self.fence - 1)
        with pytest.raises(Fenced):
            self.runner.run(self.worker.runs.cancel("a", fence=self.fence - 1))

    @rule()
    def settle(self) -> None:
        """Every op that can be done is done; a failed one stops its run."""
        self.runner.run(self.drain())

    @rule()
    def cancel(self) -> None:
        self.found(self.runner.run(self.worker.runs.cancel("a", fence=self.fence)))

    @rule()
    def take_over(self) -> None:
        self.fence += 1
        status = self.runner.run(self.worker.open(fence=self.fence))
        assert status.origin == "live"
        self.found(status)

    @rule(newer=st.booleans())
    def kill(self, newer: bool) -> None:
        self.fence += newer
        self.runner.run(self.worker.restart())
        with pytest.raises(RunLost):
            self.worker.submit(self.next, passing(1), fence=self.fence)
        status = self.runner.run(self.worker.open(fence=self.fence))
        assert self.floor <= status.next_seq
        assert status.origin == "restored" or status.next_seq == 1
        self.found(status)

    @rule()
    def put_away(self) -> None:
        self.found(self.runner.run(self.worker.runs.cancel("a", fence=self.fence)))
        self.runner.run(self.worker.runs.unload("a", fence=self.fence))
        self.floor = self.next
        status = self.runner.run(self.worker.open(fence=self.fence))
        assert (status.origin, status.next_seq) == ("restored", self.next)

    @invariant()
    def nothing_is_done_twice_or_out_of_order(self) -> None:
        if not self.worker.trainer.runs:
            return
        done = self.worker.done()
        known = [text for seq in sorted(self.sent) for text in word(self.sent[seq])]
        assert done == known[: len(done)]

    async def send(self, seq: int, op: Op, times: int) -> None:
        for _ in range(times):
            self.worker.submit(seq, op, fence=self.fence)
        await asyncio.sleep(0)

    async def drain(self) -> None:
        while self.next in self.sent:
            outcome = await self.worker.outcome(self.next, fence=self.fence)
            op = self.sent[self.next]
            failing = isinstance(op, ForwardBackward) and "fail" in op.config
            assert (outcome.failure is not None) == failing
            if failing:
                break
            self.next += 1
            if isinstance(op, SaveState):
                self.floor = self.next
        self.exactly()

    def found(self, status: RunStatus) -> None:
        """Nothing waits any more: numbers from `next_seq` on are free."""
        self.next = status.next_seq
        self.sent = {seq: op for seq, op in self.sent.items() if seq < self.next}
        assert sorted(self.sent) == list(range(1, self.next))
        steps = sum(isinstance(op, OptimStep) for op in self.sent.values())
        assert status.optim_steps == steps
        self.exactly()

    def exactly(self) -> None:
        below = [op for seq, op in sorted(self.sent.items()) if seq < self.next]
        assert self.worker.done() == [text for op in below for text in word(op)]


RunsMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestRuns = RunsMachine.TestCase
