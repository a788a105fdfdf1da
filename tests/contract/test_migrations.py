"""The migrations make the tables the code declares, and can be undone, on both dialects."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from app.db.engine import Database, database_url, migrate
from app.db.tables import Row
from app.errors import ConfigurationError
from app.settings import Settings
from tests.contract.conftest import POSTGRES, Server

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(params=["sqlite", POSTGRES])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    server: Server = request.getfixturevalue("postgres")
    return server.create()


def drift(connection: Connection) -> list[object]:
    return list(compare_metadata(MigrationContext.configure(connection), Row.metadata))


def tables(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names())


async def test_upgrading_makes_what_the_code_declares(empty: str) -> None:
    db = Database(empty)
    await db.migrate()
    await db.migrate()  # again: nothing to do
    async with db.engine.connect() as connection:
        assert await connection.run_sync(drift) == []
        assert await connection.run_sync(tables) == {*Row.metadata.tables, "alembic_version"}
        value = await connection.execute(text("SELECT id, value FROM registry_revision"))
        assert value.all() == [(1, 0)]
    await db.close()


def alembic(url: str, *words: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", "alembic", *words],
        cwd=REPOSITORY,
        env={"LORAGATE_DATABASE_URL": url, "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


async def test_alembics_own_commands_work(empty: str) -> None:
    alembic(empty, "upgrade", "head")
    assert "No new upgrade operations detected" in alembic(empty, "check")
    alembic(empty, "downgrade", "base")
    db = Database(empty)
    async with db.engine.connect() as connection:
        assert await connection.run_sync(tables) == {"alembic_version"}
    await db.close()


async def test_sqlite_migrates_itself_and_survives_power_failures(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "made" / "here")
    db = Database(database_url(settings))
    await db.prepare()
    async with db.engine.connect() as connection:
        modes = [
            (await connection.execute(text(f"PRAGMA {pragma}"))).scalar()
            for pragma in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    assert modes == ["wal", 2, 1, 30_000]
    await db.close()


@pytest.mark.postgres
async def test_postgresql_that_is_behind_says_how_to_catch_up(postgres: Server) -> None:
    url = postgres.create()
    db = Database(url)
    with pytest.raises(ConfigurationError, match="loragate migrate"):
        await db.prepare()
    await db.migrate()
    await db.prepare()
    await db.close()


def test_migrate_is_for_programs_without_a_loop(tmp_path: Path) -> None:
    settings = Settings(database_url=f"sqlite:///{tmp_path / 'x.db'}")
    migrate(settings)
    with sqlite3.connect(tmp_path / "x.db") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone()


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("postgresql://u:p%40ss@h/n", "postgresql+asyncpg://u:p%40ss@h/n"),
        ("postgres://h/n", "postgresql+asyncpg://h/n"),
        ("postgresql+psycopg://h/n", "postgresql+asyncpg://h/n"),
        ("sqlite:////x.db", "sqlite+aiosqlite:////x.db"),
    ],
)
def test_a_url_gets_its_async_driver(url: str, driver: str) -> None:
    assert database_url(Settings(database_url=url)) == driver


@pytest.mark.parametrize("url", ["mysql://h/n", "nonsense", ""])
def test_another_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="LORAGATE_DATABASE_URL"):
        database_url(Settings(database_url=url))


async def test_two_programs_may_migrate_at_once(empty: str) -> None:
    one, two = Database(empty), Database(empty)
    await asyncio.gather(one.migrate(), two.migrate())
    async with one.engine.connect() as connection:
        assert await connection.run_sync(drift) == []
    await one.close()
    await two.close()
