"""Brings each adapter version to the replicas it is asked for on, ahead of its traffic.

What comes in: requests by version since the last run, and what each replica holds. What goes out:
homes for the data plane to route by, loads and unloads.

A version is loaded on a new home before requests go there, since those prefer replicas that hold
it. A version that no alias points to and nobody asks for any more is unloaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from itertools import groupby

from app.clock import Clock
from app.control.placement import NOTHING, Plan, Seen, Wanted, plan
from app.domain import AdapterVersion
from app.errors import LoragateError
from app.serving.fleet import Fleet
from app.serving.pool import LivePool
from app.serving.replica import LiveReplica
from app.serving.snapshot import Snapshot, Snapshots

#: Half of the demand is what came in the last so many seconds.
HALF_LIFE_S = 5.0
PERIOD_S = 0.5
#: How long a run waits for what it began; a load goes on, and the next run finds it.
PATIENCE_S = 2.0


class Demand:
    """Smoothed demand of a pool's versions."""

    def __init__(self, now: float) -> None:
        self.rates: dict[str, float] = {}
        self.at_once: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._at = now

    def update(self, pool: LivePool, now: float) -> None:
        """Take what came since the last time."""
        elapsed = max(now - self._at, 1e-3)
        self._at = now
        old = 0.5 ** (elapsed / HALF_LIFE_S)
        arrivals, pool.arrivals = pool.arrivals, {}
        counts: dict[str, int] = {}
        for replica in pool.replicas:
            for there in (replica.busy, replica.line.counts()):
                for name, count in there.items():
                    counts[name] = counts.get(name, 0) + count
        counts.pop(pool.config.served_name, None)
        rates = {name: rate * old for name, rate in self.rates.items()}
        for name, count in arrivals.items():
            rates[name] = rates.get(name, 0.0) + (1 - old) * count / elapsed
        at_once = {name: value * old for name, value in self.at_once.items()}
        for name, count in counts.items():
            at_once[name] = at_once.get(name, 0.0) + (1 - old) * count
            # It is being answered, or waits, however long ago it came.
            rates[name] = max(rates.get(name, 0.0), NOTHING)
        self.rates = {name: rate for name, rate in rates.items() if rate >= NOTHING}
        self.at_once = {name: value for name, value in at_once.items() if name in self.rates}
        for name in {**arrivals, **counts}:
            self.last[name] = now

    def idle_s(self, name: str, now: float) -> float:
        """For how long nobody asked for it; since it was first looked at, if nobody ever did."""
        return now - self.last.setdefault(name, now)


class Place:
    """Reconciles where versions are with where they are asked for.

    `grace_s`: how long a version that no alias points to stays loaded after its last request.
    """

    def __init__(self, fleet: Fleet, snapshots: Snapshots, clock: Clock, *, grace_s: float) -> None:
        self._fleet = fleet
        self._snapshots = snapshots
        self._clock = clock
        self._grace_s = grace_s
        self._demands: dict[str, Demand] = {}

    async def activate(self) -> dict[str, object]:
        """Plan every pool anew, and do what the plans say."""
        snapshot = self._snapshots.current
        done = {"homes": 0, "loaded": 0, "unloaded": 0, "failed": 0}
        for name, pool in list(self._fleet.pools.items()):
            now = self._clock.monotonic()
            demand = self._demands.setdefault(name, Demand(now))
            demand.update(pool, now)
            over = self._over(pool, demand, snapshot, now)
            made = plan(
                [
                    Wanted(
                        version,
                        rate,
                        demand.at_once.get(version, 0.0),
                        tuple(r.id for r in pool.homes.get(version, ())),
                    )
                    for version, rate in demand.rates.items()
                    if version not in over
                ],
                [_seen(replica) for replica in pool.replicas if replica.available],
                over,
            )
            _follow(pool, made)
            done["homes"] += sum(map(len, made.homes.values()))
            await self._apply(pool, made, snapshot, done)
        for gone in self._demands.keys() - self._fleet.pools.keys():
            del self._demands[gone]
        return {**done}

    def _over(
        self, pool: LivePool, demand: Demand, snapshot: Snapshot, now: float
    ) -> frozenset[str]:
        """Versions that no alias points to and nobody asks for."""
        held = {name for replica in pool.replicas for name in replica.residency.known}
        over = set()
        for name in held:
            version = snapshot.version(name)
            if version is None or _aliased(snapshot, version):
                continue
            if demand.idle_s(name, now) >= self._grace_s and not self._fleet.inflight(name):
                over.add(name)
        for name in demand.last.keys() - held - demand.rates.keys():
            del demand.last[name]
        return frozenset(over)

    async def _apply(
        self, pool: LivePool, made: Plan, snapshot: Snapshot, done: dict[str, int]
    ) -> None:
        replicas = {replica.id: replica for replica in pool.replicas}
        by_replica = groupby(sorted(made.loads, key=lambda a: a.replica), key=lambda a: a.replica)
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
                for id, actions in by_replica:
                    found = [snapshot.version(action.name) for action in actions]
                    versions = [version for version in found if version is not None]
                    tasks.create_task(self._load_all(replicas[id], versions, done))
                for action in made.unloads:
                    tasks.create_task(self._unload(replicas[action.replica], action.name, done))

    async def _load_all(
        self, replica: LiveReplica, versions: Sequence[AdapterVersion], done: dict[str, int]
    ) -> None:
        for version in versions:
            done[await _tried(self._fleet.loads.load(replica, version), "loaded")] += 1

    async def _unload(self, replica: LiveReplica, name: str, done: dict[str, int]) -> None:
        # An alias may be about to point to it, or do so since the plan was made.
        wanted = name in replica.in_pool.arrivals or self._fleet.inflight(name)
        if not wanted:
            done[await _tried(replica.unload(name), "unloaded")] += 1


async def _tried(work: Coroutine[object, object, None], result: str) -> str:
    try:
        await work
    except LoragateError:
        return "failed"  # logged where it happened; the next run tries again
    return result


def _aliased(snapshot: Snapshot, version: AdapterVersion) -> bool:
    aliases = snapshot.adapters[version.adapter].aliases.values()
    return any(number == version.number for alias in aliases for number, _ in alias.targets)


def _seen(replica: LiveReplica) -> Seen:
    residency = replica.residency
    return Seen(replica.id, residency.memory, frozenset(residency.known))


def _follow(pool: LivePool, made: Plan) -> None:
    replicas = {replica.id: replica for replica in pool.replicas}
    pool.rehome({name: [replicas[id] for id in homes] for name, homes in made.homes.items()})
