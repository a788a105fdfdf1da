"""From what a client wants trained to a job in the queue.

What comes in: a request whose fields have the right shape. What goes out: a job, or what is wrong:
whatever can be known without the model's tokenizer is said before the job exists. Load, check the
files with no transaction open, submit.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import string
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.control import files
from app.db.engine import Database
from app.db.file_store import FileStore
from app.domain import File, Job, JobKind, JobStatus, Pool, Trainer
from app.errors import (
    InvalidRequest,
    InvalidTrainingFile,
    NotFound,
    NotTrainable,
    StorageUnavailable,
)
from app.jobs import queue
from app.ops import TrainerInfo
from app.settings import Settings
from app.training import dataset
from app.training.spec import FineTuneSpec, Method

SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
DEFAULT_RANK = 16
MAX_SEED = (1 << 31) - 1

_TRAINING, _VALIDATION = "training_file", "validation_file"
_ID_ALPHABET = string.ascii_lowercase + string.digits
_BASE_IN_NAME = 48

#: Asks a worker what it is; None while it does not answer.
AskTrainer = Callable[[Trainer], Awaitable[TrainerInfo | None]]


class Doors(Protocol):
    """What `create` needs of the open rooms."""

    @property
    def settings(self) -> Settings: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def db(self) -> Database: ...
    @property
    def files(self) -> FileStore: ...
    @property
    def trainers(self) -> Mapping[str, Trainer]: ...
    @property
    def ask_trainer(self) -> AskTrainer: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """A fine-tune job as asked for. `hyperparameters` are fields of `FineTuneSpec`."""

    training_file: str
    validation_file: str | None = None
    method: Method = "supervised"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    suffix: str | None = None
    seed: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0


async def create(rooms: Doors, pool: Pool, wanted: Wanted, key_id: str, owner: str | None) -> Job:
    """Check what was asked for, and submit it as a job of `key_id` on the base of `pool`.

    `owner` limits the files to those of one key; None, for an admin, does not.

    Raises:
        NotTrainable: no trainer has the base.
        InvalidRequest: a field does not fit the base, its pool or trainer; a file is not there.
        InvalidTrainingFile: a file is empty or has lines that are wrong.
        Conflict: the key has as many jobs waiting as it may have.
    """
    if wanted.suffix is not None and not SUFFIX.fullmatch(wanted.suffix):
        raise InvalidRequest("suffix is 1 to 64 letters, digits, '.', '_' or '-'.", param="suffix")
    trainers = _trainers_of(pool.base_model, rooms.trainers)
    async with rooms.db.read() as session:
        found = await _files(session, rooms.clock, wanted, owner)
        trainer = await _least_busy(session, trainers)
    spec = _spec(pool, wanted, await rooms.ask_trainer(trainer))
    for param, file in found.items():
        await _check_content(rooms.files, file, wanted.method, param)
    new = queue.NewJob(
        kind=JobKind.FINE_TUNE,
        key_id=key_id,
        spec=spec.to_json(),
        trainer=trainer.name,
        lock=trainer.lock,
        priority=wanted.priority,
        metadata=wanted.metadata,
        max_attempts=rooms.settings.job_attempts,
    )
    async with rooms.db.begin() as session:
        # Held from here to the commit: a file deleted later is kept for the job, one deleted
        # before is missed here.
        await _files(session, rooms.clock, wanted, owner, keep=True)
        return await queue.submit(session, rooms.clock, new, most=rooms.settings.max_queued_jobs)


def model_name(base_model: str, suffix: str | None) -> str:
    """A new name for the result of a job: `ft:<base>:<suffix or nothing>:<id>`."""
    last = base_model.rstrip("/").rpartition("/")[2]
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", last)[:_BASE_IN_NAME] or "base"
    unique = "".join(secrets.choice(_ID_ALPHABET) for _ in range(8))
    return f"ft:{base}:{suffix or ''}:{unique}"


def _trainers_of(base_model: str, trainers: Mapping[str, Trainer]) -> Sequence[Trainer]:
    found = [trainer for trainer in trainers.values() if trainer.base_model == base_model]
    if not found:
        known = sorted({trainer.base_model for trainer in trainers.values()})
        hint = f"Trained here: {', '.join(map(repr, known))}." if known else "None is set up."
        raise NotTrainable(f"No trainer has the base model {base_model!r}. {hint}")
    return found


async def _least_busy(session: AsyncSession, trainers: Sequence[Trainer]) -> Trainer:
    """The trainer with the fewest unfinished jobs for each that it does at once."""
    if len(trainers) == 1:
        return trainers[0]
    jobs = dict.fromkeys((trainer.name for trainer in trainers), 0)
    for depth in await queue.depth(session):
        if depth.trainer in jobs and depth.status is not JobStatus.PAUSED:
            jobs[depth.trainer] += depth.jobs
    return min(trainers, key=lambda trainer: jobs[trainer.name] / trainer.max_jobs)


async def _files(
    session: AsyncSession,
    clock: Clock,
    wanted: Wanted,
    owner: str | None,
    *,
    keep: bool = False,
) -> dict[str, File]:
    """The request's files by the field that names them."""
    ids = {_TRAINING: wanted.training_file, _VALIDATION: wanted.validation_file}
    found = {}
    for param, file_id in ids.items():
        if file_id is None:
            continue
        try:
            file = await files.get(session, clock, file_id, owner, keep=keep)
        except NotFound as exc:
            raise InvalidRequest(str(exc), param=param) from exc
        if file.purpose != "fine-tune":
            raise InvalidRequest(
                f"File {file_id!r} was uploaded for {file.purpose!r}: training takes files "
                "of the purpose 'fine-tune'.",
                param=param,
            )
        found[param] = file
    return found


