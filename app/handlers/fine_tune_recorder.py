"""Keeps what comes of a fine-tune job: steps as events, epochs as versions of its adapter.

What comes in: what the training loop tells. What goes out: rows. Steps are written a few at a
time; an epoch's version, alias, checkpoint and events are written together, in a transaction that
fails if the job's lease is lost. It must not know: how training is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.control import checkpoints
from app.control.checkpoints import Trained
from app.control.driver import Activator
from app.control.inspect_probe import PROBE_FILE
from app.control.intake import Candidate, admit
from app.db.blobs import FILES, AdapterStore
from app.domain import Job, JobEventType
from app.errors import TrainerError
from app.handlers.step_metrics import numbers, step_event
from app.jobs import queue
from app.jobs.context import JobContext
from app.jobs.queue import NewEvent
from app.ops import ProbeResult, SavedFile
from app.serving.meter import Meter
from app.settings import Settings
from app.training.loop import Position
from app.training.outcomes import EpochDone, Means, StepDone
from app.training.plan import Plan, Saves
from app.training.run import Run
from app.training.spec import FineTuneSpec

#: Steps are written at most this often, in seconds.
FLUSH_S = 0.25


class Rooms(Protocol):
    """What recording needs of the running gateway."""

    @property
    def settings(self) -> Settings: ...
    @property
    def store(self) -> AdapterStore: ...
    @property
    def publish(self) -> Activator: ...
    @property
    def meter(self) -> Meter: ...


@dataclass(frozen=True, slots=True)
class RunSource:
    """Weights that a run has saved on its worker, and its probe: a `control.intake.Source`."""

    run: Run
    name: str
    files: tuple[SavedFile, ...]
    probe: ProbeResult | None

    async def fetch(self, folder: Path, settings: Settings) -> str:
        wanted = [file for file in self.files if file.name in FILES]
        if len(wanted) != len(FILES):
            found = ", ".join(file.name for file in self.files) or "nothing"
            raise TrainerError(f"run {self.run.run_id!r} saved {found}, which is no adapter")
        await self.run.download(self.name, wanted, folder)
        if self.probe is not None:
            (folder / PROBE_FILE).write_bytes(msgspec.json.encode(self.probe))
        return f"job:{self.run.run_id}"


@dataclass(frozen=True, slots=True)
class Recording:
    """What of a job does not change while it runs: what is recorded, and with what it is said."""

    job: Job
    spec: FineTuneSpec
    run: Run
    plan: Plan
    target: Candidate
    facts: Mapping[str, Any]
    provenance: Mapping[str, Any]


class Recorder:
    """A `training.outcomes.Recorder` that writes the job's rows.

    `last` is the weights of the last epoch: they are registered with the end of the job, and
    until then its last op does not count as recorded.
    """

    def __init__(self, rooms: Rooms, ctx: JobContext, of: Recording, start: Position) -> None:
        self.of = of
        self.recorded = start.done
        self.last: Trained | None = None
        self._rooms = rooms
        self._ctx = ctx
        self._told = start.done
        self._saves = start.saves
        self._events: list[NewEvent] = []
        self._ending_epoch: StepDone | None = None
        self._flushed_at = self._began_at = ctx.clock.monotonic()
        self._steps = 0
        self._step = 0

    async def begin(self) -> None:
        """Say what is going to happen, and keep what was decided for it."""
        plan = self.of.plan
        what = f"Training started: {plan.steps} steps over {plan.examples} examples"
        data = {"total_steps": plan.steps, "hyperparameters": self.of.facts["hyperparameters"]}
        self._events.append(NewEvent(JobEventType.MESSAGE, what, data=data))
        await self.flush()

    async def step(self, done: StepDone) -> None:
        """Keep a step's numbers; of one that ends an epoch, until its epoch is told too."""
        self._steps, self._step = self._steps + 1, done.step
        self._rooms.meter.trained(self.of.job.trainer or "", done.tokens, done.seconds)
        if self.of.plan.ends_epoch(done.step):
            self._ending_epoch = done
            return
        self._events.append(step_event(done, self.of.plan.steps, None))
        self._told = done.seq
        if self._ctx.clock.monotonic() - self._flushed_at >= FLUSH_S:
            await self.flush()

    async def epoch(self, done: EpochDone) -> None:
        """Fetch an epoch's weights, check that the base can serve them, and register them.

        Raises:
            AdapterRejected: it cannot.
        """
        trained = await self._fetched(done)
        self._end_epoch(done.valid)
        if done.step == self.of.plan.steps:
            self.last = trained
            return
        self._told = done.seq
        async with self._ctx.db.begin() as session:
            await self._register(session, trained, [], final=False)
        self._written(done.seq)
        self._rooms.publish.wake()

    async def register_last(self, session: AsyncSession, events: Sequence[NewEvent]) -> None:
        """Register what the job was to make, and what is not written yet; raises LeaseLost."""
        assert self.last is not None, "only what was trained is registered"
        await self._register(session, self.last, events, final=True)

    async def saves(self, saves: Saves) -> None:
        """Keep when states are saved, before the plan follows it."""
        self._saves = saves.changes
        await self.flush()

    async def flush(self) -> None:
        """Write what is not written yet."""
        await self._ctx.heartbeat(self._events, self.progress())
        self._written(self._told)

    async def leave(self) -> None:
        """Write what is not written yet, though the epoch it belongs to will not be done."""
        if self._ending_epoch is not None:
            self._end_epoch(None)
        await self.flush()

    def progress(self) -> dict[str, Any]:
        """What the job's next attempt, and whoever looks at it, has to know."""
        found = {
            **self.of.facts,
            "done": self._told,
            "saves": [list(change) for change in self._saves],
            "step": self._step,
        }
        if self._steps:
            took_s = self._ctx.clock.monotonic() - self._began_at
            left_s = took_s / self._steps * (self.of.plan.steps - self._step)
            finish = self._ctx.clock.now() + timedelta(seconds=left_s)
            found["estimated_finish"] = int(finish.timestamp())
        return found

    async def _register(
        self, session: AsyncSession, trained: Trained, events: Sequence[NewEvent], *, final: bool
    ) -> None:
        model = self.of.spec.model
        name = checkpoints.checkpoint_name(model, trained.step)
        await queue.heartbeat(
            session,
            self._ctx.clock,
            self._ctx.lease,
            lease_s=self._ctx.lease_s,
            events=[*self._events, _checkpoint_event(name, trained.step), *events],
            progress=self.progress(),
        )
        await checkpoints.register(
            session,
            self._ctx.clock,
            self.of.job,
            model,
            trained,
            self.of.provenance,
            final=final,
        )

    def _written(self, told: int) -> None:
        self.recorded = told
        self._events = []
        self._flushed_at = self._ctx.clock.monotonic()

    def _end_epoch(self, valid: Means | None) -> None:
        """Keep the numbers of the step that ended the epoch, with the epoch's own."""
        assert self._ending_epoch is not None, "an epoch is told after its last step"
        self._events.append(step_event(self._ending_epoch, self.of.plan.steps, valid))
        self._ending_epoch = None

    async def _fetched(self, done: EpochDone) -> Trained:
        admitted = await admit(
            RunSource(self.of.run, done.name, done.files, done.probe),
            candidates=[self.of.target],
            store=self._rooms.store,
            settings=self._rooms.settings,
        )
        step = self._ending_epoch
        assert step is not None, "an epoch is told after its last step"
        return Trained(done.step, admitted, numbers(step, done.valid))


def _checkpoint_event(name: str, step: int) -> NewEvent:
    data = {"step": step, "fine_tuned_model_checkpoint": name}
    return NewEvent(JobEventType.MESSAGE, f"Checkpoint created: {name}", data=data)
