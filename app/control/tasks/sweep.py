"""Collects files that no row knows: what a crash left between the store and the registry.

What comes in: the store's digests and staging folders. What goes out: their removal, once they
are old enough that no registration under way can still need them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from sqlalchemy import select

from app.db.blobs import AdapterStore
from app.db.engine import Database
from app.db.tables import VersionRow
from app.telemetry import Event, log

logger = logging.getLogger(__name__)

#: Longer than any registration takes.
YOUNG_S = 3600.0
#: Seldom: it lists the whole store, and an orphan costs nothing but its room.
PERIOD_S = 600.0
_BATCH = 500


class Sweep:
    """Compares the store with the registry."""

    def __init__(self, db: Database, store: AdapterStore, older_than_s: float = YOUNG_S) -> None:
        self._db = db
        self._store = store
        self._older_than_s = older_than_s

    async def activate(self) -> dict[str, object]:
        """Remove orphans."""
        staging = await asyncio.to_thread(self._store.sweep_staging, self._older_than_s)
        digests = await asyncio.to_thread(lambda: list(self._store.digests()))
        orphans = 0
        for digest in await unneeded(self._db, digests):
            orphans += await asyncio.to_thread(
                self._store.discard, digest, older_than_s=self._older_than_s
            )
        if staging or orphans:
            log(logger, logging.INFO, Event.STORE_SWEPT, staging=staging, orphans=orphans)
        return {"stored": len(digests), "staging": staging, "orphans": orphans}


async def unneeded(db: Database, digests: Sequence[str]) -> list[str]:
    """Those that no version needs: none live, none deleted but still held by a replica."""
    left: list[str] = []
    for at in range(0, len(digests), _BATCH):
        batch = digests[at : at + _BATCH]
        needed = select(VersionRow.digest).where(
            VersionRow.digest.in_(batch), VersionRow.released_at.is_(None)
        )
        async with db.read() as session:
            known = set(await session.scalars(needed))
        left += [digest for digest in batch if digest not in known]
    return left
