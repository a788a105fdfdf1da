"""The database: one engine, two kinds of transaction, and its migrations.

What comes in: a URL. What goes out: sessions that live inside `async with db.begin()` (writes) or
`db.read()` (one consistent picture). Knows the two dialects and nothing of what the rows mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, text, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from app.db.faults import from_sql
from app.db.tables import AdapterRow, KeyRow, RevisionRow
from app.errors import ConfigurationError
from app.settings import Settings

SQLITE, POSTGRESQL = "sqlite", "postgresql"
DRIVERS = {SQLITE: "sqlite+aiosqlite", POSTGRESQL: "postgresql+asyncpg"}

#: Key of `session.info`: the rows to stamp with this transaction's revision.
_TOUCHED = "touched"
#: How long SQLite waits for another program that writes.
BUSY_TIMEOUT_MS = 30_000
#: Any number, as long as no other program takes it on the same database.
_MIGRATION_LOCK = 7_041_776
_STARTUP_LOCK = 7_041_777


def database_url(settings: Settings) -> str:
    """The URL to open: the configured one with its async driver, or SQLite in the data folder."""
    if settings.database_url is None:
        return f"{DRIVERS[SQLITE]}:///{settings.data_path / 'loragate.db'}"
    return _with_driver(settings.database_url).render_as_string(hide_password=False)


async def touch(session: AsyncSession, *rows: AdapterRow | KeyRow) -> None:
    """End a verb: send its changes, and say that the data plane must see them, on which rows.

    Pools and replicas are few and read whole, so a change to them names no row.
    """
    await session.flush()
    session.info.setdefault(_TOUCHED, []).extend(rows)


async def take_turns(session: AsyncSession) -> None:
    """Let only one gateway at a time go on, until its transaction ends: for work at startup."""
    if session.get_bind().dialect.name == POSTGRESQL:
        await session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _STARTUP_LOCK})


class Database:
    """An engine and its sessions. SQLite is opened for one writer and acknowledged means kept."""

    def __init__(self, url: str) -> None:
        self.url = _with_driver(url)
        self.dialect = self.url.get_backend_name()
        options: dict[str, Any] = {}
        if self.dialect == SQLITE:
            if self.url.database:
                Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
        else:
            options = {"pool_pre_ping": True, "pool_size": 5, "max_overflow": 10}
        self.engine = create_async_engine(self.url, **options)
        if self.dialect == SQLITE:
            event.listen(self.engine.sync_engine, "connect", _sqlite_connected)
            event.listen(self.engine.sync_engine, "begin", _sqlite_begins)
        self._sessions = async_sessionmaker(self.engine, autoflush=False, expire_on_commit=False)
        # SQLite has one writer: waiting here is fair and costs nothing, its busy handler polls.
        self._writer = asyncio.Lock() if self.dialect == SQLITE else None

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """One transaction: committed when the block ends, rolled back when it raises."""
        if self._writer is None:
            async with self._transaction() as session:
                yield session
            return
        async with self._writer, self._transaction() as session:
            yield session

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A read-only transaction in which every statement sees the same moment."""
        options: dict[str, Any] = {"loragate_read": True}
        if self.dialect == POSTGRESQL:
            options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with from_sql():
            async with self._sessions() as session:
                await session.connection(execution_options=options)
                yield session

    async def prepare(self) -> None:
        """Make the schema current at startup: SQLite migrates itself, PostgreSQL must be."""
        if self.dialect == SQLITE:
            await self.migrate()
            return
        async with self.engine.connect() as connection:
            found = await connection.run_sync(_current_revision)
        wanted = ScriptDirectory.from_config(_alembic_config()).get_current_head()
        if found != wanted:
            raise ConfigurationError(
                f"The database is at schema {found or 'none'} and this gateway needs {wanted}: "
                "run `loragate migrate` with the same LORAGATE_DATABASE_URL."
            )

    async def migrate(self) -> None:
        """Run every migration that has not run yet; two programs at once take turns."""
        async with self.engine.begin() as connection:
            if self.dialect == POSTGRESQL:
                lock = text("SELECT pg_advisory_xact_lock(:key)")
                await connection.execute(lock, {"key": _MIGRATION_LOCK})
            await connection.run_sync(_upgrade)

    async def close(self) -> None:
        await self.engine.dispose()

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncSession]:
        with from_sql():
            async with self._sessions() as session, session.begin():
                yield session
                await _stamp(session)


def migrate(settings_or_url: Settings | str) -> None:
    """Upgrade the schema, from a program that runs no event loop (`loragate migrate`)."""
    url = settings_or_url if isinstance(settings_or_url, str) else database_url(settings_or_url)

    async def run() -> None:
        db = Database(url)
        try:
            await db.migrate()
        finally:
            await db.close()

    asyncio.run(run())


async def _stamp(session: AsyncSession) -> None:
    """Take the next revision and write it on the touched rows, last of all before the commit.

    The counter's row lock is held from here to the commit, so the order of revisions is the
    order of commits; taken any earlier, two transactions could wait for each other.
    """
    touched: list[AdapterRow | KeyRow] | None = session.info.pop(_TOUCHED, None)
    if touched is None:
        return
    await session.flush()
    taken = update(RevisionRow).values(value=RevisionRow.value + 1).returning(RevisionRow.value)
    revision = (await session.execute(taken)).scalar_one()
    for row in touched:
        row.revision = revision


def _with_driver(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as exc:
        raise ConfigurationError(
            "LORAGATE_DATABASE_URL is not a database URL; "
            "write postgresql://user:password@host/name or sqlite:////path/to/file.db"
        ) from exc
    name = POSTGRESQL if parsed.drivername == "postgres" else parsed.drivername.partition("+")[0]
    if name not in DRIVERS:
        raise ConfigurationError(
            f"LORAGATE_DATABASE_URL names {name!r}; loragate runs on sqlite and postgresql."
        )
    return parsed.set(drivername=DRIVERS[name])


def _sqlite_connected(connection: Any, _record: Any) -> None:
    # The driver must not open transactions by itself: `_sqlite_begins` says which kind.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    # FULL, not NORMAL: in WAL mode NORMAL may lose the last commits when the power goes.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _sqlite_begins(connection: Connection) -> None:
    # A deferred transaction that turns into a write after a read fails at once, without waiting,
    # when another program wrote in between; an immediate one waits at its start.
    reading = connection.get_execution_options().get("loragate_read", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _alembic_config() -> Config:
    packaged = Path(__file__).parents[1] / "_migrations"
    config = Config()
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    return config


def _current_revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _upgrade(connection: Connection) -> None:
    config = _alembic_config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
