"""The attempt loop: pick -> claim -> load if needed -> send. Retries only what never arrived.

What comes in: a request and its route. What goes out: a `Reply` that holds its claim until it
closes. Knows nothing of the client.
"""

from __future__ import annotations

from functools import partial

from app.backends.base import BufferedBody, Reply
from app.domain import AdapterVersion, Route
from app.errors import (
    AdapterLoadFailed,
    NoReplicaAvailable,
    UpstreamBroke,
    UpstreamError,
    UpstreamRefused,
)
from app.serving.fleet import Fleet, LiveReplica
from app.serving.policies import preferred
from app.serving.request import InferenceRequest

MAX_ATTEMPTS = 3
_UNKNOWN_MODEL = b"does not exist"
#: vLLM's queue is full or its engine is dead; 429 is what a proxy in front of it may say.
_OVERLOADED = (503, 429)
_COMPLAINT_BYTES = 1 << 20


class Forwarder:
    """Sends a request to a replica of its route's pool.

    Another replica is tried when nothing arrived at the first, when it could not load the adapter,
    or when it answered that it is overloaded. A replica that lost an adapter we know to be
    registered (404) loads it again and gets the request once more.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    async def forward(
        self, request: InferenceRequest, route: Route, *, prefer: str | None = None
    ) -> Reply:
        """Send it to a replica of the route's pool: to `prefer`, if that one can take it.

        Raises:
        NoReplicaAvailable: no replica of the pool can take it now.
        AdapterLoadFailed: the replica refuses the adapter's weights.
        UpstreamTimeout: no answer in time.
        UpstreamBroke: the replica died after the request was sent.
        """
        tried: list[str] = []
        overloaded: Reply | None = None
        failed: AdapterLoadFailed | None = None
        for _ in range(MAX_ATTEMPTS):
            replica = preferred(self.fleet.candidates(route.pool), tried, prefer)
            if replica is None:
                break
            replica.claim(route.upstream_name)  # no await between pick and claim
            try:
                reply = await self._send(replica, request, route)
            except UpstreamRefused as exc:
                replica.release(route.upstream_name)
                self.fleet.refused_connection(replica, exc)
            except AdapterLoadFailed as exc:  # its own fault, perhaps: a store that is not mounted
                replica.release(route.upstream_name)
                failed = exc
            except BaseException:
                replica.release(route.upstream_name)
                raise
            else:
                reply.replica = replica.id
                reply.on_close(partial(replica.release, route.upstream_name))
                if reply.status not in _OVERLOADED:
                    return reply
                overloaded, _ = await buffered(reply)
            tried.append(replica.id)
        if overloaded is not None:
            return overloaded
        raise failed or NoReplicaAvailable(
            f"No replica of the pool {route.pool!r} can take a request for "
            f"{route.upstream_name!r} now. Try again shortly; GET /admin/replicas shows why."
        )

    async def _send(self, replica: LiveReplica, request: InferenceRequest, route: Route) -> Reply:
        body = request.upstream_body(route.upstream_name)
        version = route.version
        if version is None:
            return await replica.backend.send(request.path, body, request.headers)
        if not replica.holds(route.upstream_name, version.digest):
            await self._load(replica, version)
        reply = await replica.backend.send(request.path, body, request.headers)
        if reply.status != 404:
            return reply
        reply, answer = await buffered(reply)
        if _UNKNOWN_MODEL not in answer:
            return reply
        self.fleet.lost(replica, version)
        await self._load(replica, version)
        reply = await replica.backend.send(request.path, body, request.headers)
        if reply.status != 404:
            return reply
        reply, answer = await buffered(reply)
        if _UNKNOWN_MODEL in answer:
            self.fleet.lost(replica, version)
            raise UpstreamBroke(
                f"The replica {replica.url} loaded {route.upstream_name!r} and does not know it."
            )
        return reply

    async def _load(self, replica: LiveReplica, version: AdapterVersion) -> None:
        """Load before sending: whatever goes wrong here, the request itself never arrived."""
        try:
            await self.fleet.load(replica, version)
        except UpstreamError as exc:
            raise UpstreamRefused(str(exc)) from exc


async def buffered(reply: Reply) -> tuple[Reply, bytes]:
    """The same answer with its body here and the original closed, and that body."""
    try:
        data = await reply.read(_COMPLAINT_BYTES)
    finally:
        reply.close()
    return Reply(reply.status, reply.headers, BufferedBody(data)), data
