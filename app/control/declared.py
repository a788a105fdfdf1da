"""Pools declared in the settings, made true in the registry at startup.

What comes in: `PoolSettings`. What goes out: the same pool and replicas as rows. Idempotent, and
careful with what is not declared: a pool or replica added over the API is left alone, and a
declared pool that went from the settings keeps its adapters and loses its replicas. Settings
that declare no pool at all change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock, SystemClock
from app.control import pools
from app.db.engine import take_turns, touch
from app.db.tables import PoolRow, ReplicaRow
from app.domain import BaseModel
from app.errors import ConfigurationError, RequestError
from app.settings import PoolSettings, Settings

MAX_CONFIG_BYTES = 1 << 20


async def sync_declared(
    session: AsyncSession, settings: Settings, clock: Clock | None = None
) -> None:
    """Make the registry's declared pools the ones of the settings."""
    names = [pool.name for pool in settings.pools]
    if len(set(names)) != len(names):
        raise ConfigurationError("LORAGATE_POOLS names a pool twice.")
    if not names:  # a gateway started by hand beside the others must not undo what they declared
        return
    await take_turns(session)
    for pool in settings.pools:
        await declare(session, clock or SystemClock(), pool)
    gone = select(ReplicaRow).where(ReplicaRow.declared, ReplicaRow.pool.not_in(names))
    for row in await session.scalars(gone):
        await session.delete(row)
        await touch(session)
    await session.flush()


async def declare(session: AsyncSession, clock: Clock, wanted: PoolSettings) -> None:
    """Make one pool and its declared replicas as these settings say."""
    try:
        await _declare_pool(session, clock, wanted)
        await _declare_replicas(session, clock, wanted)
    except RequestError as exc:
        raise ConfigurationError(f"Pool {wanted.name!r} in the settings: {exc}") from exc


async def _declare_pool(session: AsyncSession, clock: Clock, wanted: PoolSettings) -> None:
    base = BaseModel(
        name=wanted.base_model,
        config=read_config(wanted.base_model_path),
        aliases=_aliases(wanted),
    )
    fields: dict[str, Any] = {
        "served_name": wanted.served_name or wanted.base_model,
        "max_lora_rank": wanted.max_lora_rank,
        "max_loras": wanted.max_loras,
        "store_mount": wanted.store_mount,
        "max_cpu_loras": wanted.max_cpu_loras,
        "max_inflight": wanted.max_inflight,
        "max_queue": wanted.max_queue,
        "dialect": wanted.dialect,
    }
    row = await session.get(PoolRow, wanted.name)
    if row is None:
        await pools.create(session, clock, name=wanted.name, base=base, declared=True, **fields)
        return
    if row.base_model != wanted.base_model:
        raise ConfigurationError(
            f"Pool {wanted.name!r} serves {row.base_model!r} in the registry and "
            f"{wanted.base_model!r} in the settings: give the new base another pool name."
        )
    await pools.put_base(session, base)
    if any(getattr(row, field) != value for field, value in fields.items()):
        await pools.update(session, wanted.name, **fields)


async def _declare_replicas(session: AsyncSession, clock: Clock, wanted: PoolSettings) -> None:
    api_key = None if wanted.api_key is None else wanted.api_key.get_secret_value()
    urls = {pools.checked_url(url) for url in wanted.replicas}
    rows = await session.scalars(select(ReplicaRow).where(ReplicaRow.pool == wanted.name))
    for row in rows:
        if row.url in urls:
            urls.discard(row.url)
            if (row.api_key, row.declared) != (api_key, True):
                row.api_key, row.declared = api_key, True
                await touch(session)
        elif row.declared:
            await session.delete(row)
            await touch(session)
    await session.flush()
    for url in sorted(urls):
        await pools.add_replica(
            session, clock, pool=wanted.name, url=url, api_key=api_key, declared=True
        )


def read_config(folder: Path | None) -> Mapping[str, Any] | None:
    """The config.json of a base model's folder."""
    if folder is None:
        return None
    path = folder / "config.json"
    try:
        content = path.read_bytes()
        config = json.loads(content) if len(content) <= MAX_CONFIG_BYTES else None
    except (OSError, ValueError) as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path} is not a model's config.json.")
    return config


def _aliases(wanted: PoolSettings) -> tuple[str, ...]:
    """Also the folder itself: adapters trained from it name it in their config."""
    folder = () if wanted.base_model_path is None else (str(wanted.base_model_path),)
    served = () if wanted.served_name is None else (wanted.served_name,)
    return tuple(dict.fromkeys((*wanted.base_model_aliases, *served, *folder)))
