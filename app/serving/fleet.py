"""The live side of the replicas: state, requests in flight, adapters they hold.

What comes in: snapshots, probes and claims. What goes out: candidates to pick from. Lives on the
event loop only, so claims and counters need no lock. Knows no SQL and no dialect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path, PurePosixPath

from app.backends.base import Backend
from app.clock import Clock
from app.domain import AdapterVersion, Pool, Replica, ReplicaState, Route
from app.errors import AdapterLoadFailed, LoragateError, UpstreamBroke, UpstreamError
from app.serving.snapshot import Snapshot
from app.telemetry import Event, log

logger = logging.getLogger(__name__)

#: How long a refused load is remembered, so that clients' retries do not stall the replica.
REFUSAL_S = 10.0
#: Numbers the claims of all replicas, to tell which one was left alone the longest.
_claims = count(1)


class LiveReplica:
    """One replica as the data plane knows it now.

    `resident` maps the upstream names of adapters believed to be loaded to their paths; an engine
    restart empties it, found by a health probe or by a 404.
    """

    def __init__(self, replica: Replica, backend: Backend) -> None:
        self.replica = replica
        self.backend = backend
        self.state = ReplicaState.ADDING
        self.inflight = 0
        self.last_claim = 0
        self.resident: dict[str, str] = {}
        self.inflight_by_name: dict[str, int] = {}
        self.loads: dict[str, asyncio.Future[None]] = {}
        self.refused: dict[tuple[str, str], tuple[float, str]] = {}

    @property
    def id(self) -> str:
        return self.replica.id

    @property
    def pool(self) -> str:
        return self.replica.pool

    @property
    def url(self) -> str:
        return self.replica.url

    @property
    def available(self) -> bool:
        """Takes new requests."""
        return (
            self.state is ReplicaState.HEALTHY
            and not self.replica.cordoned
            and not self.replica.draining
        )

    def holds(self, upstream_name: str, digest: str) -> bool:
        """Whether it is believed to serve this version, from these very files.

        The digest is the last part of the path: an engine may still have another registry's
        adapter under the same name.
        """
        path = self.resident.get(upstream_name)
        return path is not None and path.endswith(digest)

    def claim(self, upstream_name: str) -> None:
        """Take a slot; every claim has one `release`."""
        self.inflight += 1
        self.last_claim = next(_claims)
        self.inflight_by_name[upstream_name] = self.inflight_by_name.get(upstream_name, 0) + 1

    def release(self, upstream_name: str) -> None:
        self.inflight -= 1
        left = self.inflight_by_name[upstream_name] - 1
        if left:
            self.inflight_by_name[upstream_name] = left
        else:
            del self.inflight_by_name[upstream_name]

    def turned(self, state: ReplicaState, reason: str) -> None:
        """Note a change of state, if it is one: a replica that departed stays so."""
        if state is not self.state and self.state is not ReplicaState.DRAINING:
            log(
                logger,
                logging.INFO if state is ReplicaState.HEALTHY else logging.WARNING,
                Event.REPLICA_STATE,
                replica=self.id,
                pool=self.pool,
                was=self.state.value,
                now=state.value,
                reason=reason,
            )
            self.state = state

    async def list_adapters(self) -> dict[str, str]:
        """What the engine itself says it has: name -> path."""
        return await self.backend.list_adapters()

    async def unload(self, upstream_name: str) -> None:
        """Make the engine forget an adapter."""
        self.resident.pop(upstream_name, None)
        await self.backend.unload_adapter(upstream_name)
        log(logger, logging.INFO, Event.ADAPTER_UNLOADED, replica=self.id, adapter=upstream_name)


class Fleet:
    """Every live replica. Use as a context manager: it owns the adapter loads under way.

    Args:
        connect: makes the backend of a replica.
        store_path: folder of a digest in the gateway's adapter store.
        store_root: the store itself, to translate for pools that mount it elsewhere.

    `on_change` is called when a probe should not wait for its period.
    """

    def __init__(
        self,
        connect: Callable[[Replica], Backend],
        *,
        clock: Clock,
        store_root: Path,
        store_path: Callable[[str], Path],
    ) -> None:
        self._connect = connect
        self._clock = clock
        self._store_root = store_root
        self._store_path = store_path
        self._replicas: dict[str, LiveReplica] = {}
        self._by_pool: dict[str, list[LiveReplica]] = {}
        self._pools: dict[str, Pool] = {}
        self._paths: dict[tuple[str, str], str] = {}
        self._tasks = asyncio.TaskGroup()
        self._loading: set[asyncio.Task[None]] = set()
        self._departing: set[LiveReplica] = set()
        self.loads: dict[tuple[str, str], int] = {}
        self.on_change: Callable[[], None] = lambda: None

    async def __aenter__(self) -> Fleet:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._loading:
            task.cancel()
        await self._tasks.__aexit__(None, None, None)
        for replica in [*self._replicas.values(), *self._departing]:
            await replica.backend.close()

    def live(self) -> list[LiveReplica]:
        return list(self._replicas.values())

    def candidates(self, pool: str) -> Iterable[LiveReplica]:
        """The replicas of a pool, whatever their state."""
        return self._by_pool.get(pool, ())

    def spread(self, route: Route, wanted: int) -> Sequence[LiveReplica]:
        """The replicas that should share a batch, best first; at most `wanted`."""
        able = [replica for replica in self.candidates(route.pool) if replica.available]
        return sorted(able, key=lambda replica: (replica.inflight, replica.last_claim))[:wanted]

    def inflight(self, upstream_name: str) -> int:
        """Requests for a version running anywhere."""
        everywhere = [*self._replicas.values(), *self._departing]
        return sum(replica.inflight_by_name.get(upstream_name, 0) for replica in everywhere)

    async def sync(self, snapshot: Snapshot) -> None:
        """Follow the registry: replicas that came, changed or went."""
        if self._pools != snapshot.pools:
            self._pools = dict(snapshot.pools)
            self._paths.clear()
        known = self._replicas
        for gone in known.keys() - snapshot.replicas.keys():
            self._depart(known.pop(gone))
        for replica in snapshot.replicas.values():
            live = known.get(replica.id)
            if live is None or (live.replica.url, live.replica.api_key) != (
                replica.url,
                replica.api_key,
            ):
                if live is not None:
                    self._depart(live)
                known[replica.id] = LiveReplica(replica, self._connect(replica))
                self.on_change()
            else:
                live.replica = replica
        by_pool: dict[str, list[LiveReplica]] = {}
        for live in known.values():
            by_pool.setdefault(live.pool, []).append(live)
        self._by_pool = by_pool
        for live in [gone for gone in self._departing if not gone.inflight]:
            self._departing.discard(live)
            await live.backend.close()

    def _depart(self, replica: LiveReplica) -> None:
        replica.turned(ReplicaState.DRAINING, "removed from the registry")
        self._departing.add(replica)

    async def probe(self) -> dict[str, object]:
        """Ask every replica whether it is well; one that came back tells what it holds."""
        async with asyncio.TaskGroup() as tasks:
            for replica in self.live():
                tasks.create_task(self._probe(replica))
        return {replica.id: replica.state.value for replica in self.live()}

    async def _probe(self, replica: LiveReplica) -> None:
        if not await replica.backend.healthy():
            replica.turned(ReplicaState.UNHEALTHY, "the health probe failed")
            return
        if replica.state is ReplicaState.HEALTHY:
            return
        try:
            replica.resident = await replica.backend.list_adapters()
        except UpstreamError as exc:
            replica.turned(ReplicaState.UNHEALTHY, str(exc))
            return
        replica.refused.clear()
        replica.turned(ReplicaState.HEALTHY, "the health probe succeeded")

    def refused_connection(self, replica: LiveReplica, error: UpstreamError) -> None:
        """A request could not reach it: no need to wait for the probe to find out."""
        replica.turned(ReplicaState.UNHEALTHY, str(error))
        self.on_change()

    async def load(self, replica: LiveReplica, version: AdapterVersion) -> None:
        """Return once the replica holds the version, loading it at most once at a time.

        Raises:
            AdapterLoadFailed: the replica refuses these weights.
            UpstreamError: the replica could not be asked.
        """
        name = version.upstream_name
        path = self._seen_path(replica.pool, version.digest)
        refusal = replica.refused.get((name, path))
        if refusal is not None and self._clock.monotonic() < refusal[0]:
            raise AdapterLoadFailed(refusal[1])
        load = replica.loads.get(name)
        if load is None:
            load = replica.loads[name] = asyncio.get_running_loop().create_future()
            task = self._tasks.create_task(self._load(replica, name, path, load))
            self._loading.add(task)
            task.add_done_callback(self._loading.discard)
        # Shielded: the load goes on for the others when the request that began it leaves.
        await asyncio.shield(load)

    def lost(self, replica: LiveReplica, version: AdapterVersion) -> None:
        """The replica answered that it does not know this adapter."""
        if replica.resident.pop(version.upstream_name, None) is not None:
            log(
                logger,
                logging.WARNING,
                Event.ADAPTER_LOST,
                replica=replica.id,
                adapter=version.upstream_name,
            )

    def _seen_path(self, pool: str, digest: str) -> str:
        """The version's folder as the pool's replicas see it."""
        seen = self._paths.get((pool, digest))
        if seen is None:
            path = self._store_path(digest)
            mount = self._pools[pool].store_mount if pool in self._pools else None
            inside = path.relative_to(self._store_root)
            seen = str(path) if mount is None else str(PurePosixPath(mount) / inside)
            self._paths[(pool, digest)] = seen
        return seen

    async def _load(
        self, replica: LiveReplica, name: str, path: str, load: asyncio.Future[None]
    ) -> None:
        started = self._clock.monotonic()
        try:
            await replica.backend.load_adapter(name, path)
        except LoragateError as exc:
            self._count_load(replica, "failed")
            if isinstance(exc, AdapterLoadFailed):
                until = self._clock.monotonic() + REFUSAL_S
                replica.refused[(name, path)] = (until, str(exc))
            _settle(load, exc)
        except Exception:  # one load must not end the task group of all
            logger.exception(Event.REQUEST_CRASHED.value)
            _settle(load, UpstreamBroke(f"the load of {name} failed; the gateway's log says why"))
        except asyncio.CancelledError:
            _settle(load, UpstreamBroke(f"the load of {name} was interrupted"))
            raise
        else:
            self._count_load(replica, "loaded")
            replica.resident[name] = path
            log(
                logger,
                logging.INFO,
                Event.ADAPTER_LOADED,
                replica=replica.id,
                adapter=name,
                duration_s=round(self._clock.monotonic() - started, 4),
            )
            _settle(load, None)
        finally:
            replica.loads.pop(name, None)

    def _count_load(self, replica: LiveReplica, result: str) -> None:
        key = (replica.pool, result)
        self.loads[key] = self.loads.get(key, 0) + 1


def _settle(load: asyncio.Future[None], error: LoragateError | None) -> None:
    if error is None:
        load.set_result(None)
    else:
        load.set_exception(error)
        load.exception()  # seen, even if every waiter has left
