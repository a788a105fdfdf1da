"""The verbs on uploads: files that arrive in parts.

What comes in: a session of an open transaction and plain values. What goes out: `Upload`s. The
parts' bytes are in `db.file_store` before their rows, and joined before `complete`.

An upload is pending until it is completed, cancelled or an hour old; no later verb changes that.
`owner` is the key that asks, or None for an admin.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.control import files
from app.db.file_tables import FileRow, UploadPartRow, UploadRow
from app.domain import File
from app.errors import BodyTooLarge, Conflict, InvalidRequest, NotFound

LIFETIME_S = 3600.0
MAX_PART_BYTES = 64 << 20
MAX_PARTS = 10_000
#: How often its own size the parts of an upload may hold: a part may have been sent twice.
_REPEATED = 2


class UploadStatus(StrEnum):
    """Where an upload is in its life."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that arrives in parts; `file` once it is complete."""

    id: str
    key_id: str
    filename: str
    purpose: str
    bytes: int
    status: UploadStatus
    created_at: datetime
    expires_at: datetime
    file_expires_after_s: int | None
    file: File | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an upload, whose bytes are on disk."""

    id: str
    upload_id: str
    created_at: datetime


async def create(
    session: AsyncSession,
    clock: Clock,
    *,
    key_id: str,
    filename: str,
    purpose: str,
    mime_type: str,
    size: int,
    file_expires_after_s: int | None = None,
) -> Upload:
    """Begin an upload of `size` bytes."""
    now = clock.now()
    row = UploadRow(
        id=files.new_id("upload"),
        key_id=key_id,
        filename=filename,
        purpose=purpose,
        mime_type=mime_type,
        bytes=size,
        status=UploadStatus.PENDING.value,
        created_at=now,
        expires_at=now + timedelta(seconds=LIFETIME_S),
        file_expires_after_s=file_expires_after_s,
    )
    session.add(row)
    await session.flush()
    return _upload(row, clock)


async def show(
    session: AsyncSession, clock: Clock, upload_id: str, owner: str | None, *, lock: bool = False
) -> Upload:
    """One upload, with its file. `lock` makes other verbs on it wait.

    Raises:
        NotFound: there is none, or it is another key's.
    """
    row = await _find(session, upload_id, owner, lock=lock)
    file = None
    if row.file_id is not None:
        found = await session.scalar(select(FileRow).where(FileRow.id == row.file_id))
        file = None if found is None else files.file_of(found)
    return _upload(row, clock, file)


async def add_part(
    session: AsyncSession,
    clock: Clock,
    upload_id: str,
    owner: str | None,
    *,
    part_id: str,
    size: int,
) -> Part:
    """Add a part whose bytes are stored.

    Raises:
        NotFound: there is no such upload, or it is another key's.
        Conflict: it is not pending.
        BodyTooLarge: it has more parts than it can use.
    """
    upload = await show(session, clock, upload_id, owner, lock=True)
    check_pending(upload)
    of_upload = UploadPartRow.upload_id == upload_id
    totals = select(func.count(), func.coalesce(func.sum(UploadPartRow.bytes), 0)).where(of_upload)
    count, stored = (await session.execute(totals)).one()
    if count >= MAX_PARTS or stored + size > _REPEATED * upload.bytes:
        raise BodyTooLarge(
            f"Upload {upload_id!r} is of {upload.bytes} bytes and has {count} parts of {stored}."
        )
    row = UploadPartRow(id=part_id, upload_id=upload_id, bytes=size, created_at=clock.now())
    session.add(row)
    await session.flush()
    return Part(row.id, upload_id, row.created_at)


async def check_parts(session: AsyncSession, upload: Upload, part_ids: Sequence[str]) -> None:
    """Refuse to join what is not the whole of an upload.

    Raises:
        InvalidRequest: a part is named twice or not known, or they are not `upload.bytes` long.
    """
    query = select(UploadPartRow.id, UploadPartRow.bytes).where(
        UploadPartRow.upload_id == upload.id
    )
    sizes = {part: size for part, size in await session.execute(query)}
    unknown = [part for part in part_ids if part not in sizes]
    if unknown:
        raise InvalidRequest(
            f"Upload {upload.id!r} has no part {unknown[0][:100]!r}.", param="part_ids"
        )
    if len(set(part_ids)) != len(part_ids):
        raise InvalidRequest("part_ids names a part twice.", param="part_ids")
    total = sum(sizes[part] for part in part_ids)
    if total != upload.bytes:
        raise InvalidRequest(
            f"The parts are {total} bytes together; the upload was to be {upload.bytes}.",
            param="part_ids",
        )


async def complete(
    session: AsyncSession, clock: Clock, upload_id: str, owner: str | None, *, digest: str
) -> Upload:
    """Make the joined bytes, which are stored under `digest`, the upload's file.

    An upload that is completed stays as it is: a client may ask twice at once.

    Raises:
        NotFound, Conflict: as `add_part`.
    """
    upload = await show(session, clock, upload_id, owner, lock=True)
    if upload.status is UploadStatus.COMPLETED:
        return upload
    check_pending(upload)
    file = await files.create(
        session,
        clock,
        key_id=upload.key_id,
        filename=upload.filename,
        purpose=upload.purpose,
        size=upload.bytes,
        digest=digest,
        expires_after_s=upload.file_expires_after_s,
    )
    await _end(session, upload_id, UploadStatus.COMPLETED, file.id)
    return await show(session, clock, upload_id, owner)


async def cancel(session: AsyncSession, clock: Clock, upload_id: str, owner: str | None) -> Upload:
    """End an upload without a file.

    Raises:
        NotFound, Conflict: as `add_part`.
    """
    check_pending(await show(session, clock, upload_id, owner, lock=True))
    await _end(session, upload_id, UploadStatus.CANCELLED)
    return await show(session, clock, upload_id, owner)


async def expire(session: AsyncSession, clock: Clock) -> None:
    """Write down which pending uploads ended by their age."""
    await session.execute(
        update(UploadRow)
        .where(UploadRow.status == UploadStatus.PENDING.value, UploadRow.expires_at <= clock.now())
        .values(status=UploadStatus.EXPIRED.value)
    )


async def pending(session: AsyncSession, upload_ids: Collection[str]) -> set[str]:
    """Those of them that are pending."""
    query = select(UploadRow.id).where(
        UploadRow.id.in_(list(upload_ids)), UploadRow.status == UploadStatus.PENDING.value
    )
    return set(await session.scalars(query))


def check_pending(upload: Upload) -> None:
    """Refuse to change an upload that ended.

    Raises:
        Conflict: it did.
    """
    if upload.status is not UploadStatus.PENDING:
        raise Conflict(f"Upload {upload.id!r} is {upload.status}: begin another one.")


async def _find(
    session: AsyncSession, upload_id: str, owner: str | None, *, lock: bool
) -> UploadRow:
    query = select(UploadRow).where(UploadRow.id == upload_id)
    if owner is not None:
        query = query.where(UploadRow.key_id == owner)
    query = query.execution_options(populate_existing=True)
    row = await session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFound(f"There is no upload {upload_id!r}.", param="upload_id")
    return row


async def _end(
    session: AsyncSession, upload_id: str, status: UploadStatus, file_id: str | None = None
) -> None:
    await session.execute(
        update(UploadRow)
        .where(UploadRow.id == upload_id)
        .values(status=status.value, file_id=file_id)
    )


def _upload(row: UploadRow, clock: Clock, file: File | None = None) -> Upload:
    status = UploadStatus(row.status)
    if status is UploadStatus.PENDING and row.expires_at <= clock.now():
        status = UploadStatus.EXPIRED
    return Upload(
        id=row.id,
        key_id=row.key_id,
        filename=row.filename,
        purpose=row.purpose,
        bytes=row.bytes,
        status=status,
        created_at=row.created_at,
        expires_at=row.expires_at,
        file_expires_after_s=row.file_expires_after_s,
        file=file,
    )
