"""The verbs on adapters, their versions and aliases.

What comes in: a session of an open transaction and plain values. What goes out: frozen views.
A verb changes rows and never commits, reads no file and calls no server: the weights were checked
and stored before (`intake`), and whoever opened the transaction wakes `publish` after it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete as sql_delete
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.control import adapter_rows as rows
from app.control import probes
from app.control.aliases import check_alias, delete_alias, move, rollback, set_alias
from app.control.inspect_adapter import AdapterFacts
from app.control.views import (
    AdapterView,
    Page,
    Registered,
    VersionView,
    adapter_views,
    as_targets,
    version_view,
)
from app.db.engine import touch
from app.db.tables import AdapterRow, AliasMoveRow, AliasRow, BaseModelRow, PoolRow, VersionRow
from app.domain import ADAPTER_NAME, ADAPTER_NAME_MAX, LATEST, Probe
from app.errors import Conflict, InvalidRequest, NotFound

__all__ = [
    "base_of",
    "check_alias",
    "check_existence",
    "check_metadata",
    "check_name",
    "delete",
    "delete_alias",
    "delete_version",
    "list_",
    "register",
    "rollback",
    "set_alias",
    "show",
    "show_version",
]

MAX_PAGE = 1000
MAX_METADATA_BYTES = 16 << 10


async def register(
    session: AsyncSession,
    clock: Clock,
    *,
    name: str,
    base_model: str,
    digest: str,
    facts: AdapterFacts,
    source: str,
    alias: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    probe: Probe | None = None,
    create: bool | None = None,
    move_aliases: bool = True,
    move_latest: bool = True,
) -> Registered:
    """Add checked, stored weights as the next version of `name`, and move `latest` to it.

    Without `move_aliases`, `latest` and `alias` stay where they are if they are somewhere, and the
    answer is `pending`: `release` moves them. Without `move_latest`, only `alias` moves: what is
    asked for by the bare name does not change, and of a new adapter nothing is.

    `create`: True wants a new adapter (else Conflict), False an existing one (else NotFound),
    None takes either. The same weights as the newest version answer that version, unchanged but
    for a `probe` that comes with them; `alias` is set to the version in both cases. `metadata`
    goes to the adapter when it is made, to the version otherwise.
    """
    check_name(name)
    check_metadata(metadata)
    pool = await _pool_of(session, base_model)
    row = await rows.find(session, name, lock=True)
    check_existence(name, row is not None, create)
    made = row is None
    if row is None:
        row = await _make(session, clock, name, base_model, pool, metadata or {})
    if row is None:  # someone else made it at the same moment
        made, row = False, await rows.get(session, name, lock=True)
        check_existence(name, True, create)
    if row.base_model != base_model:
        raise Conflict(
            f"Adapter {name!r} is for base {row.base_model!r}, not {base_model!r}: "
            "register these weights under another name.",
            param="base_model",
        )
    version = await rows.newest(session, row)
    created = version is None or version.digest != digest
    if version is None or created:
        row.last_number += 1
        version = VersionRow(
            adapter_id=row.id,
            number=row.last_number,
            base_model=base_model,
            pool=pool,
            digest=digest,
            rank=facts.rank,
            target_modules=list(facts.target_modules),
            bytes=facts.bytes,
            source=source[:2048],
            details={} if made else dict(metadata or {}),
            created_at=clock.now(),
            targets_lm_head=facts.targets_lm_head,
            held_back=not (made and move_latest),
        )
        session.add(version)
    if alias is not None:
        check_alias(alias)
    released = move_latest and (made or (version.held_back and move_aliases))
    if released:
        version.held_back = False
        await move(session, clock, row, LATEST, ((version.number, 1),))
    pending = version.held_back and not move_aliases
    if alias is not None and alias != LATEST and not pending:
        await move(session, clock, row, alias, ((version.number, 1),))
    if probe is not None:
        version.probe = probes.stored(probe)
    if created or released or alias is not None or probe is not None:
        await touch(session, row)
    probed = await rows.is_probed(session, version)
    view = await rows.view(session, row)
    return Registered(view, version_view(name, version, probed), created, pending)


async def release(
    session: AsyncSession, clock: Clock, *, name: str, number: int, alias: str | None
) -> AdapterView:
    """Move `latest`, and `alias`, to a registered version; not back from a newer one."""
    row = await rows.get(session, name, lock=True)
    version = await rows.get_version(session, row, number)
    newest = await rows.newest(session, row)
    if newest is not None and newest.number == version.number and version.held_back:
        version.held_back = False
        await move(session, clock, row, LATEST, ((number, 1),))
    if alias is not None and alias != LATEST:
        await move(session, clock, row, alias, ((number, 1),))
    await touch(session, row)
    return await rows.view(session, row)


async def list_(
    session: AsyncSession,
    *,
    limit: int = 100,
    after: str | None = None,
    base_model: str | None = None,
    prefix: str | None = None,
) -> Page[AdapterView]:
    """A page of adapters by name, from the first name after `after`."""
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"limit must be 1 to {MAX_PAGE}, not {limit}.", param="limit")
    query = select(AdapterRow).where(AdapterRow.deleted_at.is_(None))
    if after is not None:
        query = query.where(AdapterRow.name > after)
    if base_model is not None:
        query = query.where(AdapterRow.base_model == base_model)
    if prefix:
        # Not LIKE: SQLite's ignores case.
        query = query.where(func.substr(AdapterRow.name, 1, len(prefix)) == prefix)
    found = (await session.scalars(query.order_by(AdapterRow.name).limit(limit + 1))).all()
    page = found[:limit]
    views = await adapter_views(session, page)
    return Page(tuple(views), page[-1].name if len(found) > limit else None)


async def show(session: AsyncSession, name: str) -> AdapterView:
    """One adapter, or NotFound."""
    return await rows.view(session, await rows.get(session, name))


async def show_version(session: AsyncSession, name: str, number: int) -> VersionView:
    """One live version, or NotFound."""
    version = await rows.get_version(session, await rows.get(session, name), number)
    return version_view(name, version, await rows.is_probed(session, version))


async def delete(session: AsyncSession, clock: Clock, name: str) -> None:
    """Delete an adapter with every version and alias. Its numbers are never given again."""
    row = await rows.get(session, name, lock=True)
    now = clock.now()
    row.deleted_at = now
    await session.execute(
        update(VersionRow)
        .where(VersionRow.adapter_id == row.id, VersionRow.deleted_at.is_(None))
        .values(deleted_at=now, probe=None)
    )
    for table in (AliasMoveRow, AliasRow):
        await session.execute(sql_delete(table).where(table.adapter_id == row.id))
    await touch(session, row)


async def delete_version(
    session: AsyncSession, clock: Clock, *, adapter: str, number: int
) -> AdapterView:
    """Delete a version no alias but `latest` points at; `latest` moves to the newest left."""
    row = await rows.get(session, adapter, lock=True)
    version = await rows.get_version(session, row, number)
    aliases = await session.scalars(select(AliasRow).where(AliasRow.adapter_id == row.id))
    holders = {a.name: a for a in aliases if number in dict(as_targets(a.targets))}
    latest = holders.pop(LATEST, None)
    if holders:
        raise Conflict(
            f"{adapter}@{number} is what {_quoted(holders)} points at: move it first.",
            param="number",
        )
    version.deleted_at, version.probe = clock.now(), None
    await session.flush()
    newest = await rows.newest(session, row)
    if newest is None:
        raise Conflict(
            f"{adapter}@{number} is the only version: delete the adapter instead.", param="number"
        )
    if latest is not None:
        newest.held_back = False
        latest.targets = [[newest.number, 1]]
    await touch(session, row)
    return await rows.view(session, row)


async def base_of(session: AsyncSession, name: str) -> str | None:
    """The base model of a live adapter, or None when there is none of this name."""
    row = await rows.find(session, name)
    return None if row is None else row.base_model


def check_existence(name: str, found: bool, create: bool | None) -> None:
    """Refuse to create what exists and to extend what does not."""
    if create and found:
        raise Conflict(
            f"Adapter {name!r} exists: add a version to it, or choose another name.", param="name"
        )
    if create is False and not found:
        raise NotFound(f"There is no adapter {name!r}.", param="name")


def check_name(name: str) -> None:
    """Refuse a name that could not be told apart from `name@3` or `name:alias` in a request."""
    if len(name) > ADAPTER_NAME_MAX or not ADAPTER_NAME.fullmatch(name):
        raise InvalidRequest(
            f"An adapter's name is 1 to {ADAPTER_NAME_MAX} letters, digits, '.', '_' or '-', "
            f"and starts with a letter or digit, or is a fine-tune job's "
            f"(ft:base:suffix:id); got {name[:200]!r}.",
            param="name",
        )


def check_metadata(metadata: Mapping[str, Any] | None) -> None:
    try:
        size = len(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidRequest("metadata must be a JSON object.", param="metadata") from exc
    if size > MAX_METADATA_BYTES:
        raise InvalidRequest(
            f"metadata is {size} bytes; {MAX_METADATA_BYTES} are allowed.", param="metadata"
        )


async def _pool_of(session: AsyncSession, base_model: str) -> str:
    # Shared with other registrations, exclusive with the pool's deletion, which counts adapters.
    pool = await session.scalar(
        select(PoolRow.name).where(PoolRow.base_model == base_model).with_for_update(read=True)
    )
    if pool is None:
        raise NotFound(f"No pool serves the base model {base_model!r}.", param="base_model")
    return pool


async def _make(
    session: AsyncSession,
    clock: Clock,
    name: str,
    base_model: str,
    pool: str,
    metadata: Mapping[str, Any],
) -> AdapterRow | None:
    """The row of a new adapter, or None when another transaction made it first."""
    if await session.get(BaseModelRow, name) is not None:
        raise Conflict(f"{name!r} is a base model's name.", param="name")
    row = await session.scalar(select(AdapterRow).where(AdapterRow.name == name).with_for_update())
    if row is None:
        row = AdapterRow(name=name, last_number=0, revision=0)
    elif row.deleted_at is None:
        return None
    # A deleted one comes back and keeps counting.
    row.base_model, row.pool = base_model, pool
    row.details, row.created_at, row.deleted_at = dict(metadata), clock.now(), None
    try:
        async with session.begin_nested():
            session.add(row)
            await session.flush()
    except IntegrityError:
        return None
    return row


def _quoted(names: Mapping[str, object]) -> str:
    return ", ".join(f"{name!r}" for name in sorted(names))
