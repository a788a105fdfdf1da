"""The live replicas as the control plane sees them: the part of `serving.fleet` it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from app.domain import ReplicaState
from app.serving.snapshot import Snapshot


class LiveReplica(Protocol):
    """One replica, as the data plane knows it now."""

    @property
    def id(self) -> str: ...
    @property
    def pool(self) -> str: ...
    @property
    def state(self) -> ReplicaState: ...

    async def list_adapters(self) -> dict[str, str]:
        """What the engine says it has registered: upstream name -> path."""

    async def unload(self, upstream_name: str) -> None:
        """Make the engine forget an adapter."""


class Fleet(Protocol):
    """All of them."""

    async def sync(self, snapshot: Snapshot) -> None:
        """Follow the registry: replicas that came, changed or went."""

    def live(self) -> Sequence[LiveReplica]:
        """Every replica, whatever its state."""

    def inflight(self, upstream_name: str) -> int:
        """Requests for this version running through this gateway."""
