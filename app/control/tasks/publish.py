"""Carries the registry to the data plane: changed rows -> a new `Snapshot` -> one assignment.

What comes in: rows above the revision seen last. What goes out: a snapshot, given to `Snapshots`
and to the fleet. A run that finds the revision unchanged costs one query, so it is cheap to run
often: this is how a gateway learns of what another one committed.
"""

from __future__ import annotations

import gc
import ipaddress
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from sys import intern
from typing import Any

from sqlalchemy import Row, Text, cast, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.control.keys import digest, principal_of
from app.control.pools import base_of, pool_of, replica_of
from app.control.tasks.fleet_seen import Fleet
from app.control.views import as_targets
from app.db.engine import Database
from app.db.tables import (
    AdapterRow,
    AliasRow,
    BaseModelRow,
    KeyRow,
    PoolRow,
    ReplicaRow,
    RevisionRow,
    VersionRow,
)
from app.domain import Adapter, AdapterVersion, Alias, Principal, Scope, Sticky
from app.serving.snapshot import Snapshot, Snapshots
from app.settings import Settings

#: Bound values in one statement; both drivers allow far more.
_BATCH = 500
#: Rows fetched at a time when everything is read.
_STREAM = 5000

ADMIN_KEY_ID = "admin-key"
ANONYMOUS_ID = "anonymous"


class Publish:
    """Remembers the last snapshot, so that a change costs what changed."""

    def __init__(
        self, db: Database, snapshots: Snapshots, fleet: Fleet, settings: Settings
    ) -> None:
        self._db = db
        self._snapshots = snapshots
        self._fleet = fleet
        self._admin = _admin_keys(settings)
        self._may_be_anonymous = is_loopback(settings.host) and not self._admin
        self._seen: Snapshot | None = None

    async def activate(self) -> dict[str, object]:
        """Serve the registry as it is now."""
        async with self._db.read() as session:
            revision = (await session.scalars(select(RevisionRow.value))).one()
            if self._seen is not None and self._seen.number == revision:
                return _details(self._seen)
            snapshot = await self._build(session, self._seen, revision)
        self._seen = snapshot
        self._snapshots.publish(snapshot)
        await self._fleet.sync(snapshot)
        return _details(snapshot)

    async def _build(
        self, session: AsyncSession, before: Snapshot | None, revision: int
    ) -> Snapshot:
        # A database restored from a backup goes back in time: what was seen means nothing then.
        if before is not None and before.number > revision:
            before = None
        bases = {row.name: base_of(row) for row in await session.scalars(select(BaseModelRow))}
        pools = {row.name: pool_of(row) for row in await session.scalars(select(PoolRow))}
        replicas = {
            row.id: replica_of(row, pools[row.pool].dialect)
            for row in await session.scalars(select(ReplicaRow))
        }
        base_pools = {pool.base_model: pool.name for pool in pools.values()}
        keys = await _keys(session, before)
        anonymous = self._may_be_anonymous and not await _any_key(session)
        return Snapshot(
            number=revision,
            bases={name: base for name, base in bases.items() if name in base_pools},
            pools=pools,
            base_pools=base_pools,
            replicas=replicas,
            adapters=await _adapters(session, before),
            keys=keys | self._admin,
            anonymous=_everything(ANONYMOUS_ID) if anonymous else None,
        )


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


async def _keys(session: AsyncSession, before: Snapshot | None) -> dict[bytes, Principal]:
    keys = dict(before.keys) if before is not None else {}
    query = select(KeyRow)
    if before is not None:
        query = query.where(KeyRow.revision > before.number)
    for row in await session.scalars(query):
        if row.revoked_at is None:
            keys[bytes.fromhex(row.digest)] = principal_of(row)
        else:
            keys.pop(bytes.fromhex(row.digest), None)
    return keys


async def _any_key(session: AsyncSession) -> bool:
    return await session.scalar(select(KeyRow.id).limit(1)) is not None


async def _adapters(session: AsyncSession, before: Snapshot | None) -> dict[str, Adapter]:
    if before is None:
        live = select(*_ADAPTER).where(AdapterRow.deleted_at.is_(None))
        with _no_collection():
            return await _assembled(session, (await session.execute(live)).all(), None)
    changed = select(*_ADAPTER).where(AdapterRow.revision > before.number)
    rows = (await session.execute(changed)).all()
    adapters = dict(before.adapters)
    for row in rows:
        if row.deleted_at is not None:
            adapters.pop(row.name, None)
    live_rows = [row for row in rows if row.deleted_at is None]
    for at in range(0, len(live_rows), _BATCH):
        batch = live_rows[at : at + _BATCH]
        adapters |= await _assembled(session, batch, [row.id for row in batch])
    return adapters


