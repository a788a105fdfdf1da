"""The straight line of one inference request. Nothing here touches SQL or HTTP."""

from __future__ import annotations

from typing import Protocol

from app.backends.base import Reply
from app.domain import Principal
from app.serving.batches import Batches
from app.serving.coalesce import Coalescer
from app.serving.forward import Forwarder
from app.serving.meter import Meter
from app.serving.request import InferenceRequest
from app.serving.resolve import resolve
from app.serving.snapshot import Snapshot
from app.serving.usage import UsageTap


class Serving(Protocol):
    """What answers an inference request: `RequestPath`, or what stands for it.

    A name of its own, because compiled code takes only instances where a class is named.
    """

    async def serve(
        self, request: InferenceRequest, principal: Principal, snapshot: Snapshot
    ) -> Reply:
        """See `RequestPath.serve`."""


class RequestPath:
    """resolve -> forward, split or merged -> account.

    Without a `coalescer`, requests for one prompt are never merged.
    """

    def __init__(
        self, forwarder: Forwarder, batches: Batches, coalescer: Coalescer | None, meter: Meter
    ) -> None:
        self.forwarder = forwarder
        self.batches = batches
        self.coalescer = coalescer
        self.meter = meter

    async def serve(
        self, request: InferenceRequest, principal: Principal, snapshot: Snapshot
    ) -> Reply:
        """Send the request where its model is and return the answer, whose end is accounted.

        Raises:
            RequestError: the model is unknown or not allowed.
            NoReplicaAvailable, AdapterLoadFailed, UpstreamError: it could not be served.
        """
        route = resolve(snapshot, request.model, principal, request.session or request.user)
        tap = UsageTap(hide=not request.reports_usage)
        if request.scoring and self.coalescer is not None:
            reply = await self.coalescer.forward(request, route)
        elif request.batch:
            reply = await self.batches.forward(request, route)
        else:
            reply = await self.forwarder.forward(request, route)
        if route.version is not None:
            reply.version = route.upstream_name

        def account() -> None:
            if reply.status < 300:
                self.meter.used(principal.key_id, route.upstream_name, *tap.counts())

        return reply.through(tap).on_close(account)
