"""The database's clock: what leases are measured by, as gateways do not agree on the time.

What comes in: seconds from now. What goes out: an SQL expression of that instant, which both
dialects compare with a stored `Instant`. Knows no table.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from app.db.tables import Instant


class _DatabaseTime(FunctionElement[Any]):
    """The moment the statement runs (not that of its transaction's beginning), plus seconds."""

    type = Instant()
    inherit_cache = True


def database_time(in_s: float | ColumnElement[float] = 0.0) -> _DatabaseTime:
    """The database's own time, `in_s` seconds from now."""
    return _DatabaseTime(literal(in_s) if isinstance(in_s, float) else in_s)


@compiles(_DatabaseTime, "sqlite")
def _sqlite(element: _DatabaseTime, compiler: SQLCompiler, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    # As SQLAlchemy stores a time: with microseconds, of which SQLite knows three digits.
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', ({seconds}) || ' seconds')"


@compiles(_DatabaseTime, "postgresql")
def _postgresql(element: _DatabaseTime, compiler: SQLCompiler, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    # Not now(): a claimer waits for its turn inside its transaction.
    return f"(clock_timestamp() + make_interval(secs => {seconds}))"