async def _assembled(
    session: AsyncSession, rows: Sequence[Row[*tuple[Any, ...]]], ids: list[int] | None
) -> dict[str, Adapter]:
    """The adapters of these rows, with the versions and aliases of `ids` (None: of all)."""
    owners = {row.id: row for row in rows}
    versions = await _versions(session, owners, ids)
    aliases = await _aliases(session, owners, ids)
    return {
        row.name: Adapter(
            name=row.name,
            base_model=intern(row.base_model),
            pool=intern(row.pool),
            created_at=row.created_at,
            versions=versions.get(row.id, {}),
            aliases=aliases.get(row.id, {}),
        )
        for row in rows
    }


async def _versions(
    session: AsyncSession, owners: Mapping[int, Row[*tuple[Any, ...]]], ids: list[int] | None
) -> dict[int, dict[int, AdapterVersion]]:
    query = (
        select(
            VersionRow.adapter_id,
            VersionRow.number,
            VersionRow.digest,
            VersionRow.rank,
            VersionRow.base_model,
            VersionRow.targets_lm_head,
            VersionRow.probe.is_not(None),
        )
        .where(VersionRow.deleted_at.is_(None))
        .order_by(VersionRow.adapter_id, VersionRow.number)
    )
    if ids is not None:
        query = query.where(VersionRow.adapter_id.in_(ids))
    found: dict[int, dict[int, AdapterVersion]] = {}
    # Streamed: the driver's copy of 100,000 rows must not stand beside ours.
    stream = await session.stream(query, execution_options={"yield_per": _STREAM})
    async for part in stream.partitions():
        for owner, number, digest_, rank, base_model, targets_lm_head, probed in part:
            if (adapter := owners.get(owner)) is not None:
                found.setdefault(owner, {})[number] = AdapterVersion(
                    adapter.name,
                    number,
                    digest_,
                    rank,
                    intern(base_model),
                    targets_lm_head,
                    probed,
                )
    return found


async def _aliases(
    session: AsyncSession, owners: Mapping[int, Row[*tuple[Any, ...]]], ids: list[int] | None
) -> dict[int, dict[str, Alias]]:
    # The JSON as text: most aliases are like another one, and are parsed and kept once.
    query = select(
        AliasRow.adapter_id, AliasRow.name, cast(AliasRow.targets, Text), AliasRow.sticky
    )
    if ids is not None:
        query = query.where(AliasRow.adapter_id.in_(ids))
    found: dict[int, dict[str, Alias]] = {}
    same: dict[tuple[str, str, str], Alias] = {}
    stream = await session.stream(query, execution_options={"yield_per": _STREAM})
    async for part in stream.partitions():
        for owner, name, targets, sticky in part:
            if owner not in owners:
                continue
            alias = same.get((name, targets, sticky))
            if alias is None:
                alias = Alias(name, as_targets(json.loads(targets)), Sticky(sticky))
                same[(name, targets, sticky)] = alias
            found.setdefault(owner, {})[alias.name] = alias
    return found


@contextmanager
def _no_collection() -> Iterator[None]:
    """Hold the garbage collector while a million objects are made, all of them to stay.

    It would go through them again and again: half of the time of a start.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_ADAPTER = (
    AdapterRow.id,
    AdapterRow.name,
    AdapterRow.base_model,
    AdapterRow.pool,
    AdapterRow.created_at,
    AdapterRow.deleted_at,
)


def _admin_keys(settings: Settings) -> dict[bytes, Principal]:
    """The configured admin secret, as a key that is not in the registry."""
    if settings.admin_key is None:
        return {}
    return {digest(settings.admin_key.get_secret_value()): _everything(ADMIN_KEY_ID)}


def _everything(key_id: str) -> Principal:
    return Principal(key_id=key_id, name=key_id, scopes=frozenset(Scope))


def _details(snapshot: Snapshot) -> dict[str, object]:
    return {
        "revision": snapshot.number,
        "adapters": len(snapshot.adapters),
        "replicas": len(snapshot.replicas),
        "keys": len(snapshot.keys),
    }
