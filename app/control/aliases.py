"""The verbs on aliases: move, remove, undo.

What comes in: a session of an open transaction and plain values. What goes out: the adapter as it
is then. Each move keeps where the alias pointed before, which is all that a rollback needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete as sql_delete
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.control import adapter_rows as rows
from app.control.views import AdapterView, Targets
from app.db.engine import touch
from app.db.tables import AdapterRow, AliasMoveRow, AliasRow, VersionRow
from app.domain import ALIAS_NAME, ALIAS_NAME_MAX, LATEST, Sticky
from app.errors import Conflict, InvalidRequest, NotFound

MAX_TARGETS = 100
MAX_WEIGHT = 1_000_000


async def set_alias(
    session: AsyncSession,
    clock: Clock,
    *,
    adapter: str,
    alias: str,
    targets: Sequence[tuple[int, int]],
    sticky: Sticky | None = None,
) -> AdapterView:
    """Point `alias` at (version number, weight) pairs, keeping where it pointed for `rollback`.

    `latest` may be moved too, to one version; the next registration moves it on. `sticky` None
    leaves it as it is, which is `user` for a new alias; a rollback does not change it.
    """
    check_alias(alias)
    wanted = _checked_targets(alias, targets)
    row = await rows.get(session, adapter, lock=True)
    for number, _ in wanted:
        await rows.get_version(session, row, number)
    await move(session, clock, row, alias, wanted, sticky)
    await touch(session, row)
    return await rows.view(session, row)


async def delete_alias(session: AsyncSession, *, adapter: str, alias: str) -> AdapterView:
    """Remove an alias and what `rollback` knew of it. `latest` stays."""
    if alias == LATEST:
        raise Conflict("The alias 'latest' is kept by the gateway.", param="alias")
    row = await rows.get(session, adapter, lock=True)
    found = await session.get(AliasRow, (row.id, alias))
    if found is None:
        raise NotFound(f"Adapter {adapter!r} has no alias {alias!r}.", param="alias")
    await session.delete(found)
    await session.execute(
        sql_delete(AliasMoveRow).where(
            AliasMoveRow.adapter_id == row.id, AliasMoveRow.alias == alias
        )
    )
    await touch(session, row)
    return await rows.view(session, row)


async def rollback(session: AsyncSession, *, adapter: str, alias: str = LATEST) -> AdapterView:
    """Undo the alias's newest move; again, the one before. Deleted versions are skipped."""
    row = await rows.get(session, adapter, lock=True)
    current = await session.get(AliasRow, (row.id, alias))
    if current is None:
        raise NotFound(f"Adapter {adapter!r} has no alias {alias!r}.", param="alias")
    live = set(await session.scalars(rows.live(row, VersionRow.number)))
    moves = await session.scalars(
        select(AliasMoveRow)
        .where(AliasMoveRow.adapter_id == row.id, AliasMoveRow.alias == alias)
        .order_by(AliasMoveRow.id.desc())
    )
    for move in moves:
        await session.delete(move)
        usable = all(number in live for number, _ in move.before)
        if usable and move.before != current.targets:
            current.targets = move.before
            break
    else:
        raise Conflict(
            f"Alias {alias!r} of {adapter!r} has no earlier version to go back to.", param="alias"
        )
    await touch(session, row)
    return await rows.view(session, row)


async def move(
    session: AsyncSession,
    clock: Clock,
    row: AdapterRow,
    alias: str,
    targets: Targets,
    sticky: Sticky | None = None,
) -> None:
    wanted = [list(target) for target in targets]
    current = await session.get(AliasRow, (row.id, alias))
    if current is None:
        current = AliasRow(adapter_id=row.id, name=alias, targets=wanted, sticky=Sticky.USER)
        session.add(current)
    elif current.targets != wanted:
        session.add(
            AliasMoveRow(
                adapter_id=row.id, alias=alias, before=current.targets, moved_at=clock.now()
            )
        )
        current.targets = wanted
    if alias == LATEST:
        await session.execute(
            update(VersionRow)
            .where(
                VersionRow.adapter_id == row.id,
                VersionRow.number.in_([number for number, _ in targets]),
            )
            .values(held_back=False)
            .execution_options(synchronize_session=False)
        )
    if sticky is not None:
        current.sticky = sticky
    await session.flush()


def check_alias(alias: str) -> None:
    if len(alias) > ALIAS_NAME_MAX or not ALIAS_NAME.fullmatch(alias):
        raise InvalidRequest(
            f"An alias is 1 to {ALIAS_NAME_MAX} letters, digits, '.', '_' or '-', "
            f"and starts with a letter or digit; got {alias[:200]!r}.",
            param="alias",
        )


def _checked_targets(alias: str, targets: Sequence[tuple[int, int]]) -> Targets:
    wanted = tuple(targets)
    if not 1 <= len(wanted) <= MAX_TARGETS:
        raise InvalidRequest(f"An alias has 1 to {MAX_TARGETS} targets.", param="targets")
    if len({number for number, _ in wanted}) != len(wanted):
        raise InvalidRequest("A version may be named once in an alias.", param="targets")
    if any(not 1 <= weight <= MAX_WEIGHT for _, weight in wanted):
        raise InvalidRequest(f"A weight is a whole number, 1 to {MAX_WEIGHT}.", param="targets")
    if alias == LATEST and len(wanted) > 1:
        raise InvalidRequest("The alias 'latest' points at one version.", param="targets")
    return wanted
