"""Writes down what the data plane counted since the last run.

What comes in: the meter's records. What goes out: hourly sums in the registry. What cannot be
written goes back to the meter; a process killed between two runs loses the last few seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from app.clock import Clock
from app.control import usage
from app.db.engine import Database
from app.domain import UsageRecord


class Meter(Protocol):
    """Where the records come from, and go back to."""

    def drain(self) -> list[UsageRecord]: ...
    def restore(self, records: Iterable[UsageRecord]) -> None: ...


class FlushUsage:
    """Moves records from the meter to the database."""

    def __init__(self, db: Database, meter: Meter, clock: Clock) -> None:
        self._db = db
        self._meter = meter
        self._clock = clock

    async def activate(self) -> dict[str, object]:
        """Write what there is."""
        records = self._meter.drain()
        if not records:
            return {"records": 0}
        try:
            async with self._db.begin() as session:
                await usage.add(session, records, self._clock.now())
        except BaseException:
            self._meter.restore(records)
            raise
        return {"records": len(records)}
