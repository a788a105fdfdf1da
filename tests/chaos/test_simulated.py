"""Ten minutes in which everything goes wrong: every request ends exactly once, and is right.

A failure names its seed; `LORAGATE_TEST_CHAOS_SEED` runs another one.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter

import pytest

from tests.chaos.world import World, every, opened
from tests.fakes import virtual_time

MINUTES_S = 600.0
#: The last of it is calm, and by then all must be well again.
CALM_S = 90.0
RECOVERED_S = 45.0
#: The longest that a client may be kept: all its attempts, each as silent as is allowed.
LONGEST_S = 120.0
KINDS = ("single", "single", "stream", "scoring", "scoring", "batch", "batch stream")

SEEDS = (
    [int(os.environ.get("LORAGATE_TEST_CHAOS_SEED", "0"))]
    if ("LORAGATE_TEST_CHAOS_SEED" in os.environ)
    else [1, 2, 3]
)


@pytest.mark.parametrize("seed", SEEDS)
def test_ten_minutes_of_chaos(seed: int) -> None:
    state = random.getstate()
    random.seed(seed)
    try:
        world = virtual_time.run(lived(seed))
    finally:
        random.setstate(state)
    judge(world)


async def lived(seed: int) -> World:
    async with opened(seed) as world:
        rng, stormy = world.rng, MINUTES_S - CALM_S

        async def client() -> None:
            if rng.random() < 0.05:  # a burst
                async with asyncio.TaskGroup() as group:
                    for _ in range(30):
                        group.create_task(world.client("scoring"))
            else:
                await world.client(rng.choice(KINDS))

        async def storm() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(every(4.0, rng, stormy, world.fault))
                group.create_task(every(6.0, rng, stormy, world.flip))
                group.create_task(every(25.0, rng, stormy, world.reshape))
            world.calm()

        async with asyncio.TaskGroup() as group:
            group.create_task(every(0.25, rng, MINUTES_S, client))
            group.create_task(storm())
        for replica in world.fleet.live():
            assert (replica.inflight, replica.busy, replica.line.length) == (0, {}, 0), seed
        for pool in world.fleet.pools.values():
            assert (pool.inflight, pool.waiting) == (0, 0), seed
        return world


def judge(world: World) -> None:
    seed = f"seed {world.seed}"
    assert world.wrong == [], seed
    assert world.begun == len(world.told), f"{seed}: every request ends exactly once"
    billed = sum(record.requests for record in world.meter.drain())
    assert billed == world.billable, f"{seed}: an answer is accounted exactly once"
    for engine in world.engines:
        assert engine.problems == [], f"{seed}: {engine.replica.id}"
        assert engine.running.total() == 0, f"{seed}: cancelled upstream"
        assert all(reply._callbacks is None for reply in engine.replies), f"{seed}: left open"
    slowest = max(world.told, key=lambda told: told.took_s)
    assert slowest.took_s < LONGEST_S, f"{seed}: {slowest}"
    ends = Counter(told.end for told in world.told)
    stayed = len(world.told) - ends["left"]
    assert ends["ok"] > 0.8 * stayed, f"{seed}: {ends}"
    late = [told for told in world.told if told.at > MINUTES_S - RECOVERED_S]
    assert len(late) > 100
    lost = [told for told in late if told.end not in ("ok", "left")]
    assert lost == [], f"{seed}: all is well again"
    assert world.flips["moved"] > 20, f"{seed}: {world.flips}"
