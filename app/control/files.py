"""The verbs on files.

What comes in: a session of an open transaction and plain values. What goes out: `domain.File`s.
The bytes were stored before (`db.file_store`); a row says whose they are and what for. A deleted
row stays as a tombstone until `tasks.collect_files` has seen that no job needs the bytes.

`owner` is the key that asks, or None for an admin, who sees everybody's.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select, or_, select, update
from sqlalchemy import delete as sql_delete
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.control.views import Page
from app.db.engine import Database
from app.db.file_tables import FileRow
from app.db.job_tables import JobRow
from app.domain import File, JobKind, JobStatus
from app.errors import InvalidRequest, NotFound

#: What a client may upload for; jobs produce the others.
PURPOSES = ("fine-tune", "batch", "assistants", "user_data", "evals", "vision")
RESULTS = "fine-tune-results"
MAX_PAGE = 10_000
NAME_MAX = 512
EXPIRY_S = range(3600, 30 * 86_400 + 1)

_BATCH_EXPIRY_S = 30 * 86_400
_BATCH = 500
_LIVE_JOBS = (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSED)


def new_id(kind: str) -> str:
    """A name nobody can guess: `file-…`."""
    return f"{kind}-{secrets.token_hex(12)}"


def check_upload(filename: str, purpose: str, expires_after_s: int | None) -> None:
    """Refuse what cannot become a file's row.

    Raises:
        InvalidRequest: naming the field.
    """
    if purpose not in PURPOSES:
        allowed = ", ".join(PURPOSES)
        raise InvalidRequest(f"purpose is one of {allowed}, not {purpose!r}.", param="purpose")
    if not 1 <= len(filename) <= NAME_MAX or not filename.isprintable():
        raise InvalidRequest(
            f"A file's name is 1 to {NAME_MAX} printable characters.", param="filename"
        )
    if expires_after_s is not None and expires_after_s not in EXPIRY_S:
        raise InvalidRequest(
            f"expires_after is {EXPIRY_S.start} to {EXPIRY_S.stop - 1} seconds, "
            f"not {expires_after_s}.",
            param="expires_after",
        )


async def create(
    session: AsyncSession,
    clock: Clock,
    *,
    key_id: str,
    filename: str,
    purpose: str,
    size: int,
    digest: str,
    expires_after_s: int | None = None,
) -> File:
    """Say whose the stored bytes of `digest` are. Files for batches expire after 30 days."""
    now = clock.now()
    if expires_after_s is None and purpose == "batch":
        expires_after_s = _BATCH_EXPIRY_S
    row = FileRow(
        id=new_id("file"),
        key_id=key_id,
        filename=filename,
        purpose=purpose,
        bytes=size,
        digest=digest,
        created_at=now,
        expires_at=None if expires_after_s is None else now + timedelta(seconds=expires_after_s),
    )
    session.add(row)
    await session.flush()
    return file_of(row)


async def get(
    session: AsyncSession, clock: Clock, file_id: str, owner: str | None, *, keep: bool = False
) -> File:
    """One file. `keep` holds off a deletion until the transaction ends.

    Raises:
        NotFound: there is none, or it is another key's.
    """
    query = _visible(clock, owner).where(FileRow.id == file_id)
    row: FileRow | None = await session.scalar(query.with_for_update(read=True) if keep else query)
    if row is None:
        raise NotFound(f"There is no file {file_id!r}.", param="file_id")
    return file_of(row)


async def for_job(session: AsyncSession, file_id: str) -> File:
    """A file that a job was submitted with, even if it was deleted since.

    Raises:
        NotFound: it is gone for good.
    """
    row = await session.scalar(select(FileRow).where(FileRow.id == file_id))
    if row is None:
        raise NotFound(f"There is no file {file_id!r} any more.", param="training_file")
    return file_of(row)


async def list_(
    session: AsyncSession,
    clock: Clock,
    owner: str | None,
    *,
    limit: int = MAX_PAGE,
    after: str | None = None,
    ascending: bool = False,
    purpose: str | None = None,
) -> Page[File]:
    """A page of files by age, the newest first unless `ascending`."""
    query = _visible(clock, owner)
    if purpose is not None:
        query = query.where(FileRow.purpose == purpose)
    if after is not None:
        place = await _place(session, after, owner)
        query = query.where(FileRow.number > place if ascending else FileRow.number < place)
    order = FileRow.number if ascending else FileRow.number.desc()
    rows = (await session.scalars(query.order_by(order).limit(limit + 1))).all()
    page = [file_of(row) for row in rows[:limit]]
    return Page(tuple(page), page[-1].id if len(rows) > limit else None)


async def delete(session: AsyncSession, clock: Clock, file_id: str, owner: str | None) -> None:
    """Delete a file. Jobs that were submitted with it keep its bytes until they end.

    Raises:
        NotFound: there is none, or it is another key's.
    """
    query = _visible(clock, owner).where(FileRow.id == file_id).with_for_update()
    row: FileRow | None = await session.scalar(query)
    if row is None:
        raise NotFound(f"There is no file {file_id!r}.", param="file_id")
    row.deleted_at = clock.now()
    await session.flush()


async def needed_by_jobs(session: AsyncSession) -> set[str]:
    """The ids of files that jobs which are not over were submitted with."""
    spec: Any = JobRow.spec
    query = select(spec["training_file"].as_string(), spec["validation_file"].as_string()).where(
        JobRow.kind == JobKind.FINE_TUNE.value,
        JobRow.status.in_([status.value for status in _LIVE_JOBS]),
    )
    return {file_id for row in await session.execute(query) for file_id in row if file_id}


async def expire(session: AsyncSession, clock: Clock) -> int:
    """Delete the files whose time is over; answers how many."""
    now = clock.now()
    ended = update(FileRow).where(FileRow.deleted_at.is_(None), FileRow.expires_at <= now)
    return len((await session.execute(ended.values(deleted_at=now).returning(FileRow.id))).all())


async def forget(session: AsyncSession, before: datetime, kept: Collection[str]) -> None:
    """Drop the tombstones of files deleted before then, but for those with an id in `kept`."""
    deleted = await session.scalars(select(FileRow.id).where(FileRow.deleted_at <= before))
    gone = [file_id for file_id in deleted if file_id not in kept]
    for at in range(0, len(gone), _BATCH):
        await session.execute(sql_delete(FileRow).where(FileRow.id.in_(gone[at : at + _BATCH])))


async def unneeded(db: Database, digests: Sequence[str], kept: Collection[str]) -> list[str]:
    """Of these digests, those that no file is left with: none live, none with an id in `kept`."""
    left: list[str] = []
    for at in range(0, len(digests), _BATCH):
        batch = digests[at : at + _BATCH]
        query = select(FileRow.digest, FileRow.id, FileRow.deleted_at).where(
            FileRow.digest.in_(batch)
        )
        async with db.read() as session:
            needed = {
                digest
                for digest, file_id, deleted_at in await session.execute(query)
                if deleted_at is None or file_id in kept
            }
        left += [digest for digest in batch if digest not in needed]
    return left


def file_of(row: FileRow) -> File:
    """What outlives the transaction."""
    return File(
        id=row.id,
        key_id=row.key_id,
        filename=row.filename,
        purpose=row.purpose,
        bytes=row.bytes,
        digest=row.digest,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


def _visible(clock: Clock, owner: str | None) -> Select[Any]:
    query = select(FileRow).where(
        FileRow.deleted_at.is_(None),
        or_(FileRow.expires_at.is_(None), FileRow.expires_at > clock.now()),
    )
    return query if owner is None else query.where(FileRow.key_id == owner)


async def _place(session: AsyncSession, after: str, owner: str | None) -> int:
    """Where a cursor stands: a file that was deleted while its list was read still has a place."""
    query = select(FileRow.number).where(FileRow.id == after)
    if owner is not None:
        query = query.where(FileRow.key_id == owner)
    place = await session.scalar(query)
    if place is None:
        raise InvalidRequest(f"after names no file: {after[:100]!r}.", param="after")
    return place
