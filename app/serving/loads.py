"""Adapter loads: once however many wait for it, one at a time on a replica, verified after.

What comes in: a replica and the version it should hold. What goes out: that it holds it, or why
not. Knows no SQL: the numbers that prove a version's weights come through a callable.

A load runs inside the engine's loop and stalls every sequence it decodes, so a replica is given
one at a time. What its probe shows to be served wrongly is quarantined there: nothing proves more
surely that a replica has the wrong weights, or computes with them wrongly, than its own numbers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path, PurePosixPath

from app.clock import Clock
from app.domain import AdapterVersion, Pool, Probe
from app.errors import AdapterLoadFailed, LoragateError, ProbeFailed, UpstreamBroke, UpstreamError
from app.serving.prompt_logprobs import refusal
from app.serving.replica import LiveReplica
from app.serving.verify import compare
from app.telemetry import Event, log

logger = logging.getLogger(__name__)

#: How long a refused load is remembered, so that clients' retries do not stall the replica.
REFUSAL_S = 10.0

#: Finds the probe of a version; None if it has none.
FindProbe = Callable[[AdapterVersion], Awaitable[Probe | None]]


async def no_probe(_: AdapterVersion) -> Probe | None:
    """For a fleet without a registry behind it."""
    return None


class Loads:
    """The loads under way. Use as a context manager: it owns their tasks.

    Args:
        store_root: the adapter store, to translate for pools that mount it elsewhere.
        store_path: folder of a digest in it.
        find_probe: how to verify a version that was registered with a probe.

    `counts` are ended loads by (pool, result).
    """

    def __init__(
        self,
        clock: Clock,
        *,
        store_root: Path,
        store_path: Callable[[str], Path],
        find_probe: FindProbe,
    ) -> None:
        self.counts: dict[tuple[str, str], int] = {}
        self._clock = clock
        self._store_root = store_root
        self._store_path = store_path
        self._find_probe = find_probe
        self._mounts: dict[str, str | None] = {}
        self._paths: dict[tuple[str, str], str] = {}
        self._tasks = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Loads:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._running:
            task.cancel()
        await self._tasks.__aexit__(None, None, None)

    def follow(self, pools: Mapping[str, Pool]) -> None:
        """Pools may see the store elsewhere than before."""
        mounts = {pool.name: pool.store_mount for pool in pools.values()}
        if mounts != self._mounts:
            self._mounts = mounts
            self._paths.clear()

    def needed(self, replica: LiveReplica, name: str, version: AdapterVersion) -> bool:
        """Whether a request for a version, by its upstream name, must wait for `load` first."""
        if not replica.holds(name, version.digest):
            return True
        return version.probed and name not in replica.verified

    async def load(self, replica: LiveReplica, version: AdapterVersion) -> None:
        """Return once the replica holds the version, verified if it can be.

        Raises:
            ProbeFailed: it holds the version and serves it wrongly.
            AdapterLoadFailed: the replica refuses these weights.
            UpstreamError: the replica could not be asked.
        """
        name = version.upstream_name
        if (why := replica.quarantined.get(name)) is not None:
            raise ProbeFailed(why)
        path = self._seen_path(replica.pool, version.digest)
        refusal = replica.refused.get((name, path))
        if refusal is not None and self._clock.monotonic() < refusal[0]:
            raise AdapterLoadFailed(refusal[1])
        load = replica.loads.get(name)
        if load is None:
            load = replica.loads[name] = asyncio.get_running_loop().create_future()
            replica.in_pool.forget_candidates(name)
            task = self._tasks.create_task(self._run(replica, version, path, load))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        # Shielded: the load goes on for the others when the request that began it leaves.
        await asyncio.shield(load)

    async def _run(
        self,
        replica: LiveReplica,
        version: AdapterVersion,
        path: str,
        load: asyncio.Future[None],
    ) -> None:
        name = version.upstream_name
        try:
            async with replica.load_turn:
                if not replica.holds(name, version.digest):
                    await self._load(replica, version, path)
                if version.probed:
                    await self._verify(replica, version)
        except LoragateError as exc:
            if type(exc) is AdapterLoadFailed:
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
            _settle(load, None)
        finally:
            replica.loads.pop(name, None)
            replica.in_pool.forget_candidates(name)

    async def _load(self, replica: LiveReplica, version: AdapterVersion, path: str) -> None:
        name = version.upstream_name
        started = self._clock.monotonic()
        try:
            await replica.backend.load_adapter(name, path)
        except BaseException:
            self._count(replica, "failed")
            raise
        self._count(replica, "loaded")
        replica.loaded(name, path)
        if version.targets_lm_head:
            replica.lm_head.add(name)
        duration_s = round(self._clock.monotonic() - started, 4)
        _log(logging.INFO, Event.ADAPTER_LOADED, replica, name, duration_s=duration_s)

    async def _verify(self, replica: LiveReplica, version: AdapterVersion) -> None:
        name = version.upstream_name
        probe = await self._find_probe(version)
        if probe is not None:
            unproven = refusal(version, replica.features)
            if unproven is None:
                try:
                    served = await replica.backend.score(name, probe.token_ids)
                except UpstreamError as exc:
                    if type(exc) is not UpstreamError:
                        raise
                    unproven = str(exc)  # it declines: the probe is longer than its context, say
            if unproven is not None:
                _log(logging.WARNING, Event.ADAPTER_UNVERIFIED, replica, name, reason=unproven)
            elif not (verdict := compare(probe, served, replica.features.dtype or "")).ok:
                why = f"The replica {replica.id} serves {name!r} wrongly: {verdict}"
                replica.quarantined[name] = why
                self._count(replica, "quarantined")
                _log(logging.ERROR, Event.ADAPTER_QUARANTINED, replica, name, reason=str(verdict))
                raise ProbeFailed(why)
        replica.verified.add(name)

    def _seen_path(self, pool: str, digest: str) -> str:
        """The version's folder as the pool's replicas see it."""
        seen = self._paths.get((pool, digest))
        if seen is None:
            path = self._store_path(digest)
            mount = self._mounts.get(pool)
            inside = path.relative_to(self._store_root)
            seen = str(path) if mount is None else str(PurePosixPath(mount) / inside)
            self._paths[(pool, digest)] = seen
        return seen

    def _count(self, replica: LiveReplica, result: str) -> None:
        key = (replica.pool, result)
        self.counts[key] = self.counts.get(key, 0) + 1


def _log(level: int, event: Event, replica: LiveReplica, adapter: str, **fields: object) -> None:
    log(logger, level, event, replica=replica.id, adapter=adapter, **fields)


def _settle(load: asyncio.Future[None], error: LoragateError | None) -> None:
    if error is None:
        load.set_result(None)
    else:
        load.set_exception(error)
        load.exception()  # seen, even if every waiter has left
