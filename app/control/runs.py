"""The verbs on training runs that live across single ops.

What comes in: a session and plain values. What goes out: frozen runs. The numbers of their ops are
given here, each once. It must not know: what an op does, workers, how a job is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.db.job_tables import JobRow, TrainingRunRow
from app.domain import Job, JobKind, LoraSpec, TrainingRun
from app.errors import NotFound
from app.jobs import queue


async def create(
    session: AsyncSession,
    clock: Clock,
    *,
    run_id: str,
    key_id: str,
    trainer: str,
    base_model: str,
    lora: LoraSpec,
) -> TrainingRun:
    """Add a run. `lora` without target modules gets them, and what the worker calls the base, by
    `shape`.
    """
    row = TrainingRunRow(
        id=run_id,
        key_id=key_id,
        trainer=trainer,
        base_model=base_model,
        spec=_stored(lora, base_model),
        next_seq=1,
        optim_steps=0,
        created_at=clock.now(),
    )
    session.add(row)
    await session.flush()
    return _run(row)


async def get(session: AsyncSession, run_id: str, owner: str | None = None) -> TrainingRun:
    """A run that was not removed; with `owner`, only one of that key.

    Raises:
        NotFound: there is none.
    """
    return _run(await _get(session, run_id, owner))


async def shape(
    session: AsyncSession, run_id: str, lora: LoraSpec, worker_base: str
) -> TrainingRun:
    """Say what the worker makes of it."""
    row = await _get(session, run_id)
    row.spec = _stored(lora, worker_base)
    await session.flush()
    return _run(row)


async def probe_by(
    session: AsyncSession, run_id: str, probe_tokens: Sequence[Sequence[int]]
) -> TrainingRun:
    """Say of which tokens the probe of its next version is."""
    row = await _get(session, run_id)
    row.probe_tokens = [list(tokens) for tokens in probe_tokens]
    await session.flush()
    return _run(row)


async def number(session: AsyncSession, run_id: str, count: int) -> int:
    """Take the next `count` numbers for ops; the first of them."""
    row = await _get(session, run_id)
    first = row.next_seq
    row.next_seq += count
    await session.flush()
    return first


async def rewind(session: AsyncSession, run_id: str, next_seq: int) -> None:
    """Give the numbers from `next_seq` on free again: their ops were never done."""
    row = await _get(session, run_id)
    row.next_seq = next_seq
    await session.flush()


async def stepped(session: AsyncSession, run_id: str) -> int:
    """Its weights have changed; how often they have."""
    row = await _get(session, run_id)
    row.optim_steps += 1
    await session.flush()
    return row.optim_steps


async def saved(session: AsyncSession, run_id: str, *, steps: int, version: int) -> None:
    """Its weights after `steps` are that version of its adapter."""
    row = await _get(session, run_id)
    row.saved_steps, row.version = steps, version
    await session.flush()


async def remove(session: AsyncSession, clock: Clock, run_id: str) -> None:
    """Forget a run; its row stays, so that its name is not given again."""
    (await _get(session, run_id)).removed_at = clock.now()
    await session.flush()


async def busy(session: AsyncSession, run_id: str) -> bool:
    """Whether ops of the run wait or are being done."""
    return bool(await _unfinished(session, run_id))


async def must_wait(session: AsyncSession, job: Job) -> bool:
    """Whether an op of the same run that came before this one has not ended.

    The queue has one job of a lock run at a time, but one that was given back may wait longer than
    its successor.
    """
    return any(number < job.number for number in await _unfinished(session, job.spec["run"]))


async def runs_by_trainer(session: AsyncSession) -> Mapping[str, int]:
    """How many runs each trainer has."""
    query = (
        select(TrainingRunRow.trainer, func.count())
        .where(TrainingRunRow.removed_at.is_(None))
        .group_by(TrainingRunRow.trainer)
    )
    return {trainer: count for trainer, count in await session.execute(query)}


async def numbered(session: AsyncSession, run_id: str, first: int, end: int) -> list[Job]:
    """The jobs that were given numbers from `first` up to `end`, in their order."""
    found: list[Job] = []
    after: str | None = None
    more = True
    while more:
        page, more = await queue.list_(
            session, kind=JobKind.TRAIN_OP, metadata={"run": run_id}, after=after, limit=200
        )
        for job in page:
            after, seq = job.id, job.progress.get("seq")
            if seq is not None and seq + job.progress["ops"] <= first:
                return found[::-1]
            if seq is not None and seq < end:
                found.append(job)
    return found[::-1]


async def _unfinished(session: AsyncSession, run_id: str) -> list[int]:
    """The numbers of its ops' jobs that have not ended."""
    query = select(JobRow.number, JobRow.spec).where(
        JobRow.kind == JobKind.TRAIN_OP.value,
        JobRow.status.in_([status.value for status in queue.UNFINISHED]),
        JobRow.lock.is_not(None),
    )
    return [number for number, spec in await session.execute(query) if spec["run"] == run_id]


async def _get(session: AsyncSession, run_id: str, owner: str | None = None) -> TrainingRunRow:
    row = await session.get(TrainingRunRow, run_id, populate_existing=True)
    if row is None or row.removed_at is not None or owner not in (None, row.key_id):
        raise NotFound(f"There is no model {run_id[:200]!r}; add_lora makes one.", param="model_id")
    return row


def _stored(lora: LoraSpec, worker_base: str) -> dict[str, Any]:
    return {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "target_modules": list(lora.target_modules),
        "seed": lora.seed,
        "worker_base": worker_base,
    }


def _run(row: TrainingRunRow) -> TrainingRun:
    spec = row.spec
    modules = tuple(spec["target_modules"])
    return TrainingRun(
        id=row.id,
        key_id=row.key_id,
        trainer=row.trainer,
        base_model=row.base_model,
        lora=LoraSpec(spec["rank"], spec["alpha"], modules, spec["seed"]),
        worker_base=spec["worker_base"],
        next_seq=row.next_seq,
        optim_steps=row.optim_steps,
        saved_steps=row.saved_steps,
        version=row.version,
        probe_tokens=tuple(map(tuple, row.probe_tokens or ())),
        created_at=row.created_at,
    )
