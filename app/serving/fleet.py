"""Every live replica: follows the registry, probes health, and says where a request may go.

What comes in: snapshots and health probes. What goes out: pools to pick from, and adapters loaded
where they are needed. Lives on the event loop only, so it needs no lock. Knows no SQL, no dialect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from app.backends.base import Backend
from app.clock import Clock
from app.domain import AdapterVersion, Replica, ReplicaState, Route
from app.errors import AdapterLoadFailed, LoragateError, UpstreamError
from app.serving.loads import FindProbe, Loads, no_probe
from app.serving.pool import LivePool
from app.serving.replica import UNKNOWN, LiveReplica
from app.serving.snapshot import Snapshot
from app.telemetry import Event, log

logger = logging.getLogger(__name__)

#: How long a round of probes waits for those that are slow.
PATIENCE_S = 1.0


class Fleet:
    """Every live replica. Use as a context manager: it owns the loads and probes under way.

    Args:
        connect: makes the backend of a replica.
        store_path: folder of a digest in the gateway's adapter store.
        store_root: the store itself, to translate for pools that mount it elsewhere.
        find_probe: finds what proves a version's weights.

    `on_change` is called when a probe should not wait for its period.
    """

    def __init__(
        self,
        connect: Callable[[Replica], Backend],
        *,
        clock: Clock,
        store_root: Path,
        store_path: Callable[[str], Path],
        find_probe: FindProbe = no_probe,
    ) -> None:
        self.pools: dict[str, LivePool] = {}
        self.loads = Loads(
            clock, store_root=store_root, store_path=store_path, find_probe=find_probe
        )
        self.retries: dict[tuple[str, str], int] = {}
        self.on_change: Callable[[], None] = lambda: None
        self._connect = connect
        self._clock = clock
        self._replicas: dict[str, LiveReplica] = {}
        self._departing: set[LiveReplica] = set()
        self._probes: dict[LiveReplica, asyncio.Task[None]] = {}
        self._tasks = asyncio.TaskGroup()
        self._snapshot = Snapshot()

    async def __aenter__(self) -> Fleet:
        await self._tasks.__aenter__()
        await self.loads.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.loads.__aexit__(*exc)
        for probe in self._probes.values():
            probe.cancel()
        await self._tasks.__aexit__(None, None, None)
        for replica in [*self._replicas.values(), *self._departing]:
            await replica.backend.close()

    def live(self) -> list[LiveReplica]:
        return list(self._replicas.values())

    def candidates(self, pool: str) -> Iterable[LiveReplica]:
        """The replicas of a pool, whatever their state."""
        return self.pools[pool].replicas if pool in self.pools else ()

    def inflight(self, upstream_name: str) -> int:
        """Requests for a version running or waiting anywhere."""
        everywhere = [*self._replicas.values(), *self._departing]
        return sum(r.busy.get(upstream_name, 0) + r.line.of(upstream_name) for r in everywhere)

    def spread(self, route: Route, wanted: int) -> Sequence[LiveReplica]:
        """The replicas that should share a batch, best first, `wanted` at most.

        Those that hold the adapter, the least loaded first; then, since a large batch is worth a
        load, those it would live on next.
        """
        pool = self.pools.get(route.pool)
        if pool is None:
            return ()
        now = self._clock.monotonic()
        name = route.upstream_name
        here = pool.replicas if route.version is None else pool.candidates(name, now)
        usable = sorted((r for r in here if r.allows(now)), key=lambda r: r.load(now))[:wanted]
        while len(usable) < wanted and (more := pool.next_best(name, now, usable)) is not None:
            usable.append(more)
        return usable

    async def prepare(self, version: AdapterVersion, pool: str, like: Iterable[str]) -> None:
        """Load a version on the replicas that hold those it will replace.

        If none does, one that carries a probe is loaded on one replica, to verify it. A replica
        that cannot be asked is left to the requests that will come.

        Raises:
            AdapterLoadFailed: every replica asked refuses it, or serves it wrongly.
        """
        found = self.pools.get(pool)
        if found is None:
            return
        name = version.upstream_name
        found.arrivals.setdefault(name, 0)  # it is about to be asked for: nobody unloads it now
        homes = {r: None for old in like for r in found.holders(old) if r.available}
        if not homes and version.probed:
            now = self._clock.monotonic()
            homes = {r: None for r in found.candidates(name, now)[:1] if r.available}
        lacking = [replica for replica in homes if self.loads.needed(replica, name, version)]
        ended = await asyncio.gather(
            *(self.loads.load(replica, version) for replica in lacking), return_exceptions=True
        )
        failed = {r for r, error in zip(lacking, ended, strict=True) if error is not None}
        ready = [replica for replica in homes if replica not in failed]
        failures = [error for error in ended if isinstance(error, AdapterLoadFailed)]
        if failures and not ready:
            raise failures[0]
        if ready:
            found.homes[name] = tuple(ready)
            found.forget_candidates(name)

    async def sync(self, snapshot: Snapshot) -> None:
        """Follow the registry: replicas that came, changed or went."""
        self._snapshot = snapshot
        self.loads.follow(snapshot.pools)
        now = self._clock.monotonic()
        for name, config in snapshot.pools.items():
            if name in self.pools:
                self.pools[name].configure(config)
            else:
                self.pools[name] = LivePool(config, now)
        known = self._replicas
        for gone in known.keys() - snapshot.replicas.keys():
            self._depart(known.pop(gone))
        for replica in snapshot.replicas.values():
            self._follow(replica)
        by_pool: dict[str, list[LiveReplica]] = {name: [] for name in snapshot.pools}
        for live in known.values():
            by_pool[live.pool].append(live)
        for name, replicas in by_pool.items():
            if self.pools[name].replicas != replicas:
                self.pools[name].consists_of(replicas)
        for name in self.pools.keys() - snapshot.pools.keys():
            del self.pools[name]
        for live in [gone for gone in self._departing if not gone.inflight]:
            self._departing.discard(live)
            await live.backend.close()

    def _follow(self, replica: Replica) -> None:
        live = self._replicas.get(replica.id)
        if live is not None and _same_server(live.replica, replica):
            live.follow(replica)
            return
        if live is not None:
            self._depart(live)
        backend = self._connect(replica)
        pool = self.pools[replica.pool]
        self._replicas[replica.id] = LiveReplica(replica, backend, pool, self._clock)
        self.on_change()

    def _depart(self, replica: LiveReplica) -> None:
        replica.turned(ReplicaState.DRAINING, "removed from the registry")
        self._departing.add(replica)

    async def probe(self) -> dict[str, object]:
        """Ask every replica whether it is well; one that came back tells what it holds.

        One that is slow to answer is not waited for: it is asked again when it has answered.
        """
        for replica in self.live():
            if replica not in self._probes:
                self._probes[replica] = self._tasks.create_task(self._probe_and_log(replica))
        if self._probes:
            await asyncio.wait(self._probes.values(), timeout=PATIENCE_S)
        return {replica.id: replica.state.value for replica in self.live()}

    async def _probe_and_log(self, replica: LiveReplica) -> None:
        try:
            await self._probe(replica)
        except Exception:  # one probe must not end the task group of all
            logger.exception(Event.TASK_FAILED.value)
        finally:
            del self._probes[replica]

    async def _probe(self, replica: LiveReplica) -> None:
        deaths = replica.deaths
        if not await replica.backend.healthy():
            replica.turned(ReplicaState.UNHEALTHY, "the health probe failed")
            return
        try:
            before = replica.status
            status = await replica.backend.status()
            restarted = before is not None and before.started_at != status.started_at
            if replica.state is not ReplicaState.HEALTHY or restarted:
                known = await replica.backend.list_adapters()
                versions = map(self._snapshot.version, known)
                replica.restarted(known, (v for v in versions if v is not None))
        except UpstreamError as exc:
            replica.turned(ReplicaState.UNHEALTHY, str(exc))
            return
        if replica.features is UNKNOWN:
            with suppress(UpstreamError):  # in a long step it may not answer: the next probe asks
                replica.features = await replica.backend.features()
        replica.seen(status)
        if deaths == replica.deaths:  # else it answered before a request found it dead
            replica.turned(ReplicaState.HEALTHY, "the health probe succeeded")

    def died(self, replica: LiveReplica, error: UpstreamError) -> None:
        """A request found it dead: no need to wait for the probe to find out."""
        replica.deaths += 1
        replica.turned(ReplicaState.UNHEALTHY, str(error))
        self.on_change()

    def count_retry(self, pool: str, because: LoragateError) -> None:
        """A request is sent once more; `retries` counts those by (pool, reason)."""
        key = (pool, because.code)
        self.retries[key] = self.retries.get(key, 0) + 1

    def distrust(self, upstream_name: str) -> None:
        """What proves this version changed: it is verified again before it is served."""
        for replica in self.live():
            replica.verified.discard(upstream_name)
            replica.quarantined.pop(upstream_name, None)

    def lost(self, replica: LiveReplica, version: AdapterVersion) -> None:
        """The replica answered that it does not know this adapter."""
        name = version.upstream_name
        if replica.forget(name):
            log(logger, logging.WARNING, Event.ADAPTER_LOST, replica=replica.id, adapter=name)


def _same_server(one: Replica, other: Replica) -> bool:
    return (one.url, one.api_key, one.pool, one.dialect) == (
        other.url,
        other.api_key,
        other.pool,
        other.dialect,
    )
