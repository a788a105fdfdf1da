"""The verbs on base models, pools and replicas.

What comes in: a session and plain values. What goes out: frozen views. Whether a replica answers
is not known here: that is `serving.fleet`, which is told of these rows by `tasks.publish`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.db.engine import touch
from app.db.tables import AdapterRow, BaseModelRow, PoolRow, ReplicaRow
from app.domain import ADAPTER_NAME_MAX, POOL_NAME, BaseModel, Dialect, Pool, Replica
from app.errors import Conflict, InvalidRequest, NotFound

BASE_NAME_MAX = 256
MAX_RANK = 1024
MAX_LORAS = 100_000
MAX_INFLIGHT = 100_000
MAX_QUEUE = 1_000_000


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica as declared; the admin API adds what the fleet sees of it."""

    replica: Replica
    declared: bool
    created_at: datetime


@dataclass(frozen=True, slots=True)
class PoolView:
    """A pool, its base and its replicas. `declared`: it comes from the settings."""

    pool: Pool
    base: BaseModel
    replicas: tuple[ReplicaView, ...]
    declared: bool
    created_at: datetime


async def put_base(session: AsyncSession, base: BaseModel) -> None:
    """Add a base model, or replace what is known of it."""
    if not 1 <= len(base.name) <= BASE_NAME_MAX or not base.name.isprintable():
        raise InvalidRequest(
            f"A base model's name is 1 to {BASE_NAME_MAX} printable characters.", param="base_model"
        )
    row = await session.get(BaseModelRow, base.name)
    config = None if base.config is None else dict(base.config)
    if row is None:
        taken = select(AdapterRow.id).where(
            AdapterRow.name == base.name, AdapterRow.deleted_at.is_(None)
        )
        if await session.scalar(taken) is not None:
            raise Conflict(f"{base.name!r} is an adapter's name.", param="base_model")
        session.add(BaseModelRow(name=base.name, config=config, aliases=list(base.aliases)))
    elif (row.config, row.aliases) == (config, list(base.aliases)):
        return
    else:
        row.config, row.aliases = config, list(base.aliases)
    await touch(session)


async def create(
    session: AsyncSession,
    clock: Clock,
    *,
    name: str,
    base: BaseModel,
    served_name: str | None = None,
    max_lora_rank: int = 64,
    max_loras: int = 8,
    store_mount: str | None = None,
    max_cpu_loras: int | None = None,
    max_inflight: int = 256,
    max_queue: int = 1024,
    dialect: str = Dialect.VLLM,
    declared: bool = False,
) -> PoolView:
    """Add a pool for `base`. A base has one pool, so Conflict when it has one already."""
    if len(name) > ADAPTER_NAME_MAX or not POOL_NAME.fullmatch(name):
        raise InvalidRequest(
            f"A pool's name is 1 to {ADAPTER_NAME_MAX} letters, digits, '.', '_' or '-', "
            "and starts with a letter or digit.",
            param="name",
        )
    if await session.get(PoolRow, name) is not None:
        raise Conflict(f"Pool {name!r} exists.", param="name")
    other = await session.scalar(select(PoolRow.name).where(PoolRow.base_model == base.name))
    if other is not None:
        raise Conflict(
            f"Pool {other!r} serves {base.name!r}: add replicas to it instead.", param="base_model"
        )
    await put_base(session, base)
    row = PoolRow(
        name=name,
        base_model=base.name,
        served_name=_checked_served_name(served_name or base.name),
        max_lora_rank=_within("max_lora_rank", max_lora_rank, MAX_RANK),
        max_loras=_within("max_loras", max_loras, MAX_LORAS),
        store_mount=_checked_mount(store_mount),
        max_cpu_loras=_checked_cpu_loras(max_cpu_loras),
        max_inflight=_within("max_inflight", max_inflight, MAX_INFLIGHT),
        max_queue=_within("max_queue", max_queue, MAX_QUEUE, least=0),
        dialect=_checked_dialect(dialect),
        declared=declared,
        created_at=clock.now(),
    )
    _check_slots(row)
    session.add(row)
    await touch(session)
    return await _view(session, row)


