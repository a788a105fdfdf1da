"""Placing: demand is what comes and what waits, loads go before traffic, and unloads come after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from app.control.tasks.place import Demand, Place
from app.errors import UpstreamError
from app.serving.snapshot import Snapshot, Snapshots
from tests.unit.serving.made import FleetOfMemory, adapter, replicas, snapshot

GRACE_S = 60.0


@pytest.fixture
async def made() -> AsyncIterator[FleetOfMemory]:
    made = FleetOfMemory()
    async with made.fleet:
        yield made


def place(made: FleetOfMemory, seen: Snapshot) -> Place:
    snapshots = Snapshots()
    snapshots.publish(seen)
    return Place(made.fleet, snapshots, made.clock, grace_s=GRACE_S)


def asked(made: FleetOfMemory, name: str, times: int = 1) -> None:
    """Requests that came and were answered."""
    pool = made.fleet.pools["pool"]
    home = pool.candidates(name, made.clock.monotonic())[0]
    for _ in range(times):
        home.claim(name)
        home.release(name)


def test_demand_follows_what_comes() -> None:
    (replica,) = replicas()
    pool = replica.in_pool
    demand = Demand(0.0)
    for second in range(1, 60):
        for _ in range(10):
            replica.claim("a@1")
            replica.release("a@1")
        demand.update(pool, float(second))
    assert demand.rates["a@1"] == pytest.approx(10, rel=0.05)
    demand.update(pool, 200.0)
    assert demand.rates == demand.at_once == {}
    assert demand.idle_s("a@1", 200.0) == pytest.approx(141)
    assert demand.idle_s("never@1", 200.0) == 0


def test_what_is_still_being_answered_is_wanted() -> None:
    (replica,) = replicas()
    replica.claim("a@1")
    demand = Demand(0.0)
    for second in range(1, 400):
        demand.update(replica.in_pool, float(second))
    assert demand.rates["a@1"] > 0
    assert demand.at_once["a@1"] == pytest.approx(1, rel=0.05)
    assert demand.idle_s("a@1", 400.0) == 1


async def test_what_waits_for_a_slot_is_wanted() -> None:
    """It has none anywhere: more so than if it had one."""
    (replica,) = replicas(max_loras=1)
    replica.claim("a@1")
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(replica.wait("b@1")) for _ in range(6)]
    await asyncio.sleep(0)
    demand = Demand(0.0)
    for second in range(1, 60):
        demand.update(replica.in_pool, float(second))
    assert demand.rates.get("b@1", 0.0) > 0
    assert demand.at_once["b@1"] == pytest.approx(6, rel=0.05)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_version_asked_for_is_loaded_on_its_homes(made: FleetOfMemory) -> None:
    seen = snapshot(adapter("pirate"), replicas=3)
    await made.sync(seen)
    placing = place(made, seen)
    asked(made, "pirate@1")
    made.clock.at += 1
    first = await placing.activate()
    assert (first["homes"], first["loaded"]) == (1, 1)
    assert sum(len(b.loads) for b in made.connected) == 1
    made.clock.at += 1
    again = await placing.activate()
    assert (again["loaded"], again["unloaded"], again["failed"]) == (0, 0, 0)


async def test_a_home_that_went_is_replaced_ahead_of_traffic(made: FleetOfMemory) -> None:
    seen = snapshot(adapter("pirate"), replicas=2)
    await made.sync(seen)
    placing = place(made, seen)
    asked(made, "pirate@1", 10)
    made.clock.at += 1
    await placing.activate()
    pool = made.fleet.pools["pool"]
    (home,) = pool.homes["pirate@1"]
    made.fleet.died(home, UpstreamError("gone"))
    made.clock.at += 1
    await placing.activate()
    (other,) = pool.homes["pirate@1"]
    assert other is not home
    assert "pirate@1" in other.residency.known


async def test_an_old_version_is_unloaded_once_idle_and_no_sooner(made: FleetOfMemory) -> None:
    seen = snapshot(adapter("pirate", versions=2))
    (replica,) = await made.sync(seen)
    placing = place(made, seen)
    for number in (1, 2):
        version = seen.adapters["pirate"].versions[number]
        await made.fleet.loads.load(replica, version)
    replica.claim("pirate@1")
    for _ in range(5):
        made.clock.at += GRACE_S
        await placing.activate()
    assert made.connected[0].unloads == [], "a request for it runs"
    replica.release("pirate@1")
    made.clock.at += GRACE_S / 2
    await placing.activate()
    assert made.connected[0].unloads == []
    made.clock.at += GRACE_S
    await placing.activate()
    assert made.connected[0].unloads == ["pirate@1"], "the alias points to the other"


async def test_a_load_that_fails_is_tried_again(made: FleetOfMemory) -> None:
    seen = snapshot(adapter("pirate"))
    await made.sync(seen)
    placing = place(made, seen)
    made.connected[0].load_errors = [UpstreamError("not now")]
    asked(made, "pirate@1", 20)
    made.clock.at += 1
    assert (await placing.activate())["failed"] == 1
    made.clock.at += 1
    assert (await placing.activate())["loaded"] == 1


async def test_a_version_nobody_registered_is_left_alone(made: FleetOfMemory) -> None:
    seen = snapshot()
    (replica,) = await made.sync(seen)
    replica.loaded("stranger@1", "/elsewhere")
    placing = place(made, seen)
    asked(made, "ghost@1")
    made.clock.at += 10 * GRACE_S
    done = await placing.activate()
    assert (done["loaded"], done["unloaded"]) == (0, 0)
    await made.fleet.sync(Snapshot())
    assert (await placing.activate())["homes"] == 0


async def test_a_load_that_hangs_does_not_stop_the_planning(
    made: FleetOfMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.control.tasks.place.PATIENCE_S", 0.01)
    seen = snapshot(adapter("pirate"))
    await made.sync(seen)
    made.connected[0].loading = asyncio.Event()
    placing = place(made, seen)
    asked(made, "pirate@1")
    for _ in range(2):
        made.clock.at += 1
        assert (await placing.activate())["loaded"] == 0
    made.connected[0].loading.set()
    made.clock.at += 1
    assert (await placing.activate())["loaded"] == 1
    assert len(made.connected[0].loads) == 1, "the load went on meanwhile"