def _spec(pool: Pool, wanted: Wanted, info: TrainerInfo | None) -> FineTuneSpec:
    chosen = dict(wanted.hyperparameters)
    most = pool.max_lora_rank if info is None else min(pool.max_lora_rank, info.max_rank)
    rank = chosen.pop("lora_rank", None) or min(DEFAULT_RANK, most)
    if rank > most:
        whose = "its pool serves" if most == pool.max_lora_rank else "its trainer takes"
        raise InvalidRequest(
            f"lora_rank is {rank}; for {pool.base_model!r} it is at most {most}, which is what "
            f"{whose}.",
            param="lora_rank",
        )
    if info is not None:
        _check_limits(chosen, info)
    return FineTuneSpec(
        base_model=pool.base_model,
        model=model_name(pool.base_model, wanted.suffix),
        training_file=wanted.training_file,
        validation_file=wanted.validation_file,
        method=wanted.method,
        suffix=wanted.suffix,
        seed=secrets.randbelow(MAX_SEED) if wanted.seed is None else wanted.seed,
        lora_rank=rank,
        lora_alpha=chosen.pop("lora_alpha", None) or 2 * rank,
        **chosen,
    )


def _check_limits(chosen: Mapping[str, Any], info: TrainerInfo) -> None:
    unknown = sorted(set(chosen.get("target_modules") or ()) - set(info.target_modules))
    if unknown:
        raise InvalidRequest(
            f"target_modules has {unknown[0]!r}; the base has {', '.join(info.target_modules)}.",
            param="target_modules",
        )
    length = chosen.get("max_length")
    if length is not None and length > info.max_length:
        raise InvalidRequest(
            f"max_length is {length}; the base has {info.max_length} tokens.", param="max_length"
        )


async def _check_content(store: FileStore, file: File, method: Method, param: str) -> None:
    """Read the file line by line; one that was just renewed is there until it is read."""
    if not file.bytes:
        raise InvalidTrainingFile(f"File {file.id!r} is empty.", param=param)
    if not store.renew(file.digest):
        raise StorageUnavailable(f"The bytes of file {file.id!r} are not in the file store.")
    await asyncio.to_thread(dataset.check, store.path(file.digest), method, param=param)
