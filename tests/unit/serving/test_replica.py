"""One replica: claims conserve, nobody who waits is forgotten, and turns are fair."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.backends.base import EngineStatus
from app.domain import ReplicaState
from app.errors import UpstreamBroke
from app.serving import breaker
from app.serving.replica import QUANTUM_S, SLOW_START_S, LiveReplica
from tests.unit.serving.made import MovableClock, replicas

BASE = "served-tiny"


def clock_of(replica: LiveReplica) -> MovableClock:
    clock = replica._clock
    assert isinstance(clock, MovableClock)
    return clock


async def waiting(replica: LiveReplica, *names: str) -> list[asyncio.Task[bool]]:
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(replica.wait(name)) for name in names]
    await asyncio.sleep(0)
    return tasks


async def woken() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def cancelled(*tasks: asyncio.Task[bool]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# claims


def test_a_place_for_so_many() -> None:
    (replica,) = replicas(max_inflight=3, max_loras=2)
    for _ in range(3):
        assert replica.takes(BASE)
        replica.claim(BASE)
    assert not replica.takes(BASE)
    assert not replica.takes("a@1")
    replica.release(BASE)
    assert replica.takes("a@1")


def test_no_more_adapters_at_once_than_slots() -> None:
    (replica,) = replicas(max_loras=2)
    for name in ("a@1", "b@1", "a@1"):
        assert replica.takes(name)
        replica.claim(name)
    assert not replica.takes("c@1")
    assert replica.takes("b@1")
    assert replica.takes(BASE)
    replica.release("a@1")
    assert not replica.takes("c@1")
    replica.release("a@1")
    assert replica.takes("c@1")


async def test_who_waits_gets_the_place_that_comes_free() -> None:
    (replica,) = replicas(max_inflight=1)
    replica.claim(BASE)
    tasks = await waiting(replica, BASE, BASE)
    assert replica.in_pool.waiting == 2
    replica.release(BASE)
    assert await tasks[0] is True
    assert not tasks[1].done()
    replica.release(BASE)
    assert await tasks[1] is True
    replica.release(BASE)
    assert (replica.inflight, replica.in_pool.inflight, replica.in_pool.waiting) == (0, 0, 0)


@pytest.mark.parametrize("how", ["unhealthy", "draining", "cordoned"])
async def test_who_waits_on_a_replica_that_goes_looks_for_another(how: str) -> None:
    (replica,) = replicas(max_inflight=1)
    replica.claim(BASE)
    (task,) = await waiting(replica, BASE)
    if how == "cordoned":
        replica.follow(replace(replica.replica, cordoned=True))
    else:
        replica.turned(ReplicaState(how), "so")
    assert await task is False
    assert not replica.available
    assert (replica.in_pool.waiting, replica.inflight) == (0, 1)


async def test_a_breaker_that_opens_sends_who_waits_away() -> None:
    (replica,) = replicas(max_inflight=1)
    replica.claim(BASE)
    (task,) = await waiting(replica, BASE)
    replica.tripped(UpstreamBroke("it resets"))
    assert await task is False
    assert replica.in_pool.waiting == 0


async def test_who_leaves_while_a_place_comes_free_is_not_counted_twice() -> None:
    """Its client leaves, and before the loop gets to it a place comes free."""
    (replica,) = replicas(max_inflight=1)
    replica.claim(BASE)
    (task,) = await waiting(replica, BASE)
    task.cancel()
    replica.release(BASE)
    await asyncio.gather(task, return_exceptions=True)
    assert (replica.in_pool.waiting, replica.inflight, replica.line.length) == (0, 0, 0)


async def test_who_leaves_while_the_replica_goes_is_not_counted_twice() -> None:
    (replica,) = replicas(max_inflight=1)
    replica.claim(BASE)
    (task,) = await waiting(replica, BASE)
    task.cancel()
    replica.turned(ReplicaState.UNHEALTHY, "so")
    await asyncio.gather(task, return_exceptions=True)
    assert replica.in_pool.waiting == 0


async def test_a_place_given_to_who_has_just_left_goes_to_the_next() -> None:
    (replica,) = replicas(max_inflight=1)
    replica.claim(BASE)
    first, second = await waiting(replica, BASE, BASE)
    replica.release(BASE)
    first.cancel()  # it has the claim, and does not know yet
    await asyncio.gather(first, return_exceptions=True)
    assert await second is True
    assert replica.inflight == 1


# the breaker and the line


def half_open(replica: LiveReplica) -> None:
    for _ in range(breaker.FAILURES):
        replica.breaker.failed(clock_of(replica).monotonic())
    clock_of(replica).at += breaker.FIRST_PAUSE_S


async def test_who_leaves_as_the_one_that_tries_lets_another_try() -> None:
    (replica,) = replicas(max_inflight=1)
    replica.claim(BASE)
    half_open(replica)
    (task,) = await waiting(replica, BASE)
    replica.release(BASE)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert replica.allows(clock_of(replica).monotonic()), "shut out for good"


async def test_a_half_open_breaker_gives_one_of_those_that_wait_a_place() -> None:
    (replica,) = replicas(max_inflight=4)
    for _ in range(4):
        replica.claim(BASE)
    half_open(replica)
    tasks = await waiting(replica, *[BASE] * 4)
    for _ in range(4):
        replica.release(BASE)
    assert sorted([await task for task in tasks]) == [False] * 3 + [True]
    assert (replica.inflight, replica.in_pool.waiting) == (1, 0)


# fairness


async def test_an_adapter_with_a_thousand_delays_another_by_one_turn() -> None:
    (replica,) = replicas(max_inflight=1)
    replica.claim("crowd@1")
    crowd = await waiting(replica, *["crowd@1"] * 1000)
    (one,) = await waiting(replica, "one@1")
    replica.release("crowd@1")
    replica.release("crowd@1")
    await woken()
    assert one.done()
    assert sum(task.done() for task in crowd) == 1
    await cancelled(*crowd)
    assert replica.in_pool.waiting == 0


async def served_by_turns(replica: LiveReplica, names: list[str], each_s: float) -> Counter[str]:
    """Every adapter always has requests; how many of each were served in a minute."""
    clock, served = clock_of(replica), Counter[str]()
    running: list[str] = []
    line: dict[str, asyncio.Task[bool]] = {}
    end = clock.at + 60
    while clock.at < end:
        for name in names:
            while replica.takes(name):
                replica.claim(name)
                running.append(name)
            if name not in line:
                (line[name],) = await waiting(replica, name)
        clock.at += each_s
        name = running.pop(0)
        served[name] += 1
        replica.release(name)
        await woken()
        for other in [n for n, task in line.items() if task.done()]:
            assert line.pop(other).result()
            running.append(other)
    await cancelled(*line.values())
    for name in running:
        replica.release(name)
    await woken()
    return served


@pytest.mark.parametrize("slots", [1, 2, 4])
async def test_with_more_adapters_than_slots_none_starves(slots: int) -> None:
    (replica,) = replicas(max_inflight=4, max_loras=slots)
    names = [f"a{n}@1" for n in range(6)]
    served = await served_by_turns(replica, names, each_s=0.05)
    assert min(served[name] for name in names) > sum(served.values()) / 6 / 3
    assert (replica.inflight, replica.busy, replica.in_pool.waiting) == (0, {}, 0)


async def test_a_slot_is_kept_for_a_while() -> None:
    """Turns of single requests would swap adapters for every one of them."""
    (replica,) = replicas(max_loras=1)
    replica.claim("a@1")
    (task,) = await waiting(replica, "b@1")
    assert replica.takes("a@1")
    clock_of(replica).at += QUANTUM_S
    replica.claim("a@1")
    replica.release("a@1")
    assert not replica.takes("a@1"), "another waited long enough"
    replica.release("a@1")
    assert await task is True


async def test_an_adapter_keeps_its_slot_when_the_one_that_wanted_it_leaves() -> None:
    (replica,) = replicas(max_loras=1)
    replica.claim("a@1")
    (wants,) = await waiting(replica, "b@1")
    clock_of(replica).at += QUANTUM_S
    (again,) = await waiting(replica, "a@1")
    assert not again.done(), "b@1 has waited long enough"
    await cancelled(wants)
    await woken()
    assert again.done(), "nobody wants the slot any more, and the place is free"
    assert replica.takes("a@1")


async def test_an_adapter_keeps_its_slot_when_another_one_comes_free() -> None:
    (replica,) = replicas(max_loras=2)
    replica.claim("a@1")
    replica.claim("b@1")
    (wants,) = await waiting(replica, "c@1")
    clock_of(replica).at += QUANTUM_S
    (again,) = await waiting(replica, "a@1")
    replica.release("b@1")
    await woken()
    assert wants.done()
    assert again.done(), "nobody waits for a slot any more"


async def test_an_adapter_keeps_its_slot_when_all_who_wanted_it_were_sent_away() -> None:
    (replica,) = replicas(max_loras=1)
    replica.claim("a@1")
    (wants,) = await waiting(replica, "b@1")
    clock_of(replica).at += QUANTUM_S
    replica.claim("a@1")
    replica.release("a@1")
    assert not replica.takes("a@1")
    replica.turned(ReplicaState.UNHEALTHY, "so")
    replica.turned(ReplicaState.HEALTHY, "so")
    assert await wants is False
    (again,) = await waiting(replica, "a@1")
    await woken()
    assert again.done(), "nobody waits for its slot"


async def test_more_places_in_the_pool_are_given_at_once() -> None:
    (replica,) = replicas(max_inflight=1, max_loras=1)
    pool = replica.in_pool
    replica.claim("a@1")
    tasks = await waiting(replica, "a@1", "b@1")
    pool.configure(replace(pool.config, max_inflight=4))
    await woken()
    assert [task.done() for task in tasks] == [True, False]
    pool.configure(replace(pool.config, max_loras=2))
    await woken()
    assert tasks[1].done()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["ask", "ask", "ask", "ask", "end", "end", "leave", "pass", "sick", "well", "resize"]
        ),
        st.integers(0, 5),
    ),
    min_size=15,
    max_size=60,
)


class Door:
    """Everyone who was given a claim, and everyone who waits for one."""

    def __init__(self, replica: LiveReplica) -> None:
        self.replica = replica
        self.running: list[str] = []
        self.line: list[tuple[str, asyncio.Task[bool]]] = []

    async def step(self, step: str, number: int) -> None:
        replica, pool = self.replica, self.replica.in_pool
        match step:
            case "ask" if replica.available:
                await self.ask(BASE if number == 5 else f"a{number}@1")
            case "end" if self.running:
                replica.release(self.running.pop(number % len(self.running)))
            case "leave" if self.line:
                self.line[number % len(self.line)][1].cancel()
            case "pass":
                clock_of(replica).at += QUANTUM_S / 2
            case "sick":
                replica.turned(ReplicaState.UNHEALTHY, "so")
            case "well":
                replica.turned(ReplicaState.HEALTHY, "so")
            case "resize":
                pool.configure(replace(pool.config, max_loras=1 + number % 3))

    async def ask(self, name: str) -> None:
        if self.replica.takes(name):
            self.replica.claim(name)
            self.running.append(name)
        else:
            self.line += [(name, task) for task in await waiting(self.replica, name)]

    async def settled(self) -> None:
        await woken()
        for entry in [entry for entry in self.line if entry[1].done()]:
            self.line.remove(entry)
            if not entry[1].cancelled() and entry[1].result():
                self.running.append(entry[0])

    def check(self) -> None:
        replica, pool = self.replica, self.replica.in_pool
        asked = Counter(self.running)
        del asked[BASE]
        assert replica.inflight == pool.inflight == len(self.running)
        assert replica.busy == asked
        assert replica.line.length == pool.waiting == len(self.line)
        assert not [n for n, _ in self.line if replica.takes(n)], "waits while a place is free"
        assert replica.available or not self.line

    async def closed(self) -> None:
        for _, task in self.line:
            task.cancel()
        await self.settled()
        while self.running or self.line:
            self.replica.release(self.running.pop())
            await self.settled()


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, slots=st.integers(1, 3), places=st.integers(1, 4))
async def test_claims_conserve_and_nobody_waits_while_a_place_is_free(
    steps: list[tuple[str, int]], slots: int, places: int
) -> None:
    (replica,) = replicas(max_loras=slots, max_inflight=places)
    door = Door(replica)
    for step, number in steps:
        await door.step(step, number)
        if step not in ("leave", "pass"):  # after those, the next comes before the loop gets to it
            await door.settled()
            door.check()
    await door.closed()
    door.check()
    assert (replica.inflight, replica.busy, replica.line.length) == (0, {}, 0)


# load and health


def test_load_is_what_runs_and_waits_there_through_anyone() -> None:
    (replica,) = replicas()
    replica.claim(BASE)
    now = clock_of(replica).monotonic()
    assert replica.load(now) == 1
    replica.seen(EngineStatus(running=5, waiting=2))
    assert replica.load(now) == 7
    replica.seen(EngineStatus(running=0))
    assert replica.load(now) == 1
    replica.seen(EngineStatus(running=1, kv_cache_usage=0.99))
    assert replica.load(now) >= replica.in_pool.config.max_inflight


def test_a_new_replica_starts_slowly() -> None:
    (replica,) = replicas()
    replica.turned(ReplicaState.UNHEALTHY, "so")
    replica.turned(ReplicaState.HEALTHY, "so")
    at = clock_of(replica).at
    loads = [replica.load(at + part * SLOW_START_S) for part in (0, 0.1, 0.5, 0.99)]
    assert loads == sorted(loads, reverse=True)
    assert loads[0] >= 5
    assert replica.load(at + SLOW_START_S) == 0
    assert replica.load(at) == 0, "once over, it is over"


def test_a_replica_that_departed_stays_so() -> None:
    (replica,) = replicas()
    replica.turned(ReplicaState.DRAINING, "gone")
    replica.turned(ReplicaState.HEALTHY, "a probe that ended late")
    assert replica.state is ReplicaState.DRAINING
    assert not replica.available


def test_a_replica_that_turned_healthy_is_trusted_again() -> None:
    (replica,) = replicas()
    for _ in range(breaker.FAILURES):
        replica.breaker.failed(clock_of(replica).at)
    assert not replica.allows(clock_of(replica).at)
    replica.turned(ReplicaState.UNHEALTHY, "so")
    replica.turned(ReplicaState.HEALTHY, "so")
    assert replica.allows(clock_of(replica).at)


# the mirror


def test_claims_of_adapters_it_knows_are_uses() -> None:
    (replica,) = replicas(max_loras=2)
    for name in ("a@1", "b@1"):
        replica.loaded(name, "/p")
    for name in ("a@1", "c@1"):
        replica.residency.known[name] = "/p"
        replica.claim(name)
        replica.release(name)
    assert replica.residency.in_slot("a@1")
    assert replica.residency.in_slot("c@1")
    assert not replica.residency.in_slot("b@1")


def test_a_claim_that_never_became_a_load_evicts_nothing() -> None:
    """The engine was never asked for it, or refused its weights."""
    (replica,) = replicas(max_loras=1)
    replica.loaded("a@1", "/p")
    replica.claim("refused@1")
    replica.release("refused@1")
    assert replica.residency.in_slot("a@1")


def test_a_use_after_anothers_load_counts() -> None:
    (replica,) = replicas(max_loras=1)
    replica.loaded("a@1", "/p")
    replica.claim("a@1")
    replica.loaded("b@1", "/p")
    replica.claim("a@1")
    assert replica.residency.in_slot("a@1")
