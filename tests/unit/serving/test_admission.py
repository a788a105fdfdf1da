"""Before a full replica: who waits, who is told to come again, and who is told why not."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from app.backends.base import Features, Reply
from app.domain import ReplicaState, Route
from app.errors import (
    AdapterQueueFull,
    NoReplicaAvailable,
    PoolFull,
    ProbeFailed,
    PromptLogprobsUnsupported,
)
from app.serving.forward import Forwarder
from app.serving.request import parse
from tests.unit.serving.made import FleetOfMemory, snapshot, version
from tests.waiting import until

ADAPTER = Route("tiny", "pool", "pirate@1", version())
OTHER = Route("tiny", "pool", "parrot@1", version("parrot"))
BASE = Route("tiny", "pool", "served-tiny")


async def narrow(made: FleetOfMemory, max_queue: int = 4, replicas: int = 1) -> asyncio.Event:
    """Replicas that take one request at a time, and answer once told to."""
    world = snapshot(replicas=replicas)
    pools = {"pool": replace(world.pools["pool"], max_inflight=1, max_queue=max_queue)}
    await made.sync(replace(world, pools=pools))
    go_on = asyncio.Event()
    for backend in made.connected:
        backend.answering = go_on
    return go_on


def ask(made: FleetOfMemory, *routes: Route, body: bytes = b"") -> list[asyncio.Task[Reply]]:
    async def asked(route: Route) -> Reply:
        request = parse("/v1/completions", body or b'{"model":"m","prompt":"x"}')
        reply = await Forwarder(made.fleet, made.clock).forward(request, route)
        reply.close()
        return reply

    return [asyncio.get_running_loop().create_task(asked(route)) for route in routes]


async def test_a_full_pool_says_so(made: FleetOfMemory) -> None:
    go_on = await narrow(made)
    pool = made.fleet.pools["pool"]
    tasks = ask(made, *[BASE] * 5)
    await until(lambda: pool.waiting == 4)
    with pytest.raises(PoolFull, match="'pool' is full and 4 requests wait") as raised:
        await ask(made, BASE)[0]
    assert raised.value.retry_after_s >= 1
    go_on.set()
    assert [(await task).status for task in tasks] == [200] * 5
    assert (pool.waiting, pool.inflight) == (0, 0)


async def test_without_a_queue_a_free_replica_is_still_found(made: FleetOfMemory) -> None:
    go_on = await narrow(made, max_queue=0, replicas=8)
    tasks = ask(made, *[BASE] * 8)
    await until(lambda: made.fleet.pools["pool"].inflight == 8)
    with pytest.raises(PoolFull):
        await ask(made, BASE)[0]
    go_on.set()
    assert [(await task).status for task in tasks] == [200] * 8


async def test_more_than_its_share_of_the_queue(made: FleetOfMemory) -> None:
    go_on = await narrow(made)
    pool = made.fleet.pools["pool"]
    tasks = ask(made, BASE, ADAPTER, ADAPTER, OTHER)
    await until(lambda: pool.waiting == 3)
    with pytest.raises(AdapterQueueFull, match="2 requests wait for 'pirate@1'"):
        await ask(made, ADAPTER)[0]
    tasks += ask(made, OTHER)
    await until(lambda: pool.waiting == 4)
    go_on.set()
    assert [(await task).status for task in tasks] == [200] * 5


async def test_who_waits_on_a_replica_that_dies_is_served_by_another(made: FleetOfMemory) -> None:
    go_on = await narrow(made, replicas=2)
    one, two = made.fleet.live()
    tasks = ask(made, *[BASE] * 4)
    await until(lambda: made.fleet.pools["pool"].waiting == 2)
    one.turned(ReplicaState.UNHEALTHY, "so")
    await until(lambda: two.line.length == 2)
    go_on.set()
    assert [(await task).status for task in tasks] == [200] * 4
    assert made.fleet.pools["pool"].waiting == 0


async def test_nobody_serves_it_right(made: FleetOfMemory) -> None:
    await made.sync(snapshot(replicas=2))
    for replica in made.fleet.live():
        replica.quarantined["pirate@1"] = f"{replica.id} is off by 0.5"
    with pytest.raises(ProbeFailed, match="is off by"):
        await ask(made, ADAPTER)[0]


async def test_nobody_gets_prompt_logprobs_right(made: FleetOfMemory) -> None:
    await made.sync(snapshot(replicas=2))
    body = b'{"model":"m","prompt":"x","prompt_logprobs":0}'
    one, two = made.fleet.live()
    one.features = two.features = Features(False, False, False)
    with pytest.raises(PromptLogprobsUnsupported, match="not safe"):
        await ask(made, BASE, body=body)[0]
    two.features = Features(True, True, True)
    assert (await ask(made, BASE, body=body)[0]).replica == "r1"
    one.turned(ReplicaState.UNHEALTHY, "so")
    two.turned(ReplicaState.UNHEALTHY, "so")
    with pytest.raises(NoReplicaAvailable):
        await ask(made, BASE, body=body)[0]


async def test_a_pool_that_is_gone(made: FleetOfMemory) -> None:
    await made.sync(snapshot())
    with pytest.raises(NoReplicaAvailable, match="elsewhere"):
        await ask(made, replace(BASE, pool="elsewhere"))[0]
