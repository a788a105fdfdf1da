"""From what a client of the Tink API wants done to a job in the queue.

What comes in: an op whose fields have the right shape. What goes out: a job, or what is wrong.
Ops of one run have one lock, so they run one after another; those of a trainer that does one thing
at a time have its lock. Sampling what is registered already needs neither.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.control import op_payloads, runs
from app.db.engine import Database
from app.domain import Job, JobKind, LoraSpec, Pool, Trainer, TrainingRun
from app.errors import Conflict, InvalidRequest, NotFound, NotTrainable
from app.jobs import queue
from app.settings import Settings
from app.training import single_ops
from app.training.single_ops import AddLora, Sample, Spec, Stored

MAX_SEED = (1 << 31) - 1
#: Pauses between looks at a job that a client waits for, in seconds.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.25
_BASE_IN_NAME = 64


class Doors(Protocol):
    """What submitting needs of the open rooms."""

    @property
    def settings(self) -> Settings: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def db(self) -> Database: ...
    @property
    def trainers(self) -> Mapping[str, Trainer]: ...


@dataclass(frozen=True, slots=True)
class Asking:
    """Who asks. `owner` is whose runs it sees, None for everybody's. `once` names a request that
    may be sent again without being done again.
    """

    key_id: str
    owner: str | None
    once: str | None = None

    def job_id(self) -> str:
        if self.once is None:
            return f"op-{secrets.token_hex(12)}"
        named = hashlib.sha256("\0".join((self.key_id, self.once)).encode())
        return f"op-{named.hexdigest()[:24]}"


@dataclass(frozen=True, slots=True)
class NewLora:
    """An adapter to train. `asked` is the base as the client called it."""

    asked: str
    rank: int
    alpha: int
    target_modules: tuple[str, ...] = ()
    seed: int | None = None


def only_base(trainers: Mapping[str, Trainer]) -> str:
    """What "base" stands for: the base that is trained here, if it is one.

    Raises:
        InvalidRequest: there are several.
        NotTrainable: there is none.
    """
    bases = sorted({trainer.base_model for trainer in trainers.values()})
    if not bases:
        raise NotTrainable("No trainer is set up here.", param="base_model")
    if len(bases) > 1:
        names = ", ".join(map(repr, bases))
        raise InvalidRequest(f"Say which base_model: {names} are trained here.", param="base_model")
    return bases[0]


async def add_lora(rooms: Doors, asking: Asking, pool: Pool, new: NewLora) -> Job:
    """Queue the making of a run on the base of `pool`; its name is the `run` of the job's spec.

    Raises:
        NotTrainable: no trainer has the base.
        InvalidRequest: its pool serves no adapter of this rank.
        Conflict: the key has as many jobs waiting as it may have.
    """
    if new.rank > pool.max_lora_rank:
        raise InvalidRequest(
            f"rank is {new.rank}; the pool of {pool.base_model!r} serves {pool.max_lora_rank} at "
            "most.",
            param="rank",
        )
    job_id = asking.job_id()
    run_id = _run_id(new.asked, job_id)
    op = single_ops.stored(AddLora(run_id))
    async with rooms.db.begin() as session:
        known = await _known(session, asking, job_id, op)
        if known is not None:
            return known
        trainer = await _least_taken(session, pool.base_model, rooms.trainers)
        seed = secrets.randbelow(MAX_SEED) if new.seed is None else new.seed
        await runs.create(
            session,
            rooms.clock,
            run_id=run_id,
            key_id=asking.key_id,
            trainer=trainer.name,
            base_model=pool.base_model,
            lora=LoraSpec(new.rank, new.alpha, new.target_modules, seed),
        )
        return await _submit(rooms, session, asking, job_id, op, trainer)


async def submit(rooms: Doors, asking: Asking, spec: Spec) -> Job:
    """Queue an op on a run.

    Raises:
        NotFound: there is no such run, or it is another key's.
        NotTrainable: its trainer is not set up any more.
        Conflict: the key has as many jobs waiting as it may have.
    """
    job_id = asking.job_id()
    op = await asyncio.to_thread(single_ops.stored, spec)
    async with rooms.db.begin() as session:
        known = await _known(session, asking, job_id, op)
        if known is not None:
            return known
        run = await runs.get(session, spec.run, asking.owner)
        if isinstance(spec, Sample) and await _is_served(session, run):
            now = replace(op, spec={**op.spec, "model": f"{run.id}@{run.version}"})
            return await _submit(rooms, session, asking, job_id, now, None)
        trainer = rooms.trainers.get(run.trainer)
        if trainer is None:
            raise NotTrainable(f"The trainer {run.trainer!r} of {run.id!r} is not set up any more.")
        return await _submit(rooms, session, asking, job_id, op, trainer)


async def submit_sample(rooms: Doors, asking: Asking, spec: Sample) -> Job:
    """Queue sampling from a model that needs no run: a base, or a registered adapter."""
    job_id = asking.job_id()
    op = await asyncio.to_thread(single_ops.stored, spec)
    async with rooms.db.begin() as session:
        known = await _known(session, asking, job_id, op)
        return known or await _submit(rooms, session, asking, job_id, op, None)


async def find_run(rooms: Doors, asking: Asking, name: str) -> TrainingRun | None:
    """The run of this name, if it is one that the caller sees."""
    async with rooms.db.read() as session:
        try:
            return await runs.get(session, name, asking.owner)
        except NotFound:
            return None


async def ended(rooms: Doors, asking: Asking, job_id: str, within_s: float) -> Job:
    """The job, once it has ended; or as it is after `within_s`.

    Raises:
        NotFound: there is no such op, or it is another key's.
    """
    until = rooms.clock.monotonic() + within_s
    pause_s = _FIRST_PAUSE_S
    while True:
        async with rooms.db.read() as session:
            job = await queue.get(session, job_id, asking.owner)
        if job.kind is not JobKind.TRAIN_OP:
            raise NotFound(f"There is no future {job_id[:100]!r}.", param="request_id")
        left_s = until - rooms.clock.monotonic()
        if job.status.terminal or left_s <= 0:
            return job
        await asyncio.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def _submit(
    rooms: Doors,
    session: AsyncSession,
    asking: Asking,
    job_id: str,
    op: Stored,
    trainer: Trainer | None,
) -> Job:
    run = op.spec["run"]
    new = queue.NewJob(
        kind=JobKind.TRAIN_OP,
        key_id=asking.key_id,
        spec=op.spec,
        trainer=None if trainer is None else trainer.name,
        lock=None if trainer is None else trainer.lock or f"run:{run}",
        metadata={} if trainer is None else {"run": run},
        max_attempts=rooms.settings.job_attempts,
        id=job_id,
    )
    most = rooms.settings.max_queued_jobs
    job = await queue.submit(session, rooms.clock, new, most=most)
    if op.payload is not None:
        await op_payloads.keep(session, job, run, op.payload)
    return job


async def _known(session: AsyncSession, asking: Asking, job_id: str, op: Stored) -> Job | None:
    """The job of the same request, if it was sent before."""
    if asking.once is None:
        return None
    try:
        job = await queue.get(session, job_id, asking.key_id)
    except NotFound:
        return None
    if _asked(job.spec) != _asked(op.spec):
        raise Conflict(
            "This Idempotency-Key was sent before with another request: use a new one.",
            param="Idempotency-Key",
        )
    return job


def _asked(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a client said of an op; where it is sampled from was decided here."""
    return {name: value for name, value in spec.items() if name != "model"}


async def _is_served(session: AsyncSession, run: TrainingRun) -> bool:
    """Whether the newest version has the weights that all ops so far leave."""
    if run.version is None or run.saved_steps != run.optim_steps:
        return False
    return not await runs.busy(session, run.id)


async def _least_taken(
    session: AsyncSession, base_model: str, trainers: Mapping[str, Trainer]
) -> Trainer:
    found = [trainer for trainer in trainers.values() if trainer.base_model == base_model]
    if not found:
        known = sorted({trainer.base_model for trainer in trainers.values()})
        hint = f"Trained here: {', '.join(map(repr, known))}." if known else "None is set up."
        raise NotTrainable(f"No trainer has the base model {base_model!r}. {hint}")
    taken = await runs.runs_by_trainer(session)
    return min(found, key=lambda trainer: taken.get(trainer.name, 0))


def _run_id(asked: str, job_id: str) -> str:
    """`base_lora_1a2b3c4d`; the same for a request that is sent again."""
    last = asked.rstrip("/").rpartition("/")[2]
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")[:_BASE_IN_NAME] or "base"
    return f"{base}_lora_{job_id.removeprefix('op-')[:8]}"
