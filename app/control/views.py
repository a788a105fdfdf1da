"""What the control plane shows of adapters, and how rows become it.

What comes in: rows of one open transaction. What goes out: frozen views that outlive it. No HTTP:
`app.api.admin` turns a view into JSON.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.tables import AdapterRow, AliasRow, VersionRow
from app.domain import LATEST, Sticky

Targets = tuple[tuple[int, int], ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VersionView:
    """One version as the admin API shows it. `model` is what a client may ask for."""

    adapter: str
    number: int
    digest: str
    rank: int
    target_modules: tuple[str, ...]
    base_model: str
    bytes: int
    source: str
    created_at: datetime
    metadata: Mapping[str, Any]
    targets_lm_head: bool
    probed: bool

    @property
    def model(self) -> str:
        return f"{self.adapter}@{self.number}"


@dataclass(frozen=True, slots=True)
class AdapterView:
    """An adapter with its live versions, lowest number first, and its aliases.

    `aliases` says where each points, `sticky` what keeps a client of it on one version.
    """

    name: str
    base_model: str
    pool: str
    created_at: datetime
    metadata: Mapping[str, Any]
    versions: tuple[VersionView, ...]
    aliases: Mapping[str, Targets]
    sticky: Mapping[str, Sticky]

    @property
    def latest(self) -> int | None:
        targets = self.aliases.get(LATEST)
        return targets[0][0] if targets else None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list; `next_after` continues it, None ends it."""

    data: tuple[T, ...]
    next_after: str | None = None

    @property
    def has_more(self) -> bool:
        return self.next_after is not None


@dataclass(frozen=True, slots=True)
class Registered:
    """The answer to a registration.

    `created` is False when these weights were there already. `pending`: no alias was moved to the
    version yet.
    """

    adapter: AdapterView
    version: VersionView
    created: bool
    pending: bool = False


def as_targets(stored: Sequence[Sequence[int]]) -> Targets:
    return tuple((int(number), int(weight)) for number, weight in stored)


def version_view(adapter: str, row: VersionRow, probed: bool) -> VersionView:
    return VersionView(
        adapter=adapter,
        number=row.number,
        digest=row.digest,
        rank=row.rank,
        target_modules=tuple(row.target_modules),
        base_model=row.base_model,
        bytes=row.bytes,
        source=row.source,
        created_at=row.created_at,
        metadata=row.details,
        targets_lm_head=row.targets_lm_head,
        probed=probed,
    )


async def adapter_views(session: AsyncSession, rows: Sequence[AdapterRow]) -> list[AdapterView]:
    """The views of these adapters, in this order, with two queries for all of them."""
    ids = [row.id for row in rows]
    names = {row.id: row.name for row in rows}
    versions: dict[int, list[VersionView]] = defaultdict(list)
    aliases: dict[int, dict[str, Targets]] = defaultdict(dict)
    sticky: dict[int, dict[str, Sticky]] = defaultdict(dict)
    live = VersionRow.adapter_id.in_(ids), VersionRow.deleted_at.is_(None)
    for version, probed in await session.execute(
        select(VersionRow, VersionRow.probe.is_not(None))
        .where(*live)
        .order_by(VersionRow.adapter_id, VersionRow.number)
    ):
        owner = version.adapter_id
        versions[owner].append(version_view(names[owner], version, probed))
    for alias in await session.scalars(
        select(AliasRow).where(AliasRow.adapter_id.in_(ids)).order_by(AliasRow.name)
    ):
        aliases[alias.adapter_id][alias.name] = as_targets(alias.targets)
        sticky[alias.adapter_id][alias.name] = Sticky(alias.sticky)
    return [
        AdapterView(
            name=row.name,
            base_model=row.base_model,
            pool=row.pool,
            created_at=row.created_at,
            metadata=row.details,
            versions=tuple(versions[row.id]),
            aliases=aliases[row.id],
            sticky=sticky[row.id],
        )
        for row in rows
    ]
