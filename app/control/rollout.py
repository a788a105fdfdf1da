"""Brings a version to where it will be asked for, before an alias points to it.

What comes in: an adapter and the versions that an alias is about to point to. What goes out: those
versions loaded, and verified if they carry a probe, on the replicas that serve the adapter now. So
the first request after the move finds its version there, and a version that is served wrongly is
refused while the alias still points to the one before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from app.serving.fleet import Fleet
from app.serving.snapshot import Snapshots


class Rooms(Protocol):
    """What a rollout needs of the running gateway."""

    @property
    def fleet(self) -> Fleet: ...
    @property
    def snapshots(self) -> Snapshots: ...


def in_use(rooms: Rooms, adapter: str) -> tuple[str, ...]:
    """The upstream names that an adapter's aliases stand for and that a replica holds."""
    known = rooms.snapshots.current.adapters.get(adapter)
    if known is None or known.pool not in rooms.fleet.pools:
        return ()
    pool = rooms.fleet.pools[known.pool]
    numbers = {number for alias in known.aliases.values() for number, _ in alias.targets}
    names = [known.versions[n].upstream_name for n in sorted(numbers) if n in known.versions]
    return tuple(name for name in names if pool.holders(name))


async def prepare(rooms: Rooms, adapter: str, numbers: Iterable[int]) -> None:
    """Load the versions `numbers` of an adapter where its aliases' versions are now.

    A version this gateway has not heard of yet, or an adapter that nobody uses, is left to be
    loaded when it is asked for.

    Raises:
        ProbeFailed: every replica asked serves a version wrongly.
        AdapterLoadFailed: every replica asked refuses it.
    """
    known = rooms.snapshots.current.adapters.get(adapter)
    if known is None:
        return
    used = in_use(rooms, adapter)
    for number in numbers:
        version = known.versions.get(number)
        if version is not None:
            await rooms.fleet.prepare(version, known.pool, used)
