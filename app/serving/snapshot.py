"""The one door from the control plane: an immutable, numbered picture of the registry.

What comes in: a `Snapshot` from `control.tasks.publish`. What goes out: the same, to every
request, which reads `Snapshots.current` once and keeps it. No live counters, no SQL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from app.domain import Adapter, AdapterVersion, BaseModel, Pool, Principal, Replica, Route


@dataclass(frozen=True)
class Snapshot:
    """Routes and keyring as of registry revision `number`.

    `keys` maps the sha-256 digest of a secret to who it is. While no key was ever created it is
    empty and `anonymous` says what a caller on loopback may do; afterwards `anonymous` is None.
    """

    number: int = 0
    bases: Mapping[str, BaseModel] = field(default_factory=dict)
    pools: Mapping[str, Pool] = field(default_factory=dict)
    base_pools: Mapping[str, str] = field(default_factory=dict)
    replicas: Mapping[str, Replica] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    keys: Mapping[bytes, Principal] = field(default_factory=dict)
    anonymous: Principal | None = None
    routes: dict[str, Route] = field(default_factory=dict, repr=False, compare=False)
    """Names already resolved in this snapshot: a cache that `resolve` fills."""

    @cached_property
    def sorted_names(self) -> Sequence[str]:
        """The adapters' names in order."""
        return sorted(self.adapters)

    def version(self, upstream_name: str) -> AdapterVersion | None:
        """The registered version that replicas know by this name."""
        name, _, number = upstream_name.rpartition("@")
        adapter = self.adapters.get(name)
        if adapter is None or not number.isdecimal():
            return None
        return adapter.versions.get(int(number))


class Snapshots:
    """Holds the snapshot being served. Swapping it is one assignment."""

    def __init__(self) -> None:
        self.current = Snapshot()

    def publish(self, snapshot: Snapshot) -> None:
        self.current = snapshot
