"""Loads what an attempt at a fine-tune job needs: its files as tokens, its plan, its position.

What comes in: a claimed job and its worker. What goes out: a loop that is ready to run, and the
recorder it tells. What was decided by the first attempt is kept by the later ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.control import files
from app.control.intake import Candidate
from app.control.pools import base_of, pool_of
from app.db.file_store import FileStore
from app.db.tables import BaseModelRow, PoolRow
from app.domain import File, Job, LoraSpec
from app.errors import NotFound, StorageUnavailable
from app.handlers import fine_tune_recorder
from app.handlers.fine_tune_recorder import Recorder, Recording
from app.jobs.context import JobContext
from app.training.batches import Batches
from app.training.loop import Loop, Position, Target
from app.training.patience import Patience
from app.training.plan import Hyperparameters, Plan, decide
from app.training.rendering import render
from app.training.run import Run, TrainerHost
from app.training.spec import FineTuneSpec
from app.training.tokens import Examples


class Rooms(fine_tune_recorder.Rooms, Protocol):
    """What loading needs of the running gateway."""

    @property
    def files(self) -> FileStore: ...


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a job, and all it works with."""

    rooms: Rooms
    ctx: JobContext
    job: Job
    spec: FineTuneSpec
    host: TrainerHost
    run: Run
    patience: Patience


async def load(attempt: Attempt, spools: ExitStack) -> tuple[Loop, Recorder]:
    """Make ready. The tokens live as long as `spools`.

    Raises:
        InvalidTrainingFile: a line is too long for the model, or refused by its template.
        NotFound: a file, or the base's pool, is gone.
        StorageUnavailable: a file is not on this machine.
        Stopped: the job is to be cancelled or paused.
    """
    spec, ctx = attempt.spec, attempt.ctx
    info = await attempt.patience.again(attempt.host.info)
    async with ctx.db.read() as session:
        target = await _target(session, spec.base_model)
        sources = await _sources(session, spec)
    max_length = min(spec.max_length or info.max_length, info.max_length)
    tokens = {
        param: await _tokens(attempt, param, file, max_length, spools)
        for param, file in sources.items()
    }
    examples, held_out = tokens["training_file"], tokens.get("validation_file")
    plan = _plan(attempt, target, len(examples), len(held_out or ()))
    lora = LoraSpec(
        rank=spec.lora_rank,
        alpha=spec.lora_alpha,
        target_modules=spec.target_modules or usual_modules(info.target_modules),
        seed=spec.seed,
    )
    facts = _facts(plan, lora, max_length, examples)
    of = Recording(
        job=attempt.job,
        spec=spec,
        run=attempt.run,
        plan=plan,
        target=target,
        facts=facts,
        provenance=_provenance(attempt, facts, sources),
    )
    start = _position(attempt.job.progress)
    recorder = Recorder(attempt.rooms, ctx, of, start)
    if not attempt.job.progress:
        await recorder.begin()
    loop = Loop(
        Target(attempt.run, info.base_model, lora, ctx.lease.attempt),
        Batches(plan, spec.method, examples, held_out),
        recorder,
        ctx.clock,
        attempt.patience,
        start,
        attempt.rooms.settings.checkpoint_period_s,
    )
    return loop, recorder


async def _sources(session: AsyncSession, spec: FineTuneSpec) -> dict[str, File]:
    """The job's files by the field that names them."""
    found = {"training_file": await files.for_job(session, spec.training_file)}
    if spec.validation_file is not None:
        found["validation_file"] = await files.for_job(session, spec.validation_file)
    return found


async def _tokens(
    attempt: Attempt, param: str, file: File, max_length: int, spools: ExitStack
) -> Examples:
    store = attempt.rooms.files
    if not store.renew(file.digest):
        raise StorageUnavailable(f"The bytes of file {file.id!r} are not in the file store.")
    sequences = 2 if attempt.spec.method == "dpo" else 1
    into = spools.enter_context(Examples(store.root / "tmp", sequences))
    await render(
        attempt.host,
        attempt.patience,
        store.path(file.digest),
        into,
        method=attempt.spec.method,
        max_length=max_length,
        param=param,
    )
    return into


def usual_modules(modules: Sequence[str]) -> tuple[str, ...]:
    """All but the output layer: engines leave that out of prompt logprobs, or cannot serve it."""
    return tuple(module for module in modules if module != "lm_head")


async def _target(session: AsyncSession, base_model: str) -> Candidate:
    """The base, and the pool that will serve what is trained."""
    query = (
        select(PoolRow, BaseModelRow)
        .join(BaseModelRow, BaseModelRow.name == PoolRow.base_model)
        .where(PoolRow.base_model == base_model)
    )
    found = (await session.execute(query)).first()
    if found is None:
        raise NotFound(f"No pool serves the base model {base_model!r} any more.", param="model")
    pool, base = found
    return Candidate(base_of(base), pool_of(pool))


def _plan(attempt: Attempt, target: Candidate, examples: int, held_out: int) -> Plan:
    """The plan, with what was decided when the job was begun first."""
    decided = attempt.job.progress.get("hyperparameters")
    if decided is None:
        settings = decide(attempt.spec, examples, _hidden_size(target.base.config))
    else:
        settings = msgspec.convert(decided, Hyperparameters)
    return Plan(examples, held_out, attempt.spec.seed, settings)


def _hidden_size(config: Mapping[str, Any] | None) -> int | None:
    known = config or {}
    inner = known.get("text_config")
    size = known.get("hidden_size", inner.get("hidden_size") if isinstance(inner, dict) else None)
    return size if type(size) is int and size > 0 else None


def _position(progress: Mapping[str, Any]) -> Position:
    saves = tuple((first, every) for first, every in progress.get("saves", ()))
    return Position(progress.get("done", 0), saves)


def _facts(plan: Plan, lora: LoraSpec, max_length: int, examples: Examples) -> dict[str, Any]:
    """What progress and result say of the whole job."""
    per_epoch = sum(examples.tokens(example) for example in range(len(examples)))
    return {
        "hyperparameters": {
            **plan.settings.to_json(),
            "lora_rank": lora.rank,
            "lora_alpha": lora.alpha,
            "target_modules": list(lora.target_modules),
            "max_length": max_length,
        },
        "total_steps": plan.steps,
        "trained_tokens": per_epoch * plan.settings.n_epochs,
    }


def _provenance(
    attempt: Attempt, facts: Mapping[str, Any], sources: Mapping[str, File]
) -> dict[str, Any]:
    """Where the job's weights come from, for whoever finds them in the registry."""
    return {
        "job": attempt.job.id,
        "trainer": attempt.job.trainer,
        "method": attempt.spec.method,
        "seed": attempt.spec.seed,
        "hyperparameters": facts["hyperparameters"],
        **{param: {"id": file.id, "sha256": file.digest} for param, file in sources.items()},
    }
