"""Claims and releases, loads that happen once, replicas that come, change and go."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from app.domain import ReplicaState
from app.errors import AdapterLoadFailed, UpstreamBroke, UpstreamError, UpstreamRefused
from app.serving.loads import REFUSAL_S
from tests.unit.serving.made import FakeBackend, FleetOfMemory, path_of, replicas, snapshot, version
from tests.waiting import until

V1 = version()


def test_claims_are_counted_by_name() -> None:
    (replica,) = replicas()
    for name in ("a@1", "b@1", "a@1"):
        replica.claim(name)
    assert (replica.inflight, replica.busy) == (3, {"a@1": 2, "b@1": 1})
    replica.release("a@1")
    replica.release("b@1")
    assert (replica.inflight, replica.busy) == (1, {"a@1": 1})
    replica.release("a@1")
    assert (replica.inflight, replica.busy) == (0, {})


async def test_a_replica_is_available_once_probed(made: FleetOfMemory) -> None:
    wakes: list[None] = []
    made.fleet.on_change = lambda: wakes.append(None)
    await made.fleet.sync(snapshot(replicas=2))
    assert len(wakes) == 2
    assert [r.state for r in made.fleet.live()] == [ReplicaState.ADDING] * 2
    assert not any(r.available for r in made.fleet.candidates("pool"))
    made.connected[1].well = False
    assert await made.fleet.probe() == {"r0": "healthy", "r1": "unhealthy"}
    assert [r.id for r in made.fleet.candidates("pool") if r.available] == ["r0"]
    assert list(made.fleet.candidates("no such pool")) == []


@pytest.mark.parametrize("flag", ["cordoned", "draining"])
async def test_a_flag_of_the_registry_takes_a_replica_out(made: FleetOfMemory, flag: str) -> None:
    at_first = snapshot()
    (replica,) = await made.sync(at_first)
    flagged = {"r0": replace(at_first.replicas["r0"], **{flag: True})}
    await made.fleet.sync(snapshot(replicas=flagged))
    assert made.fleet.live() == [replica]
    assert not replica.available
    assert len(made.connected) == 1


async def test_a_replica_that_comes_back_tells_what_it_holds(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    await made.fleet.loads.load(replica, V1)
    assert replica.residency.known == {"pirate@1": path_of(V1)}
    made.fleet.died(replica, UpstreamRefused("gone"))
    assert replica.state is ReplicaState.UNHEALTHY
    made.connected[0].adapters = {"other@2": "/elsewhere"}
    made.connected[0].list_error = UpstreamError("starting")
    await made.fleet.probe()
    assert replica.state is ReplicaState.UNHEALTHY
    made.connected[0].list_error = None
    await made.fleet.probe()
    assert replica.state is ReplicaState.HEALTHY
    assert replica.residency.known == {"other@2": "/elsewhere"}


async def test_a_replica_that_stays_well_is_not_asked_what_it_holds(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    await made.fleet.loads.load(replica, V1)
    made.connected[0].list_error = UpstreamError("nobody asked")
    await made.fleet.probe()
    assert replica.state is ReplicaState.HEALTHY
    assert replica.residency.known == {"pirate@1": path_of(V1)}


async def test_a_refused_connection_asks_for_a_probe(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    wakes: list[None] = []
    made.fleet.on_change = lambda: wakes.append(None)
    made.fleet.died(replica, UpstreamRefused("gone"))
    assert wakes == [None]


async def test_a_load_is_asked_for_once_by_many(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    made.connected[0].loading = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(20):
            tasks.create_task(made.fleet.loads.load(replica, V1))
        await until(lambda: made.connected[0].loads)
        made.connected[0].loading.set()
    assert made.connected[0].loads == [("pirate@1", path_of(V1))]
    assert replica.holds("pirate@1", V1.digest)
    assert replica.loads == {}
    assert made.fleet.loads.counts == {("pool", "loaded"): 1}


async def test_a_load_outlives_the_request_that_began_it(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    made.connected[0].loading = asyncio.Event()
    first = asyncio.get_running_loop().create_task(made.fleet.loads.load(replica, V1))
    await until(lambda: made.connected[0].loads)
    second = asyncio.get_running_loop().create_task(made.fleet.loads.load(replica, V1))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    made.connected[0].loading.set()
    await second
    assert len(made.connected[0].loads) == 1


async def test_a_failed_load_nobody_waits_for_is_no_noise(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    made.connected[0].loading = asyncio.Event()
    made.connected[0].load_errors = [AdapterLoadFailed("no")]
    task = asyncio.get_running_loop().create_task(made.fleet.loads.load(replica, V1))
    await until(lambda: made.connected[0].loads)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    made.connected[0].loading.set()
    await until(lambda: not replica.loads)
    assert made.fleet.loads.counts == {("pool", "failed"): 1}


async def test_a_refusal_is_remembered_for_a_while(made: FleetOfMemory) -> None:
    """From its end on: one that took longer than the memory lasts must be remembered too."""

    class Slow(asyncio.Event):
        async def wait(self) -> bool:
            made.clock.at += 3 * REFUSAL_S
            return True

    (replica,) = await made.sync(snapshot())
    backend = made.connected[0]
    backend.loading = Slow()
    backend.load_errors = [AdapterLoadFailed("the rank is 4096")]
    for _ in range(3):
        with pytest.raises(AdapterLoadFailed, match="4096"):
            await made.fleet.loads.load(replica, V1)
    assert len(backend.loads) == 1
    made.clock.at += REFUSAL_S - 0.01
    with pytest.raises(AdapterLoadFailed):
        await made.fleet.loads.load(replica, V1)
    await made.fleet.loads.load(replica, version(number=2))  # another version is another matter
    made.clock.at += 0.02
    await made.fleet.loads.load(replica, V1)
    assert [name for name, _ in backend.loads] == ["pirate@1", "pirate@2", "pirate@1"]


async def test_a_replica_that_comes_back_is_asked_again(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    made.connected[0].load_errors = [AdapterLoadFailed("no")]
    with pytest.raises(AdapterLoadFailed):
        await made.fleet.loads.load(replica, V1)
    made.fleet.died(replica, UpstreamRefused("gone"))
    await made.fleet.probe()
    await made.fleet.loads.load(replica, V1)


async def test_a_load_that_could_not_be_asked_is_not_remembered(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    made.connected[0].load_errors = [UpstreamError("busy")]
    with pytest.raises(UpstreamError, match="busy"):
        await made.fleet.loads.load(replica, V1)
    await made.fleet.loads.load(replica, V1)


async def test_a_crash_in_a_load_is_its_own(
    made: FleetOfMemory, caplog: pytest.LogCaptureFixture
) -> None:
    (replica,) = await made.sync(snapshot())
    made.connected[0].load_errors = [ZeroDivisionError("a bug")]
    with caplog.at_level(logging.ERROR), pytest.raises(UpstreamBroke, match="log says why"):
        await made.fleet.loads.load(replica, V1)
    assert "a bug" in caplog.text
    await made.fleet.loads.load(replica, V1)


@pytest.mark.parametrize("departed", [False, True])
async def test_closing_does_not_wait_for_a_load(departed: bool) -> None:
    made = FleetOfMemory()
    async with asyncio.timeout(5):
        async with made.fleet:
            (replica,) = await made.sync(snapshot())
            made.connected[0].loading = asyncio.Event()
            waiter = asyncio.get_running_loop().create_task(made.fleet.loads.load(replica, V1))
            await until(lambda: made.connected[0].loads)
            if departed:
                replica.claim("pirate@1")
                await made.fleet.sync(snapshot(replicas=0))
        with pytest.raises(UpstreamBroke, match="interrupted"):
            await waiter
    assert made.connected[0].closed


async def test_an_adapter_under_another_path_is_another_adapter(made: FleetOfMemory) -> None:
    """What an earlier registry had loaded under the same name."""
    (replica,) = await made.sync(snapshot())
    assert not replica.holds("pirate@1", V1.digest)
    replica.residency.known["pirate@1"] = path_of(version("pirate", 7))
    assert not replica.holds("pirate@1", V1.digest)
    await made.fleet.loads.load(replica, V1)
    assert replica.holds("pirate@1", V1.digest)


async def test_replicas_are_told_the_path_they_see(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot(store_mount="/mnt/adapters"))
    await made.fleet.loads.load(replica, V1)
    await made.fleet.sync(snapshot(store_mount="/other"))
    made.fleet.lost(replica, V1)
    await made.fleet.loads.load(replica, V1)
    await made.fleet.sync(snapshot(store_mount=None))
    made.fleet.lost(replica, V1)
    await made.fleet.loads.load(replica, V1)
    inside = path_of(V1).removeprefix("/store")
    assert [path for _, path in made.connected[0].loads] == [
        f"/mnt/adapters{inside}",
        f"/other{inside}",
        path_of(V1),
    ]


async def test_a_lost_adapter_is_forgotten(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    await made.fleet.loads.load(replica, V1)
    made.fleet.lost(replica, V1)
    made.fleet.lost(replica, V1)
    assert replica.residency.known == {}


async def test_unloading(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    await made.fleet.loads.load(replica, V1)
    await replica.unload("pirate@1")
    assert (replica.residency.known, await replica.list_adapters()) == ({}, {})
    assert made.connected[0].unloads == ["pirate@1"]


@pytest.mark.parametrize("moved", [False, True])
async def test_a_replica_that_departs_closes_once_idle(made: FleetOfMemory, moved: bool) -> None:
    at_first = snapshot()
    (replica,) = await made.sync(at_first)
    replica.claim("pirate@1")
    there = {"r0": replace(at_first.replicas["r0"], url="http://elsewhere")} if moved else {}
    now = snapshot(replicas=there)
    await made.fleet.sync(now)
    assert replica.state is ReplicaState.DRAINING
    assert [live.url for live in made.fleet.live()] == (["http://elsewhere"] if moved else [])
    assert replica not in list(made.fleet.candidates("pool"))
    assert made.fleet.inflight("pirate@1") == 1
    assert not made.connected[0].closed
    replica.release("pirate@1")
    await made.fleet.sync(now)
    assert made.connected[0].closed
    assert made.fleet.inflight("pirate@1") == 0


async def test_a_probe_that_ends_late_does_not_revive_who_departed(made: FleetOfMemory) -> None:
    class Slow(FakeBackend):
        async def healthy(self) -> bool:
            await go_on.wait()
            return True

    go_on = asyncio.Event()
    made.fleet._connect = Slow
    await made.fleet.sync(snapshot())
    (replica,) = made.fleet.live()
    probe = asyncio.get_running_loop().create_task(made.fleet.probe())
    await asyncio.sleep(0.01)
    await made.fleet.sync(snapshot(replicas=0))
    go_on.set()
    await probe
    assert replica.state is ReplicaState.DRAINING


async def test_a_probe_from_before_a_death_does_not_revive(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    probing = asyncio.Event()

    async def healthy() -> bool:
        await probing.wait()
        return True

    made.connected[0].healthy = healthy  # type: ignore[method-assign]
    probe = asyncio.get_running_loop().create_task(made.fleet.probe())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    made.fleet.died(replica, UpstreamRefused("gone"))
    probing.set()
    await probe
    assert replica.state is ReplicaState.UNHEALTHY
    await made.fleet.probe()
    assert replica.state is ReplicaState.HEALTHY


async def test_a_replica_that_hangs_does_not_hold_up_the_others(
    made: FleetOfMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.serving.fleet.PATIENCE_S", 0.01)
    await made.fleet.sync(snapshot(replicas=2))
    asked = 0
    answer = asyncio.Event()

    async def healthy() -> bool:
        nonlocal asked
        asked += 1
        await answer.wait()
        return True

    made.connected[0].healthy = healthy  # type: ignore[method-assign]
    for _ in range(3):
        assert await made.fleet.probe() == {"r0": "adding", "r1": "healthy"}
    assert asked == 1, "it is not asked again before it has answered"
    answer.set()
    assert await made.fleet.probe() == {"r0": "healthy", "r1": "healthy"}
