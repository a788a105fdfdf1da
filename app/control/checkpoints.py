"""The verbs on checkpoints: weights that a fine-tune job made become versions that are served.

What comes in: a session of an open transaction, a job, weights that were checked and stored. What
goes out: the name to ask for. A version, its alias and its checkpoint are written together. The
model's own name answers from the last one on, which the job's end is written with.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.control import adapters
from app.control.intake import Admitted
from app.db.job_tables import CheckpointRow
from app.db.tables import AdapterRow, VersionRow
from app.domain import Job


@dataclass(frozen=True, slots=True)
class Trained:
    """Weights after a step, in the store and fit to be served."""

    step: int
    admitted: Admitted
    metrics: Mapping[str, float]


async def register(
    session: AsyncSession,
    clock: Clock,
    job: Job,
    model: str,
    trained: Trained,
    provenance: Mapping[str, Any],
    *,
    final: bool,
) -> str:
    """Register weights as the newest version of `model`; answers their name of their own.

    The adapter is made with the first. Weights of a step that are registered already are left as
    they are. `provenance` says whence they come, of the adapter and of each version. `final`: they
    are what the job was to make, and what `model` stands for from now on.
    """
    name = checkpoint_name(model, trained.step)
    known = select(CheckpointRow.id).where(
        CheckpointRow.job_number == job.number, CheckpointRow.step == trained.step
    )
    if await session.scalar(known) is not None:
        return name
    registered = await adapters.register(
        session,
        clock,
        name=model,
        base_model=trained.admitted.base_model,
        digest=trained.admitted.digest,
        facts=trained.admitted.facts,
        source=trained.admitted.source,
        alias=checkpoint_alias(trained.step),
        metadata=provenance,
        probe=trained.admitted.probe,
        move_latest=final,
    )
    adapter = select(AdapterRow.id).where(AdapterRow.name == model).scalar_subquery()
    await session.execute(
        update(VersionRow)
        .where(VersionRow.adapter_id == adapter, VersionRow.number == registered.version.number)
        .values(details={**provenance, "step": trained.step, "metrics": dict(trained.metrics)})
    )
    session.add(
        CheckpointRow(
            id=f"ftckpt-{secrets.token_hex(12)}",
            job_number=job.number,
            step=trained.step,
            model=name,
            metrics=dict(trained.metrics),
            created_at=clock.now(),
        )
    )
    await session.flush()
    return name


def checkpoint_name(model: str, step: int) -> str:
    """What the weights of a step are asked for by, whatever comes after them."""
    return f"{model}:{checkpoint_alias(step)}"


def checkpoint_alias(step: int) -> str:
    """The alias of the weights of a step."""
    return f"ckpt-step-{step}"
