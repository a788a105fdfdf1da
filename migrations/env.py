"""Alembic's entry: on a connection handed over by `app.db.engine`, or on the configured database.

What comes in: a connection or the settings. What goes out: migrations run in one transaction.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from alembic import context
from sqlalchemy import Connection

from app.db.engine import Database, database_url
from app.db.schema import METADATA
from app.db.tables import Instant
from app.settings import Settings


def run(connection: Connection) -> None:
    """Run what was asked for. SQLite cannot alter most things, so tables are copied there."""
    context.configure(
        connection=connection,
        target_metadata=METADATA,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        transactional_ddl=True,
        render_item=render_item,
    )
    with context.begin_transaction():
        context.run_migrations()


def render_item(kind: str, item: object, autogen_context: object) -> str | Literal[False]:
    """Write our own types as what they are in the database: a migration outlives the code."""
    if kind == "type" and isinstance(item, Instant):
        return "sa.DateTime(timezone=True)"
    return False


async def run_configured() -> None:
    db = Database(database_url(Settings()))
    try:
        async with db.engine.begin() as connection:
            await connection.run_sync(run)
    finally:
        await db.close()


if (handed_over := context.config.attributes.get("connection")) is not None:
    run(handed_over)
else:
    asyncio.run(run_configured())
