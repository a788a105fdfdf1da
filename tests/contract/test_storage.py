"""A database or a disk that cannot be used says so in our words, whatever the driver calls it."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text

from app.control import keys
from app.db import engine
from app.db.blobs import AdapterStore
from app.db.engine import Database
from app.errors import StorageUnavailable

INSERT = text("INSERT INTO base_models (name, aliases) VALUES (:name, :aliases)")


async def insert(db: Database, *before: str) -> None:
    """Run these statements, and store a good deal of text."""
    async with db.begin() as session:
        for statement in before:
            await session.execute(text(statement))
        await session.execute(INSERT, {"name": "s3cret", "aliases": f'["{"x" * 200_000}"]'})


@pytest.mark.parametrize("db_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("pragma", "said"),
    [("max_page_count = 1", "has no room left"), ("query_only = ON", "is read-only")],
)
async def test_sqlite_that_is_full_or_read_only(db: Database, pragma: str, said: str) -> None:
    with pytest.raises(StorageUnavailable, match=said) as caught:
        await insert(db, f"PRAGMA {pragma}")
    assert "s3cret" not in f"{caught.value} {caught.value.__cause__}"
    async with db.read() as session:
        assert not (await keys.list_(session, limit=1)).data


@pytest.mark.parametrize("db_url", ["sqlite"], indirect=True)
async def test_sqlite_that_someone_else_writes(
    db_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_MS", 20)
    db = Database(db_url)
    other = sqlite3.connect(str(db.url.database), isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageUnavailable, match="is locked"):
            await insert(db)
        other.execute("ROLLBACK")
        await insert(db)
    finally:
        other.close()
        await db.close()


@pytest.mark.postgres
@pytest.mark.parametrize("db_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("SET TRANSACTION READ ONLY", "is read-only"),
        ("SELECT pg_terminate_backend(pg_backend_pid())", "does not answer"),
        ("SET LOCAL statement_timeout = 10; SELECT pg_sleep(1)", "does not answer"),
    ],
)
async def test_postgresql_that_goes_away(db: Database, statement: str, said: str) -> None:
    with pytest.raises(StorageUnavailable, match=said):
        await insert(db, *statement.split("; "))
    await insert(db)  # the pool makes a new connection


@pytest.mark.postgres
@pytest.mark.parametrize("db_url", ["postgresql"], indirect=True)
async def test_postgresql_that_someone_else_locked(db: Database) -> None:
    async with db.begin() as other:
        await other.execute(text("LOCK TABLE base_models"))
        with pytest.raises(StorageUnavailable, match="is locked"):
            await insert(db, "SET LOCAL lock_timeout = 10")


async def test_postgresql_that_is_not_there() -> None:
    pytest.importorskip("asyncpg")
    db = Database("postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(StorageUnavailable, match="does not answer"):
        await insert(db)
    with pytest.raises(StorageUnavailable, match="does not answer"):
        async with db.read():
            raise AssertionError("there is no database to read")
    await db.close()


async def test_our_own_mistakes_are_not_the_databases(db: Database) -> None:
    with pytest.raises(Exception, match="nonsense") as caught:
        await insert(db, "SELECT nonsense")
    assert not isinstance(caught.value, StorageUnavailable)
    with pytest.raises(KeyError):
        async with db.begin():
            raise KeyError("x")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_store_that_cannot_be_written(tmp_path: Path, code: int) -> None:
    store = AdapterStore(tmp_path)

    def write() -> None:
        with store.staging() as folder:
            (folder / "half").write_bytes(b"x")
            raise OSError(code, "the disk's words")

    with pytest.raises(StorageUnavailable, match="adapter store cannot be written"):
        write()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_store_that_is_no_folder(tmp_path: Path) -> None:
    """A mistake nobody foresaw stays one."""
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), AdapterStore(tmp_path / "file").staging():
        raise AssertionError("there is no folder to write in")
