"""Versions that are registered first and released later, on both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from app.control import adapters
from app.control.views import AdapterView
from app.db.engine import Database
from app.errors import NotFound
from tests.contract.registry import MovableClock, add_pool, add_version, publisher


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture
async def registry(db: Database, clock: MovableClock) -> AsyncIterator[Database]:
    """pirate@1 at `latest` and `prod`."""
    await add_pool(db, clock)
    await add_version(db, clock, seed=1, alias="prod")
    yield db  # noqa: PT022  # the hook that awaits fixtures awaits generators


async def release(
    db: Database, clock: MovableClock, number: int, alias: str | None = None
) -> AdapterView:
    async with db.begin() as session:
        return await adapters.release(session, clock, name="pirate", number=number, alias=alias)


async def test_a_version_held_back_moves_nothing(registry: Database, clock: MovableClock) -> None:
    held = await add_version(registry, clock, seed=2, alias="prod", move_aliases=False)
    assert (held.created, held.pending, held.version.number) == (True, True, 2)
    assert held.adapter.aliases == {"latest": ((1, 1),), "prod": ((1, 1),)}
    publish, snapshots = publisher(registry)
    await publish.activate()
    assert set(snapshots.current.adapters["pirate"].versions) == {1, 2}, "it can be loaded"
    released = await release(registry, clock, 2, "prod")
    assert released.aliases == {"latest": ((2, 1),), "prod": ((2, 1),)}
    await publish.activate()
    assert snapshots.current.adapters["pirate"].aliases["prod"].targets == ((2, 1),)


async def test_a_new_adapter_is_not_held_back(db: Database, clock: MovableClock) -> None:
    """There is nothing else that its aliases could point to."""
    await add_pool(db, clock)
    made = await add_version(db, clock, alias="prod", move_aliases=False)
    assert made.pending is False
    assert made.adapter.aliases == {"latest": ((1, 1),), "prod": ((1, 1),)}


async def test_an_older_version_is_not_released_over_a_newer_one(
    registry: Database, clock: MovableClock
) -> None:
    """Two registrations at once: whichever is released last, the newest is the latest."""
    await add_version(registry, clock, seed=2, move_aliases=False)
    await add_version(registry, clock, seed=3, move_aliases=False)
    assert (await release(registry, clock, 3)).latest == 3
    late = await release(registry, clock, 2, "prod")
    assert (late.latest, late.aliases["prod"]) == (3, ((2, 1),))


@pytest.mark.parametrize("move_aliases", [True, False])
async def test_a_crash_before_the_release_heals_when_the_weights_come_again(
    registry: Database, clock: MovableClock, move_aliases: bool
) -> None:
    """Whether or not the adapter is in use by then."""
    await add_version(registry, clock, seed=2, move_aliases=False)
    again = await add_version(registry, clock, seed=2, move_aliases=move_aliases)
    assert (again.created, again.version.number) == (False, 2)
    assert again.pending is not move_aliases
    if again.pending:
        assert again.adapter.latest == 1
        assert (await release(registry, clock, 2)).latest == 2
    else:
        assert again.adapter.latest == 2
    publish, snapshots = publisher(registry)
    await publish.activate()
    assert snapshots.current.adapters["pirate"].aliases["latest"].targets == ((2, 1),)


@pytest.mark.parametrize("move_aliases", [True, False])
async def test_weights_that_come_again_do_not_undo_a_rollback_of_their_release(
    registry: Database, clock: MovableClock, move_aliases: bool
) -> None:
    await add_version(registry, clock, seed=2, move_aliases=False)
    await release(registry, clock, 2)
    async with registry.begin() as session:
        await adapters.rollback(session, adapter="pirate")
    again = await add_version(registry, clock, seed=2, move_aliases=move_aliases)
    assert (again.created, again.pending, again.adapter.latest) == (False, False, 1)


async def test_latest_put_on_a_version_by_hand_releases_it(
    registry: Database, clock: MovableClock
) -> None:
    await add_version(registry, clock, seed=2, move_aliases=False)
    for number in (2, 1):
        async with registry.begin() as session:
            await adapters.set_alias(
                session, clock, adapter="pirate", alias="latest", targets=[(number, 1)]
            )
    again = await add_version(registry, clock, seed=2, move_aliases=False)
    assert (again.pending, again.adapter.latest) == (False, 1)


async def test_a_deleted_version_is_not_released(registry: Database, clock: MovableClock) -> None:
    await add_version(registry, clock, seed=2, move_aliases=False)
    async with registry.begin() as session:
        await adapters.delete_version(session, clock, adapter="pirate", number=2)
    with pytest.raises(NotFound, match="no version 2"):
        await release(registry, clock, 2)
