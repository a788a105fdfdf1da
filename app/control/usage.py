"""The verbs on usage: add what the data plane counted, and read it back.

What comes in: `UsageRecord`s. What goes out: hourly sums by key and model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.tables import UsageRow
from app.domain import Usage, UsageRecord
from app.errors import InvalidRequest

MAX_PAGE = 10_000
#: SQLite allows 32,766 bound values in a statement; a row has six.
_BATCH = 1000


@dataclass(frozen=True, slots=True)
class UsageView:
    """What one key asked of one model in the hour that starts at `hour`."""

    hour: datetime
    key_id: str
    model: str
    requests: int
    usage: Usage


async def add(session: AsyncSession, records: Iterable[UsageRecord], hour: datetime) -> None:
    """Add the records to their hour's sums. Call it once per drained record."""
    start = hour.replace(minute=0, second=0, microsecond=0)
    # One row order everywhere: two gateways that lock the same rows never wait in a circle.
    rows = sorted(_merged(records).items())
    for at in range(0, len(rows), _BATCH):
        values = [
            {
                "hour": start,
                "key_id": key_id,
                "model": model,
                "requests": requests,
                "prompt_tokens": prompt,
                "completion_tokens": completion,
            }
            for (key_id, model), (requests, prompt, completion) in rows[at : at + _BATCH]
        ]
        await session.execute(_upsert(session, values))


async def list_(
    session: AsyncSession,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    key_id: str | None = None,
    model: str | None = None,
    limit: int = 1000,
) -> list[UsageView]:
    """Hourly sums, newest hour first, with `since` <= hour < `until`."""
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"limit must be 1 to {MAX_PAGE}, not {limit}.", param="limit")
    query = select(UsageRow).order_by(UsageRow.hour.desc(), UsageRow.key_id, UsageRow.model)
    if since is not None:
        query = query.where(UsageRow.hour >= since)
    if until is not None:
        query = query.where(UsageRow.hour < until)
    if key_id is not None:
        query = query.where(UsageRow.key_id == key_id)
    if model is not None:
        query = query.where(UsageRow.model == model)
    return [
        UsageView(
            row.hour,
            row.key_id,
            row.model,
            row.requests,
            Usage(row.prompt_tokens, row.completion_tokens),
        )
        for row in await session.scalars(query.limit(limit))
    ]


def _merged(records: Iterable[UsageRecord]) -> dict[tuple[str, str], tuple[int, int, int]]:
    sums: dict[tuple[str, str], tuple[int, int, int]] = {}
    for record in records:
        key = (record.key_id, record.model)
        requests, prompt, completion = sums.get(key, (0, 0, 0))
        sums[key] = (
            requests + record.requests,
            prompt + record.usage.prompt_tokens,
            completion + record.usage.completion_tokens,
        )
    return sums


def _upsert(session: AsyncSession, values: list[dict[str, Any]]) -> Any:
    # The two dialects have one syntax here, and SQLAlchemy two constructs for it.
    dialect = session.get_bind().dialect.name
    insert = sqlite.insert if dialect == "sqlite" else postgresql.insert
    statement = insert(UsageRow).values(values)
    counted = ("requests", "prompt_tokens", "completion_tokens")
    sums = {name: getattr(UsageRow, name) + statement.excluded[name] for name in counted}
    return statement.on_conflict_do_update(index_elements=["hour", "key_id", "model"], set_=sums)
