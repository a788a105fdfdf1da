"""Ends what has expired, and collects the bytes of files that nothing needs any more.

What comes in: the rows of files and uploads, the file store's digests and parts. What goes out:
tombstones of expired files, the end of expired uploads, and the removal of bytes without a row,
once they are old enough that no upload under way can still need them. A file that was deleted
keeps its bytes while a job that was submitted with it is not over.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

from app.clock import Clock
from app.control import files, uploads
from app.db.engine import Database
from app.db.file_store import FileStore
from app.telemetry import Event, log

logger = logging.getLogger(__name__)

#: Longer than it takes from the last byte of a file to its row.
YOUNG_S = 600.0
#: Seldom: it lists the whole store, and an orphan costs nothing but its room.
PERIOD_S = 300.0


class CollectFiles:
    """Compares the file store with the rows."""

    def __init__(
        self, db: Database, store: FileStore, clock: Clock, older_than_s: float = YOUNG_S
    ) -> None:
        self._db = db
        self._store = store
        self._clock = clock
        self._older_than_s = older_than_s

    async def activate(self) -> dict[str, object]:
        """End what has expired, forget what is deleted, remove what is left over."""
        expired, kept = await self._retire()
        parts = await self._drop_parts()
        staging = await asyncio.to_thread(self._store.sweep_staging, self._older_than_s)
        digests = await asyncio.to_thread(lambda: list(self._store.digests()))
        collected = 0
        for digest in await files.unneeded(self._db, digests, kept):
            collected += await asyncio.to_thread(
                self._store.discard, digest, older_than_s=self._older_than_s
            )
        found = {"expired": expired, "collected": collected, "staging": staging, "uploads": parts}
        if any(found.values()):
            log(logger, logging.INFO, Event.STORE_SWEPT, **found)
        return {"stored": len(digests), **found}

    async def _retire(self) -> tuple[int, set[str]]:
        """How many files expired, and the ids that jobs keep."""
        async with self._db.begin() as session:
            kept = await files.needed_by_jobs(session)
            expired = await files.expire(session, self._clock)
            # Not at once: a list that is being read may go on after one of them.
            before = self._clock.now() - timedelta(seconds=self._older_than_s)
            await files.forget(session, before, kept)
        return expired, kept

    async def _drop_parts(self) -> int:
        async with self._db.begin() as session:
            await uploads.expire(session, self._clock)
        found = await asyncio.to_thread(self._store.uploads, self._older_than_s)
        async with self._db.read() as session:
            pending = await uploads.pending(session, found)
        over = sorted(set(found) - pending)
        for upload in over:
            await asyncio.to_thread(self._store.drop_parts, upload)
        return len(over)
