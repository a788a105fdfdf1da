"""The migrations make the tables the code declares, and can be undone, on both dialects."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from app.db.engine import Database, database_url, migrate
from app.db.schema import METADATA
from app.errors import ConfigurationError
from app.settings import Settings
from tests.contract.conftest import POSTGRES, Server

REPOSITORY = Path(__file__).parents[2]

#: A registry as the first release left it.
OLD_ROWS = (
    "INSERT INTO base_models (name, aliases) VALUES ('tiny', '[]')",
    "INSERT INTO pools (name, base_model, served_name, max_lora_rank, max_loras, declared,"
    " created_at) VALUES ('pool', 'tiny', 'tiny', 64, 8, false, :now)",
    "INSERT INTO replicas (id, pool, url, cordoned, draining, declared, created_at)"
    " VALUES ('r', 'pool', 'http://r', false, false, false, :now)",
    "INSERT INTO adapters (id, name, base_model, pool, last_number, details, created_at, revision)"
    " VALUES (1, 'pirate', 'tiny', 'pool', 3, '{}', :now, 1)",
    *(
        "INSERT INTO adapter_versions (id, adapter_id, number, base_model, pool, digest, rank,"
        " target_modules, bytes, source, details, created_at)"
        f" VALUES ({number}, 1, {number}, 'tiny', 'pool', 'd{number}', 8, '{modules}', 1, 'test',"
        " '{}', :now)"
        for number, modules in (
            (1, '["q_proj", "v_proj"]'),
            (2, '["lm_head", "q_proj"]'),
            (3, '["lmXhead"]'),
        )
    ),
    "INSERT INTO aliases (adapter_id, name, targets) VALUES (1, 'latest', '[[3, 1]]')",
)


@pytest.fixture(params=["sqlite", POSTGRES])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    server: Server = request.getfixturevalue("postgres")
    return server.create()


def drift(connection: Connection) -> list[object]:
    return list(compare_metadata(MigrationContext.configure(connection), METADATA))


def tables(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names())


async def test_upgrading_makes_what_the_code_declares(empty: str) -> None:
    db = Database(empty)
    await db.migrate()
    await db.migrate()  # again: nothing to do
    async with db.engine.connect() as connection:
        assert await connection.run_sync(drift) == []
        assert await connection.run_sync(tables) == {*METADATA.tables, "alembic_version"}
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


async def test_what_was_registered_before_the_fleet_stays_and_is_filled_in(empty: str) -> None:
    """Also on the way back, where SQLite would delete a copied pool's replicas."""
    alembic(empty, "upgrade", "0001")
    db = Database(empty)
    async with db.engine.begin() as connection:
        for statement in OLD_ROWS:
            await connection.execute(text(statement), {"now": datetime(2030, 1, 1, tzinfo=UTC)})
    alembic(empty, "upgrade", "head")
    async with db.engine.connect() as connection:
        lm_heads = text("SELECT number, targets_lm_head FROM adapter_versions ORDER BY number")
        assert [(n, bool(flag)) for n, flag in await connection.execute(lm_heads)] == [
            (1, False),
            (2, True),
            (3, False),
        ]
        pool = text("SELECT max_cpu_loras, max_inflight, max_queue FROM pools")
        assert (await connection.execute(pool)).all() == [(None, 256, 1024)]
        assert (await connection.execute(text("SELECT sticky FROM aliases"))).all() == [("user",)]
        probes = text("SELECT count(*) FROM adapter_versions WHERE probe IS NULL")
        assert (await connection.execute(probes)).scalar() == 3
    alembic(empty, "downgrade", "0001")
    async with db.engine.connect() as connection:
        for table, count in (("pools", 1), ("replicas", 1), ("adapter_versions", 3)):
            counted = await connection.execute(text(f"SELECT count(*) FROM {table}"))
            assert counted.scalar() == count
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