async def update(session: AsyncSession, name: str, **changes: Any) -> PoolView:
    """Change what a pool accepts, field by field; its name and its base stay.

    A lower `max_lora_rank` does not look back at adapters registered under the higher one.
    """
    row = await _get(session, name)
    checks: dict[str, Callable[[Any], Any]] = {
        "served_name": _checked_served_name,
        "max_lora_rank": lambda value: _within("max_lora_rank", value, MAX_RANK),
        "max_loras": lambda value: _within("max_loras", value, MAX_LORAS),
        "store_mount": _checked_mount,
        "max_cpu_loras": _checked_cpu_loras,
        "max_inflight": lambda value: _within("max_inflight", value, MAX_INFLIGHT),
        "max_queue": lambda value: _within("max_queue", value, MAX_QUEUE, least=0),
        "dialect": _checked_dialect,
    }
    for field, value in changes.items():
        if field not in checks:
            raise InvalidRequest(f"A pool's {field} cannot be changed.", param=field)
        setattr(row, field, checks[field](value))
    _check_slots(row)
    await touch(session)
    return await _view(session, row)


async def delete(session: AsyncSession, name: str) -> None:
    """Remove a pool and its replicas, once no adapter needs it."""
    await session.execute(select(PoolRow.name).where(PoolRow.name == name).with_for_update())
    row = await _get(session, name)
    adapters = await session.scalar(
        select(func.count()).where(AdapterRow.pool == name, AdapterRow.deleted_at.is_(None))
    )
    if adapters:
        raise Conflict(f"Pool {name!r} serves {adapters} adapters: delete them first.")
    for replica in await session.scalars(select(ReplicaRow).where(ReplicaRow.pool == name)):
        await session.delete(replica)
    await session.flush()
    await session.delete(row)
    await touch(session)


async def list_(session: AsyncSession) -> list[PoolView]:
    """Every pool, by name."""
    rows = await session.scalars(select(PoolRow).order_by(PoolRow.name))
    return [await _view(session, row) for row in rows.all()]


async def show(session: AsyncSession, name: str) -> PoolView:
    """One pool, or NotFound."""
    return await _view(session, await _get(session, name))


async def add_replica(
    session: AsyncSession,
    clock: Clock,
    *,
    pool: str,
    url: str,
    api_key: str | None = None,
    declared: bool = False,
) -> ReplicaView:
    """Add a server to a pool by its base URL. Its id follows from pool and URL."""
    owner = await _get(session, pool)
    url = checked_url(url)
    if await session.get(ReplicaRow, replica_id(pool, url)) is not None:
        raise Conflict(f"Pool {pool!r} has the replica {url}.", param="url")
    row = ReplicaRow(
        id=replica_id(pool, url),
        pool=pool,
        url=url,
        api_key=api_key,
        cordoned=False,
        draining=False,
        declared=declared,
        created_at=clock.now(),
    )
    session.add(row)
    await touch(session)
    return _replica_view(row, owner)


async def update_replica(
    session: AsyncSession,
    replica_id: str,
    *,
    cordoned: bool | None = None,
    draining: bool | None = None,
) -> ReplicaView:
    """Cordon (no new requests for now) or drain (none ever again) a replica, or undo that."""
    row = await _get_replica(session, replica_id)
    row.cordoned = row.cordoned if cordoned is None else cordoned
    row.draining = row.draining if draining is None else draining
    await touch(session)
    return _replica_view(row, await _get(session, row.pool))


async def remove_replica(session: AsyncSession, replica_id: str, *, force: bool = False) -> None:
    """Forget a replica that is draining; with `force`, one that is not as well."""
    row = await _get_replica(session, replica_id)
    if not (row.draining or force):
        raise Conflict(f"Replica {replica_id!r} is not draining: drain it first, or force.")
    await session.delete(row)
    await touch(session)


async def show_replica(session: AsyncSession, replica_id: str) -> ReplicaView:
    """One replica, or NotFound."""
    row = await _get_replica(session, replica_id)
    return _replica_view(row, await _get(session, row.pool))


async def list_replicas(session: AsyncSession, pool: str | None = None) -> list[ReplicaView]:
    """Every replica, or those of one pool, by id."""
    query = (
        select(ReplicaRow, PoolRow)
        .join(PoolRow, PoolRow.name == ReplicaRow.pool)
        .order_by(ReplicaRow.id)
    )
    if pool is not None:
        await _get(session, pool)
        query = query.where(ReplicaRow.pool == pool)
    return [_replica_view(row, owner) for row, owner in await session.execute(query)]


