"""One replica as the data plane knows it now: state, claims, residency, and who waits for a place.

What comes in: probes, claims and how requests ended. What goes out: whether it takes a request,
and its load. Lives on the event loop only, so its counters need no lock. Knows no SQL, no dialect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from itertools import count
from typing import TYPE_CHECKING

from app.backends.base import Backend, EngineStatus, Features
from app.clock import Clock
from app.domain import AdapterVersion, Replica, ReplicaState
from app.serving.breaker import Breaker
from app.serving.line import Line, Waiter
from app.serving.rendezvous import key
from app.serving.residency import Residency
from app.telemetry import Event, log

if TYPE_CHECKING:
    from app.serving.pool import LivePool

logger = logging.getLogger(__name__)

#: What an engine gets right before it said so.
UNKNOWN = Features(False, False, False)
#: For how long a replica that turned healthy gets less than its share, rising.
SLOW_START_S = 10.0
_LEAST_SHARE = 0.1
#: How long an adapter may wait for a slot before one that has a slot must let its requests run out.
QUANTUM_S = 0.5
#: KV cache use from which a replica preempts: as good as a full one.
_KV_FULL = 0.97
#: Numbers the claims of all replicas, to tell which one was left alone the longest.
_claims = count(1)


class LiveReplica:
    """One replica. Every `claim` has one `release`.

    `busy` counts requests in flight by adapter version (upstream name); those of the base are in
    `inflight` alone. `deaths` counts how often a request found it dead. `verified` are versions
    whose probe agreed, `quarantined` maps those whose probe did not to what it found. `lm_head`
    are versions it holds that change the output layer.
    """

    def __init__(self, replica: Replica, backend: Backend, pool: LivePool, clock: Clock) -> None:
        self.backend = backend
        self.in_pool = pool
        self.state = ReplicaState.ADDING
        self.available = False
        self.features = UNKNOWN
        self.status: EngineStatus | None = None
        self.deaths = 0
        self.key = key(replica.id)
        self.bit = pool.new_bit()
        self.inflight = 0
        self.last_claim = 0
        self.busy: dict[str, int] = {}
        self.breaker = Breaker()
        self.line = Line()
        self.residency = Residency(pool.config.max_loras, pool.config.cpu_slots)
        self.quarantined: dict[str, str] = {}
        self.verified: set[str] = set()
        self.lm_head: set[str] = set()
        self.loads: dict[str, asyncio.Future[None]] = {}
        self.load_turn = asyncio.Lock()
        self.refused: dict[tuple[str, str], tuple[float, str]] = {}
        self._clock = clock
        self._elsewhere = 0
        self._healthy_at: float | None = None
        self._retiring: str | None = None
        self._used = ""
        self.replica = replica

    @property
    def id(self) -> str:
        return self.replica.id

    @property
    def pool(self) -> str:
        return self.replica.pool

    @property
    def url(self) -> str:
        return self.replica.url

    def follow(self, replica: Replica) -> None:
        """The registry says something new of it: a flag, say."""
        self.replica = replica
        self._reconsider()

    # taking requests

    def allows(self, now: float) -> bool:
        """Whether a request may be sent there, at once or after waiting in its line."""
        return self.available and (self.breaker.closed or self.breaker.allows(now))

    def takes(self, name: str) -> bool:
        """Whether it has a place for one more request of `name` now.

        An engine steps at most `max_loras` adapters at once and skips the requests of others for
        as long as it takes, whoever came first. So those wait here, where turns are fair.
        """
        config = self.in_pool.config
        if self.inflight >= config.max_inflight:
            return False
        if name == config.served_name:
            return True
        if name in self.busy:
            return name != self._retiring
        return len(self.busy) < config.max_loras

    def claim(self, name: str) -> None:
        """Take a place."""
        self.inflight += 1
        self.last_claim = next(_claims)
        pool = self.in_pool
        pool.inflight += 1
        if not self.breaker.closed:
            self.breaker.began()
        if name != pool.config.served_name:
            self.busy[name] = self.busy.get(name, 0) + 1
            pool.arrivals[name] = pool.arrivals.get(name, 0) + 1
            if name != self._used and name in self.residency.known:
                self._used = name
                self.residency.used(name)

    def release(self, name: str) -> None:
        self.inflight -= 1
        self.in_pool.inflight -= 1
        left = self.busy.get(name, 0) - 1
        if left > 0:
            self.busy[name] = left
        elif left == 0:
            del self.busy[name]
            if name == self._retiring:
                self._retiring = None
        if self.line.length:
            self.serve_line()

    async def wait(self, name: str) -> bool:
        """Wait in line for a claim; False when the replica went away: look for another one."""
        waiter = Waiter(name, self._clock.monotonic(), asyncio.get_running_loop().create_future())
        self.line.join(waiter)
        self.in_pool.waiting += 1
        self.serve_line()
        try:
            return await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.cancelled():
                if self.line.leave(waiter):
                    self.in_pool.waiting -= 1
                    self.serve_line()  # the slot it wanted need not be given up any more
            elif waiter.turn.result():
                self.breaker.abandoned()
                self.release(name)  # it was just given a claim, and nobody is there to use it
            raise

    def serve_line(self) -> None:
        """Give free places to those who wait."""
        now = self._clock.monotonic()
        self._rotate()
        while self.allows(now) and (waiter := self.line.pop(self.takes)) is not None:
            self.in_pool.waiting -= 1
            if not waiter.turn.done():
                self.claim(waiter.name)
                waiter.turn.set_result(True)
            self._rotate()
        if not self.allows(now):
            self._send_away()  # one of them tries a half-open breaker, and may do so for long

    def _rotate(self) -> None:
        """Let the adapter that has had its slot for longest run out, if another waited too long."""
        since = None
        if len(self.busy) >= self.in_pool.config.max_loras:
            since = self.line.eldest(self._slotless)
        if since is None:
            self._retiring = None
        elif self._retiring is None and self._clock.monotonic() - since >= QUANTUM_S:
            self._retiring = next(iter(self.busy))

    def _slotless(self, name: str) -> bool:
        return name not in self.busy and name != self.in_pool.config.served_name

    def tripped(self, error: Exception) -> None:
        """Its breaker opened: who waits looks for another replica."""
        log(
            logger,
            logging.WARNING,
            Event.REPLICA_BREAKER,
            replica=self.id,
            pool=self.pool,
            reason=str(error),
        )
        self._send_away()

    # load and health

    def load(self, now: float) -> float:
        """Requests running or waiting there, through any gateway; more than that in slow start."""
        load = self.inflight + self.line.length + self._elsewhere
        if self._healthy_at is None:
            return load
        share = (now - self._healthy_at) / SLOW_START_S
        if share >= 1:
            self._healthy_at = None
            return load
        return (load + 1) / max(share, _LEAST_SHARE)

    def seen(self, status: EngineStatus) -> None:
        """What its metrics say."""
        self.status = status
        self._elsewhere = max(0, status.running + status.waiting - self.inflight)
        if status.kv_cache_usage > _KV_FULL:
            self._elsewhere += self.in_pool.config.max_inflight

    def turned(self, state: ReplicaState, reason: str) -> None:
        """Note a change of state, if it is one: a replica that departed stays so."""
        if state is self.state or self.state is ReplicaState.DRAINING:
            return
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
        if state is ReplicaState.HEALTHY:
            self._healthy_at = self._clock.monotonic()
            self.breaker = Breaker()
        self._reconsider()

    def _reconsider(self) -> None:
        healthy = self.state is ReplicaState.HEALTHY
        self.available = healthy and not (self.replica.cordoned or self.replica.draining)
        if not self.available:
            self._send_away()

    def _send_away(self) -> None:
        for waiter in self.line.clear():
            self.in_pool.waiting -= 1
            if not waiter.turn.done():
                waiter.turn.set_result(False)

    # adapters

    def holds(self, upstream_name: str, digest: str) -> bool:
        """Whether it is believed to serve this version, from these very files.

        The digest is the last part of the path: an engine may still have another registry's
        adapter under the same name.
        """
        path = self.residency.known.get(upstream_name)
        return path is not None and path.endswith(digest)

    def restarted(self, known: dict[str, str], versions: Iterable[AdapterVersion]) -> None:
        """The engine is another one than before: its caches are empty but for what it lists.

        `versions` are those of the registry among `known`.
        """
        self.residency.restart(known)
        self._used = ""
        self.bit = self.in_pool.new_bit()
        self.features = UNKNOWN
        self.refused.clear()
        self.quarantined.clear()
        self.verified.clear()
        self.lm_head = {v.upstream_name for v in versions if v.targets_lm_head}
        self.in_pool.forget_candidates()

    def forget(self, upstream_name: str) -> bool:
        """It does not know this adapter any more; whether it was believed to."""
        self.in_pool.forget_candidates(upstream_name)
        self.quarantined.pop(upstream_name, None)
        self.verified.discard(upstream_name)
        self.lm_head.discard(upstream_name)
        return self.residency.forget(upstream_name)

    def loaded(self, upstream_name: str, path: str) -> None:
        """It has read an adapter's weights."""
        self._used = upstream_name
        self.residency.loaded(upstream_name, path)

    async def list_adapters(self) -> dict[str, str]:
        """What the engine itself says it has: name -> path."""
        return await self.backend.list_adapters()

    async def unload(self, upstream_name: str) -> None:
        """Make the engine forget an adapter, unless a load of it is under way."""
        self.forget(upstream_name)
        async with self.load_turn:  # a load asked for from now on comes after
            if upstream_name in self.residency.known:
                return
            await self.backend.unload_adapter(upstream_name)
        log(logger, logging.INFO, Event.ADAPTER_UNLOADED, replica=self.id, adapter=upstream_name)
