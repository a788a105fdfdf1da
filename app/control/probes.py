"""The verbs on probes: what a trainer computed for some token ids, kept with a version.

What comes in: a session of an open transaction and plain values. What goes out: a `Probe`. It is
a row's and not a file's: the digest names the weights, and the same weights stay the same whether
or not somebody wrote down what they should answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.control import adapter_rows as rows
from app.control.inspect_probe import checked_probe, vocab_size_of
from app.db.engine import touch
from app.db.tables import AdapterRow, BaseModelRow, VersionRow
from app.domain import Probe
from app.errors import NotFound


async def probe_of(session: AsyncSession, adapter: str, number: int) -> Probe | None:
    """The probe of a live version; None when it has none, or when there is no such version."""
    query = (
        select(VersionRow.probe)
        .join(AdapterRow, AdapterRow.id == VersionRow.adapter_id)
        .where(
            AdapterRow.name == adapter,
            VersionRow.number == number,
            VersionRow.deleted_at.is_(None),
        )
    )
    found = await session.scalar(query)
    return None if found is None else _probe(found)


async def show(session: AsyncSession, adapter: str, number: int) -> Probe:
    """The probe of a version, or NotFound."""
    await _version(session, adapter, number)
    found = await probe_of(session, adapter, number)
    if found is None:
        raise _missing(adapter, number)
    return found


async def put(session: AsyncSession, adapter: str, number: int, given: Mapping[str, Any]) -> Probe:
    """Give a version a probe, in place of the one it has.

    Raises:
        AdapterRejected: with all that is wrong with it.
        NotFound: there is no such version.
    """
    row, version = await _version(session, adapter, number, lock=True)
    config = await session.scalar(
        select(BaseModelRow.config).where(BaseModelRow.name == version.base_model)
    )
    probe = checked_probe(given, vocab_size_of(config))
    version.probe = stored(probe)
    await touch(session, row)
    return probe


async def remove(session: AsyncSession, adapter: str, number: int) -> None:
    """Take a version's probe away; NotFound when it has none."""
    row, version = await _version(session, adapter, number, lock=True)
    if not await rows.is_probed(session, version):
        raise _missing(adapter, number)
    version.probe = None
    await touch(session, row)


def stored(probe: Probe) -> dict[str, Any]:
    """A probe as its column keeps it."""
    return {
        "token_ids": [list(row) for row in probe.token_ids],
        "logprobs": [list(row) for row in probe.logprobs],
        "dtype": probe.dtype,
    }


def _probe(found: Mapping[str, Any]) -> Probe:
    return Probe(
        token_ids=tuple(map(tuple, found["token_ids"])),
        logprobs=tuple(map(tuple, found["logprobs"])),
        dtype=found["dtype"],
    )


async def _version(
    session: AsyncSession, adapter: str, number: int, *, lock: bool = False
) -> tuple[AdapterRow, VersionRow]:
    row = await rows.get(session, adapter, lock=lock)
    return row, await rows.get_version(session, row, number)


def _missing(adapter: str, number: int) -> NotFound:
    return NotFound(f"{adapter}@{number} has no probe.", param="probe")
