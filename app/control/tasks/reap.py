"""Makes replicas forget deleted versions, and collects the files no one can need any more.

What comes in: deleted versions and what each replica says it holds. What goes out: unloads, then
`released_at` on the version, then files gone from the store.

A replica re-reads an adapter's files whenever its cache let go of them, and dies of a missing
one. So a version is released only when every replica of its pool was asked and none lists it, no
request for it runs here, and it has been deleted for long enough that none runs through another
gateway either. A replica that cannot be asked postpones it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import select, update

from app.clock import Clock
from app.control.tasks.fleet_seen import Fleet, LiveReplica
from app.control.tasks.sweep import unneeded
from app.db.blobs import AdapterStore
from app.db.engine import Database
from app.db.tables import AdapterRow, ReplicaRow, VersionRow
from app.domain import ReplicaState
from app.errors import LoragateError
from app.settings import Settings
from app.telemetry import Event, log

logger = logging.getLogger(__name__)

#: Versions looked at in one run.
BATCH = 1000


@dataclass(frozen=True, slots=True)
class Deleted:
    """A deleted version whose files are still kept."""

    id: int
    pool: str
    name: str
    digest: str


class Reap:
    """Reconciles deletions with what replicas hold."""

    def __init__(
        self, db: Database, store: AdapterStore, fleet: Fleet, clock: Clock, settings: Settings
    ) -> None:
        self._db = db
        self._store = store
        self._fleet = fleet
        self._clock = clock
        self._grace_s = settings.reap_grace_s

    async def activate(self) -> dict[str, object]:
        """Unload what is deleted, release what nobody holds, collect what is released."""
        deleted, replicas = await self._load()
        held, unasked = await self._unload(deleted, replicas)
        ripe = await self._ripe(deleted)
        released = [
            version
            for version in deleted
            if version.id in ripe
            and version.pool not in unasked
            and version.name not in held
            and version.digest not in held
            and not self._fleet.inflight(version.name)
        ]
        collected = await self._release(released) if released else 0
        return {
            "deleted": len(deleted),
            "released": len(released),
            "collected": collected,
            "waiting_for_pools": sorted(unasked & {version.pool for version in deleted}),
        }

    async def _load(self) -> tuple[list[Deleted], dict[str, set[str]]]:
        query = (
            select(VersionRow, AdapterRow.name)
            .join(AdapterRow, AdapterRow.id == VersionRow.adapter_id)
            .where(VersionRow.released_at.is_(None), VersionRow.deleted_at.is_not(None))
            .order_by(VersionRow.deleted_at, VersionRow.id)
            .limit(BATCH)
        )
        async with self._db.read() as session:
            deleted = [
                Deleted(row.id, row.pool, f"{name}@{row.number}", row.digest)
                for row, name in await session.execute(query)
            ]
            replicas: dict[str, set[str]] = {}
            for row in await session.scalars(select(ReplicaRow)):
                replicas.setdefault(row.pool, set()).add(row.id)
        return deleted, replicas

    async def _unload(
        self, deleted: Sequence[Deleted], replicas: dict[str, set[str]]
    ) -> tuple[set[str], set[str]]:
        """What is held somewhere (names, and digests by path), and the pools not fully asked."""
        held: set[str] = set()
        unasked: set[str] = set()
        for pool in {version.pool for version in deleted}:
            names = {version.name for version in deleted if version.pool == pool}
            live = {replica.id: replica for replica in self._fleet.live() if replica.pool == pool}
            if replicas.get(pool, set()) - live.keys():
                unasked.add(pool)  # published, but not yet to this fleet
            asked = await asyncio.gather(*(self._ask(r, names) for r in live.values()))
            for answer in asked:
                if answer is None:
                    unasked.add(pool)
                else:
                    held |= answer
        return held, unasked

    async def _ask(self, replica: LiveReplica, names: set[str]) -> set[str] | None:
        """Unload these names where no request needs them; None when it could not be asked."""
        if replica.state is ReplicaState.UNHEALTHY:
            return None
        try:
            loaded = await replica.list_adapters()
            for name in sorted(names & loaded.keys()):
                if not self._fleet.inflight(name):
                    await replica.unload(name)
                    del loaded[name]
        except LoragateError:
            return None
        return loaded.keys() | {path.rstrip("/").rpartition("/")[2] for path in loaded.values()}

    async def _ripe(self, deleted: Sequence[Deleted]) -> set[int]:
        before = self._clock.now() - timedelta(seconds=self._grace_s)
        query = select(VersionRow.id).where(
            VersionRow.id.in_([version.id for version in deleted]), VersionRow.deleted_at <= before
        )
        async with self._db.read() as session:
            return set(await session.scalars(query))

    async def _release(self, released: Sequence[Deleted]) -> int:
        async with self._db.begin() as session:
            await session.execute(
                update(VersionRow)
                .where(VersionRow.id.in_([version.id for version in released]))
                .values(released_at=self._clock.now())
            )
        digests = sorted({version.digest for version in released})
        collected = 0
        for digest in await unneeded(self._db, digests):
            collected += await asyncio.to_thread(
                self._store.discard, digest, older_than_s=self._grace_s
            )
        names = [version.name for version in released]
        log(logger, logging.INFO, Event.ADAPTER_DELETED, versions=names, files=collected)
        return collected
