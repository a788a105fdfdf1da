"""Drops what single ops worked on that failed or were cancelled: they are never done again.

What comes in: jobs that ended so, however they did. What goes out: the deletion of their payloads,
a batch at a time. Those of ops that went well are dropped where it is known that their run's state
is saved: in the transaction that ends an op.
"""

from __future__ import annotations

from app.control import op_payloads
from app.db.engine import Database

PERIOD_S = 60.0


class TidyPayloads:
    """Compares payloads with the queue."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def activate(self) -> dict[str, object]:
        """Drop a batch of what is left over."""
        async with self._db.begin() as session:
            return {"dropped": await op_payloads.drop_failed(session)}
