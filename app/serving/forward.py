"""The attempt loop: pick -> claim, or wait for a place -> load if needed -> send.

What comes in: a request and its route. What goes out: a `Reply` that holds its claim until it
closes. Sends again only before the first byte of an answer, within a budget. Knows nothing of the
client.
"""

from __future__ import annotations

import asyncio
from functools import partial

from app.backends.base import BufferedBody, Reply
from app.clock import Clock
from app.domain import AdapterVersion, Route
from app.errors import (
    AdapterLoadFailed,
    AdapterQueueFull,
    LoragateError,
    NoReplicaAvailable,
    PoolFull,
    ProbeFailed,
    PromptLogprobsUnsupported,
    UpstreamBroke,
    UpstreamError,
    UpstreamRefused,
)
from app.serving import retries
from app.serving.fleet import Fleet
from app.serving.policies import pick
from app.serving.pool import LivePool
from app.serving.prompt_logprobs import refusal
from app.serving.replica import LiveReplica
from app.serving.request import InferenceRequest

MAX_ATTEMPTS = 3
#: A request that was sent when its replica died may be why it died: it gets one more.
MAX_BROKEN = 2
_UNKNOWN_MODEL = b"does not exist"
#: How vLLM says that the engine behind its live server is dead.
_DEAD_ENGINE = (b"EngineDeadError", b"EngineCore encountered an issue")
#: vLLM's queue is full; 429 is what a proxy in front of it may say.
_OVERLOADED = (503, 429)
#: Answers that have to be read before it is clear what they mean.
_ODD = frozenset({404, 500, *_OVERLOADED})
_COMPLAINT_BYTES = 1 << 20


class Overloaded(UpstreamError):
    """The replica declined; `reply` is what it said."""

    def __init__(self, reply: Reply) -> None:
        super().__init__("overloaded")
        self.reply = reply


class EngineDied(UpstreamRefused):
    """The server lives and its engine does not."""


#: After these the request may go elsewhere: no byte of an answer has come.
_ELSEWHERE = (UpstreamRefused, UpstreamBroke, AdapterLoadFailed, Overloaded)


class Forwarder:
    """Sends a request to a replica of its route's pool.

    Another replica is tried when the first could not be reached, died or reset before its answer
    began, is overloaded, or could not load the adapter. A replica that lost an adapter we know to
    be registered (404) loads it again and gets the request once more.
    """

    def __init__(self, fleet: Fleet, clock: Clock) -> None:
        self.fleet = fleet
        self._clock = clock

    async def forward(
        self, request: InferenceRequest, route: Route, *, prefer: str | None = None
    ) -> Reply:
        """Send to `prefer` (a replica's id) if that can serve it, else to the one picked.

        Raises:
            NoReplicaAvailable: no replica of the pool can take it now.
            AdapterLoadFailed: the replicas refuse the adapter's weights, or serve them wrongly.
            UpstreamTimeout: no answer in time.
            UpstreamBroke: the replica died after the request was sent, and the next one too.
        """
        pool = self.fleet.pools.get(route.pool)
        if pool is None:
            raise _nobody(route)
        pool.budget.earn()
        name = route.upstream_name
        tried: list[LiveReplica] = []
        failures: list[LoragateError] = []
        while True:
            replica = self._pick(pool, request, route, tried, prefer)
            if replica is None:
                break
            if replica.takes(name):
                replica.claim(name)  # no await between pick and claim
            elif not await _wait(pool, replica, name):
                continue  # it went away meanwhile
            try:
                reply = await self._send(replica, request, route)
            except _ELSEWHERE as exc:
                replica.release(name)
                self._note(replica, exc)
                failures.append(exc)
            except BaseException as exc:
                replica.release(name)
                self._note(replica, exc)
                raise
            else:
                return _claimed(reply, replica, name)
            tried.append(replica)
            if not await self._again(pool, failures):
                break
        return _outcome(pool, request, route, failures)

    def _pick(
        self,
        pool: LivePool,
        request: InferenceRequest,
        route: Route,
        tried: list[LiveReplica],
        prefer: str | None,
    ) -> LiveReplica | None:
        now = self._clock.monotonic()
        name = route.upstream_name
        if prefer is None and not request.wants_prompt_logprobs:
            return pick(pool, name, request, now, tried=tried)
        fits = partial(_right, route.version) if request.wants_prompt_logprobs else None
        for replica in pool.replicas if prefer is not None else ():
            right = name not in replica.quarantined and (fits is None or fits(replica))
            if replica.id == prefer and right and replica.allows(now) and replica not in tried:
                return replica
        return pick(pool, name, request, now, tried=tried, fits=fits)

    async def _send(self, replica: LiveReplica, request: InferenceRequest, route: Route) -> Reply:
        name = route.upstream_name
        body = request.upstream_body(name)
        version = route.version
        if version is not None and self.fleet.loads.needed(replica, name, version):
            await self._load(replica, version)
        reply = await replica.backend.send(request.path, body, request.headers)
        if reply.status not in _ODD:
            return reply
        reply, answer = await buffered(reply)
        if reply.status == 404 and version is not None and _UNKNOWN_MODEL in answer:
            self.fleet.lost(replica, version)
            await self._load(replica, version)
            reply = await replica.backend.send(request.path, body, request.headers)
            if reply.status not in _ODD:
                return reply
            reply, answer = await buffered(reply)
            if reply.status == 404 and _UNKNOWN_MODEL in answer:
                self.fleet.lost(replica, version)
                raise UpstreamBroke(
                    f"The replica {replica.url} loaded {route.upstream_name!r} and does not "
                    "know it."
                )
        if reply.status in _OVERLOADED:
            raise Overloaded(reply)
        if reply.status == 500 and any(words in answer for words in _DEAD_ENGINE):
            raise EngineDied(f"The engine of the replica {replica.url} is dead.")
        return reply

    async def _load(self, replica: LiveReplica, version: AdapterVersion) -> None:
        """Load before sending: whatever goes wrong here, the request itself never arrived."""
        try:
            await self.fleet.loads.load(replica, version)
        except UpstreamRefused:
            raise
        except UpstreamError as exc:
            raise Unloadable(str(exc)) from exc

    def _note(self, replica: LiveReplica, exc: BaseException) -> None:
        """Blame a replica for what is its fault."""
        if isinstance(exc, UpstreamRefused) and not isinstance(exc, Unloadable):
            self.fleet.died(replica, exc)
        elif isinstance(exc, UpstreamError) and not isinstance(exc, Overloaded):
            if replica.breaker.failed(self._clock.monotonic()):
                replica.tripped(exc)
            self.fleet.on_change()
        else:
            replica.breaker.abandoned()

    async def _again(self, pool: LivePool, failures: list[LoragateError]) -> bool:
        """Whether to try another replica; waits first if this one declined for its load."""
        last = failures[-1]
        broken = sum(isinstance(failure, (UpstreamBroke, EngineDied)) for failure in failures)
        if len(failures) >= MAX_ATTEMPTS or broken >= MAX_BROKEN:
            return False
        if not pool.budget.spend(self._clock.monotonic()):
            return False
        self.fleet.count_retry(pool.config.name, last)
        if isinstance(last, Overloaded):
            await asyncio.sleep(retries.pause_s(len(failures)))
        return True