def replica_id(pool: str, url: str) -> str:
    """The same server of the same pool has the same id on every gateway and after a restart."""
    return f"{pool}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def checked_url(url: str) -> str:
    """`http(s)://host[:port]`, normalised; without user, path, query or fragment."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError as exc:
        raise InvalidRequest(f"{url!r} is not a URL.", param="url") from exc
    bare = parts.path in ("", "/") and not parts.query and not parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or not bare or parts.username:
        raise InvalidRequest(
            f"A replica's URL is http://host:port, without a path; got {url!r}.", param="url"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "")


def pool_of(row: PoolRow) -> Pool:
    return Pool(
        name=row.name,
        base_model=row.base_model,
        served_name=row.served_name,
        max_lora_rank=row.max_lora_rank,
        max_loras=row.max_loras,
        store_mount=row.store_mount,
        max_cpu_loras=row.max_cpu_loras,
        max_inflight=row.max_inflight,
        max_queue=row.max_queue,
        dialect=Dialect(row.dialect),
    )


def base_of(row: BaseModelRow) -> BaseModel:
    return BaseModel(row.name, row.config, tuple(row.aliases))


def replica_of(row: ReplicaRow, dialect: Dialect) -> Replica:
    return Replica(
        id=row.id,
        pool=row.pool,
        url=row.url,
        cordoned=row.cordoned,
        draining=row.draining,
        api_key=row.api_key,
        dialect=dialect,
    )


async def _get(session: AsyncSession, name: str) -> PoolRow:
    row = await session.get(PoolRow, name)
    if row is None:
        raise NotFound(f"There is no pool {name!r}.", param="pool")
    return row


async def _get_replica(session: AsyncSession, replica_id: str) -> ReplicaRow:
    row = await session.get(ReplicaRow, replica_id)
    if row is None:
        raise NotFound(f"There is no replica {replica_id!r}.", param="replica")
    return row


async def _view(session: AsyncSession, row: PoolRow) -> PoolView:
    base = await session.get_one(BaseModelRow, row.base_model)
    replicas = await session.scalars(
        select(ReplicaRow).where(ReplicaRow.pool == row.name).order_by(ReplicaRow.id)
    )
    return PoolView(
        pool=pool_of(row),
        base=base_of(base),
        replicas=tuple(_replica_view(replica, row) for replica in replicas),
        declared=row.declared,
        created_at=row.created_at,
    )


def _replica_view(row: ReplicaRow, pool: PoolRow) -> ReplicaView:
    return ReplicaView(replica_of(row, Dialect(pool.dialect)), row.declared, row.created_at)


def _within(field: str, value: int, most: int, *, least: int = 1) -> int:
    if not least <= value <= most:
        raise InvalidRequest(f"{field} is {least} to {most}, not {value}.", param=field)
    return value


def _checked_cpu_loras(value: int | None) -> int | None:
    return None if value is None else _within("max_cpu_loras", value, MAX_LORAS)


def _check_slots(row: PoolRow) -> None:
    """vLLM does not start with fewer adapters in memory than in one step."""
    if row.max_cpu_loras is not None and row.max_cpu_loras < row.max_loras:
        raise InvalidRequest(
            f"max_cpu_loras is at least max_loras, {row.max_loras}, not {row.max_cpu_loras}; "
            "leave it out to keep as many in memory as in one step.",
            param="max_cpu_loras",
        )


def _checked_served_name(value: str) -> str:
    if not 1 <= len(value) <= BASE_NAME_MAX or not value.isprintable():
        raise InvalidRequest(
            f"served_name is 1 to {BASE_NAME_MAX} printable characters.", param="served_name"
        )
    return value


def _checked_dialect(value: str) -> str:
    try:
        return Dialect(value).value
    except ValueError as exc:
        allowed = " or ".join(Dialect)
        raise InvalidRequest(f"A pool's dialect is {allowed}.", param="dialect") from exc


def _checked_mount(value: str | None) -> str | None:
    if value is not None and (not value.startswith("/") or len(value) > 1024):
        raise InvalidRequest("store_mount is an absolute path.", param="store_mount")
    return value
