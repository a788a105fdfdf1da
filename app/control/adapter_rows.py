"""Finding the rows of one adapter, for the verbs on adapters and on aliases.

What comes in: a session and a name. What goes out: rows that stay in the transaction, locked where
a verb is about to change them, so that two verbs on one adapter take turns.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.control.views import AdapterView, adapter_views
from app.db.tables import AdapterRow, VersionRow
from app.errors import NotFound


async def find(session: AsyncSession, name: str, *, lock: bool = False) -> AdapterRow | None:
    query = select(AdapterRow).where(AdapterRow.name == name, AdapterRow.deleted_at.is_(None))
    return await session.scalar(query.with_for_update() if lock else query)


async def get(session: AsyncSession, name: str, *, lock: bool = False) -> AdapterRow:
    row = await find(session, name, lock=lock)
    if row is None:
        raise NotFound(f"There is no adapter {name!r}.", param="name")
    return row


def live(row: AdapterRow, *columns: Any) -> Any:
    return select(*columns).where(VersionRow.adapter_id == row.id, VersionRow.deleted_at.is_(None))


async def newest(session: AsyncSession, row: AdapterRow) -> VersionRow | None:
    query = live(row, VersionRow).order_by(VersionRow.number.desc()).limit(1)
    found: VersionRow | None = await session.scalar(query)
    return found


async def get_version(session: AsyncSession, row: AdapterRow, number: int) -> VersionRow:
    found: VersionRow | None = await session.scalar(
        live(row, VersionRow).where(VersionRow.number == number)
    )
    if found is None:
        raise NotFound(f"Adapter {row.name!r} has no version {number}.", param="version")
    return found


async def is_probed(session: AsyncSession, version: VersionRow) -> bool:
    """Whether the version has a probe, without reading it."""
    found = await session.scalar(
        select(VersionRow.probe.is_not(None)).where(VersionRow.id == version.id)
    )
    return bool(found)


async def view(session: AsyncSession, row: AdapterRow) -> AdapterView:
    return (await adapter_views(session, [row]))[0]
