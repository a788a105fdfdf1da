"""A registry to test with: a pool, an adapter's facts, a fleet that says what it is told to.

What comes in: a database. What goes out: rows in it, and fakes of what control sees of serving.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from app.control import adapters, pools
from app.control.inspect_adapter import AdapterFacts
from app.control.tasks.publish import Publish
from app.control.views import Registered
from app.db.engine import Database
from app.domain import BaseModel, ReplicaState
from app.errors import UpstreamBroke
from app.serving.snapshot import Snapshot, Snapshots
from app.settings import Settings

BASE = BaseModel("tiny", {"hidden_size": 64}, ("acme/tiny",))
FACTS = AdapterFacts(rank=4, target_modules=("q_proj", "v_proj"), tensors=4, bytes=4096)


def digest_of(seed: object) -> str:
    return hashlib.sha256(str(seed).encode()).hexdigest()


class MovableClock:
    """Wall time that moves when told to."""

    def __init__(self) -> None:
        self.at = datetime(2030, 1, 1, 12, 30, tzinfo=UTC)

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return self.at.timestamp()

    def forward(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


async def add_pool(db: Database, clock: MovableClock, base: BaseModel = BASE) -> None:
    async with db.begin() as session:
        await pools.create(session, clock, name=f"pool-{base.name}", base=base)


async def add_version(
    db: Database, clock: MovableClock, name: str = "pirate", seed: object = 1, **more: Any
) -> Registered:
    async with db.begin() as session:
        return await adapters.register(
            session,
            clock,
            name=name,
            base_model=more.pop("base_model", "tiny"),
            digest=digest_of(seed),
            facts=FACTS,
            source="test",
            **more,
        )


@dataclass
class FakeReplica:
    """A replica that holds what a test says, and counts what is asked of it."""

    id: str
    pool: str
    state: ReplicaState = ReplicaState.HEALTHY
    loaded: dict[str, str] = field(default_factory=dict)
    broken: bool = False
    unloaded: list[str] = field(default_factory=list)

    async def list_adapters(self) -> dict[str, str]:
        if self.broken:
            raise UpstreamBroke(f"{self.id} does not answer")
        return dict(self.loaded)

    async def unload(self, upstream_name: str) -> None:
        del self.loaded[upstream_name]
        self.unloaded.append(upstream_name)


@dataclass
class FakeFleet:
    """Replicas by hand, and the snapshots it was given."""

    replicas: list[FakeReplica] = field(default_factory=list)
    running: dict[str, int] = field(default_factory=dict)
    synced: list[Snapshot] = field(default_factory=list)

    async def sync(self, snapshot: Snapshot) -> None:
        self.synced.append(snapshot)

    def live(self) -> list[FakeReplica]:
        return self.replicas

    def inflight(self, upstream_name: str) -> int:
        return self.running.get(upstream_name, 0)


def publisher(
    db: Database, settings: Settings | None = None, fleet: FakeFleet | None = None
) -> tuple[Publish, Snapshots]:
    snapshots = Snapshots()
    return Publish(db, snapshots, fleet or FakeFleet(), settings or Settings()), snapshots