class Unloadable(UpstreamRefused):
    """The replica could not be asked to load, or not now."""


def _claimed(reply: Reply, replica: LiveReplica, name: str) -> Reply:
    """An answer, which holds the claim until it closes."""
    if replica.breaker.failures:
        replica.breaker.succeeded()
    reply.replica = replica.id
    return reply.on_close(partial(replica.release, name))


async def _wait(pool: LivePool, replica: LiveReplica, name: str) -> bool:
    """Wait for a place on a full replica, unless too many do."""
    limit = pool.config.max_queue
    if pool.waiting >= limit:
        raise PoolFull(
            f"The pool {pool.config.name!r} is full and {pool.waiting} requests wait for it. "
            "Try again shortly, or give it more replicas."
        )
    names = replica.line.names
    if pool.waiting * 2 >= limit and names > 1 and replica.line.of(name) >= limit // names:
        raise AdapterQueueFull(
            f"{replica.line.of(name)} requests wait for {name!r}, more than its share of the "
            "queue. Try again shortly, or send fewer at once."
        )
    return await replica.wait(name)


def _right(version: AdapterVersion | None, replica: LiveReplica) -> bool:
    """Whether a replica gets prompt logprobs of a version right."""
    return refusal(version, replica.features, lm_head_loaded=bool(replica.lm_head)) is None


def _outcome(
    pool: LivePool, request: InferenceRequest, route: Route, failures: list[LoragateError]
) -> Reply:
    """What is told when no replica is left to try: what a replica said, if one did."""
    for failure in reversed(failures):
        if isinstance(failure, Overloaded):
            return failure.reply
    for failure in reversed(failures):
        if isinstance(failure, (AdapterLoadFailed, UpstreamBroke)):
            raise failure
    for replica in pool.replicas:
        if (why := replica.quarantined.get(route.upstream_name)) is not None:
            raise ProbeFailed(why)
    if request.wants_prompt_logprobs:
        for replica in pool.replicas:
            lm_head = bool(replica.lm_head)
            why = refusal(route.version, replica.features, lm_head_loaded=lm_head)
            if replica.available and why is not None:
                raise PromptLogprobsUnsupported(why)
    raise _nobody(route)


def _nobody(route: Route) -> NoReplicaAvailable:
    return NoReplicaAvailable(
        f"No replica of the pool {route.pool!r} can take a request for "
        f"{route.upstream_name!r} now. Try again shortly; GET /admin/replicas shows why."
    )


async def buffered(reply: Reply) -> tuple[Reply, bytes]:
    """The same answer with its body here and the original closed, and that body."""
    try:
        data = await reply.read(_COMPLAINT_BYTES)
    finally:
        reply.close()
    return Reply(reply.status, reply.headers, BufferedBody(data)), data
