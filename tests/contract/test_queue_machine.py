"""Any sequence of submissions, claims, losses, ends and requests, on both databases, beside a model
of the queue in plain objects."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.db.engine import Database
from app.domain import Job, JobError, JobEventType, JobStatus
from app.errors import Conflict
from app.jobs import queue
from app.jobs.queue import Flags, Lease, LeaseLost, NewEvent
from app.jobs.rows import lease_of
from tests.contract.conftest import POSTGRES
from tests.contract.jobs import LEASE_S, Queue
from tests.contract.registry import MovableClock

CAPACITIES: dict[str | None, int] = {"many": 2, "single": 8}
MAX_ATTEMPTS = 2
KEYS = st.sampled_from(["key-a", "key-b", "key-c"])
REASON = JobError("trainer_lost", "The trainer was lost.")
Q, R, P, S, F, C = (
    JobStatus.QUEUED,
    JobStatus.RUNNING,
    JobStatus.PAUSED,
    JobStatus.SUCCEEDED,
    JobStatus.FAILED,
    JobStatus.CANCELLED,
)


@dataclass
class Model:
    """What one job should look like."""

    job: Job
    status: JobStatus = Q
    cancel: bool = False
    pause: bool = False
    attempts: int = 0
    allowed: int = MAX_ATTEMPTS
    progressed: int = 0
    steps: list[int] = field(default_factory=list)
    statuses: list[str] = field(default_factory=lambda: [Q.value])

    def becomes(self, status: JobStatus) -> None:
        self.status = status
        self.statuses.append(status.value)
        if status is P:
            self.pause = False

    def let_go(self, *, count: bool) -> None:
        self.allowed += not count or self.progressed == self.attempts
        if self.cancel:
            self.becomes(C)
        elif self.pause:
            self.becomes(P)
        else:
            self.becomes(F if self.attempts >= self.allowed else Q)


class QueueMachine(RuleBasedStateMachine):
    """A queue beside a model of it; a `runner` is a lease, held or lost."""

    new_url: Callable[[], str]

    @initialize()
    def start(self) -> None:
        self.runner = asyncio.Runner()
        self.db = Database(self.new_url())
        self.queue = Queue(self.db, MovableClock())
        self.models: dict[str, Model] = {}
        self.leases: list[Lease] = []
        self.claims = 0
        #: (trainer, priority) -> key -> the number of the claim that served it last.
        self.served: dict[tuple[str | None, int], dict[str, int]] = {}

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def verb(self, verb: Callable[..., Any], *args: Any, **more: Any) -> Any:
        return self.run(self.queue.do(verb, *args, **more))

    def draw_job(self, data: st.DataObject) -> Model:
        return self.models[data.draw(st.sampled_from(sorted(self.models)))]

    def holder(self, lease: Lease) -> Model | None:
        """The model whose lease this is, if it still is."""
        model = self.models[lease.job_id]
        held = model.status is R and model.attempts == lease.attempt
        return model if held else None

    def draw_lease(self, data: st.DataObject) -> Lease:
        return data.draw(st.sampled_from(self.leases))

    def write(self, lease: Lease, verb: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """What a runner writes: it goes through, or touches nothing."""
        if self.holder(lease) is None:
            with pytest.raises(LeaseLost):
                self.verb(verb, lease, *args, **more)
            return None
        return self.verb(verb, lease, *args, **more)

    @rule(key=KEYS, locked=st.booleans(), priority=st.sampled_from([0, 0, 1]))
    def submit(self, key: str, locked: bool, priority: int) -> None:
        job = self.run(
            self.queue.submit(
                key,
                trainer="single" if locked else "many",
                lock="trainer:single" if locked else None,
                priority=priority,
                max_attempts=MAX_ATTEMPTS,
                # Not at random: the same draws must mean the same jobs.
                id=f"job-{len(self.models):03}",
            )
        )
        self.models[job.id] = Model(job)

    @rule(gateway=st.sampled_from(["gateway-1", "gateway-2"]))
    def claim(self, gateway: str) -> None:
        found = self.run(self.queue.claim(CAPACITIES, gateway))
        expected = self.expected()
        assert (found and found.id) == (expected and expected.job.id)
        if expected is None:
            return
        self.claims += 1
        line = expected.job.trainer, expected.job.priority
        self.served.setdefault(line, {})[expected.job.key_id] = self.claims
        expected.attempts += 1
        expected.becomes(R)
        assert found.attempts == expected.attempts
        self.leases.append(lease_of(found))

    def expected(self) -> Model | None:
        """Who is next, by the rules and not by SQL."""
        for trainer, capacity in CAPACITIES.items():
            mine = [model for model in self.models.values() if model.job.trainer == trainer]
            running = [model for model in mine if model.status is R]
            held = {model.job.lock for model in running} - {None}
            waiting = [m for m in mine if m.status is Q and m.job.lock not in held]
            if waiting and len(running) < capacity:
                return min(waiting, key=self.turn)
        return None

    def turn(self, model: Model) -> tuple[int, int, int]:
        served = self.served.get((model.job.trainer, model.job.priority), {})
        return -model.job.priority, served.get(model.job.key_id, 0), model.job.number

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), steps=st.lists(st.integers(1, 6), max_size=3))
    def heartbeat(self, data: st.DataObject, steps: list[int]) -> None:
        lease = self.draw_lease(data)
        model = self.holder(lease)
        events = [
            NewEvent(
                JobEventType.METRICS, f"Step {step}", data={"attempt": lease.attempt}, step=step
            )
            for step in steps
        ]
        flags = self.write(lease, queue.heartbeat, lease_s=LEASE_S, events=events)
        if model is not None:
            assert flags == Flags(cancel=model.cancel, pause=model.pause)
            new = [step for step in dict.fromkeys(steps) if step not in model.steps]
            model.steps += new
            model.progressed = model.attempts if new else model.progressed

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        lease = self.draw_lease(data)
        model = self.holder(lease)
        self.write(lease, queue.finish, {"attempt": lease.attempt})
        if model is not None:
            model.becomes(S)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), how=st.sampled_from(["fail", "cancelled"]))
    def fail(self, data: st.DataObject, how: str) -> None:
        lease = self.draw_lease(data)
        model = self.holder(lease)
        if how == "fail":
            self.write(lease, queue.fail, REASON)
        else:
            self.write(lease, queue.cancelled)
        if model is not None:
            model.becomes(F if how == "fail" else C)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def pause_takes_hold(self, data: st.DataObject) -> None:
        lease = self.draw_lease(data)
        model = self.holder(lease)
        self.write(lease, queue.paused, {"attempt": lease.attempt})
        if model is not None:
            model.let_go(count=False)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), count=st.booleans())
    def give_back(self, data: st.DataObject, count: bool) -> None:
        lease = self.draw_lease(data)
        model = self.holder(lease)
        self.write(lease, queue.give_back, REASON, count=count)
        if model is not None:
            model.let_go(count=count)

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """Some gateways die: the leases of their jobs run out, and someone finds them."""
        running = sorted(name for name, model in self.models.items() if model.status is R)
        if not running:
            return
        lost = data.draw(st.lists(st.sampled_from(running), min_size=1, unique=True))
        self.run(self.queue.run_out(*(self.models[name].job for name in lost)))
        expired = self.verb(queue.expire)
        assert sorted(job.id for job in expired) == sorted(lost)
        for job in expired:
            self.models[job.id].let_go(count=True)
            assert job.status is self.models[job.id].status

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        model = self.draw_job(data)
        if not self.ask(queue.request_cancel, model):
            return
        model.cancel = True
        if model.status is not R:
            model.becomes(C)

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        model = self.draw_job(data)
        if not self.ask(queue.request_pause, model):
            return
        if model.status is Q:
            model.becomes(P)
        elif model.status is R:
            model.pause = True

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        model = self.draw_job(data)
        if not self.ask(queue.resume, model, model.status is P or model.pause):
            return
        if model.status is P:
            model.becomes(Q)
        model.pause = False

    def ask(self, verb: Callable[..., Any], model: Model, allowed: bool = True) -> bool:
        """What a user asks for: refused if the job has ended, or is not in a state for it."""
        if model.status.terminal or not allowed:
            with pytest.raises(Conflict):
                self.verb(verb, model.job.id)
            return False
        self.verb(verb, model.job.id)
        return True

    @invariant()
    def the_queue_is_what_it_should_be(self) -> None:
        found, _ = self.run(self.queue.read(queue.list_, limit=1000))
        assert {job.id: job.status for job in found} == {
            name: model.status for name, model in self.models.items()
        }
        for job in found:
            model = self.models[job.id]
            assert (job.attempts, job.max_attempts) == (model.attempts, model.allowed)
            assert (job.cancel_requested, job.pause_requested) == (model.cancel, model.pause)
            assert (job.lease_token is not None) is (model.status is R)
            assert (job.finished_at is not None) is model.status.terminal
        running = [job for job in found if job.status is R]
        assert max(Counter(job.lock for job in running if job.lock).values(), default=0) <= 1
        for trainer, jobs in Counter(job.trainer for job in running).items():
            assert jobs <= CAPACITIES[trainer]

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        for model in self.models.values():
            events = self.run(self.queue.events(model.job))
            assert [event.number for event in events] == list(range(1, len(events) + 1))
            assert [event.step for event in events if event.step] == model.steps
            told = [e.data["status"] for e in events if e.type is JobEventType.STATUS]
            assert told == model.statuses
        self.run(self.db.close())
        self.runner.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("dialect", "examples"),
    [("sqlite", 12), pytest.param("postgresql", 5, marks=POSTGRES.marks)],
)
def test_any_sequence_of_what_may_happen(
    dialect: str, examples: int, new_database: Callable[[str], str]
) -> None:
    class OnThis(QueueMachine):
        new_url = staticmethod(lambda: new_database(dialect))

    run_state_machine_as_test(
        OnThis,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
