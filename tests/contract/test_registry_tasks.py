"""Publish, reap, sweep and flush: what they see, what they leave alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import select, update

from app.control import adapters, keys, pools, usage
from app.control.tasks.flush_usage import FlushUsage
from app.control.tasks.publish import is_loopback
from app.control.tasks.reap import Reap
from app.control.tasks.sweep import Sweep
from app.db.blobs import AdapterStore
from app.db.engine import Database
from app.db.tables import RevisionRow, VersionRow
from app.domain import ReplicaState, Scope, Usage, UsageRecord
from app.serving.meter import Meter
from app.settings import Settings
from tests.contract.conftest import POSTGRES
from tests.contract.registry import (
    FACTS,
    FakeFleet,
    FakeReplica,
    MovableClock,
    add_pool,
    add_version,
    publisher,
)
from tests.fakes.adapters import write_adapter

GRACE_S = 600.0


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture
def store(tmp_path: Path, clock: MovableClock) -> AdapterStore:
    return AdapterStore(tmp_path / "store", clock)


@pytest.fixture
def fleet() -> FakeFleet:
    return FakeFleet()


# --- publish


async def test_publish_reads_what_changed_and_swaps(
    db: Database, clock: MovableClock, fleet: FakeFleet
) -> None:
    publish, snapshots = publisher(db, fleet=fleet)
    await publish.activate()
    assert fleet.synced == [snapshots.current]
    await add_pool(db, clock)
    await add_version(db, clock, "haiku")
    await publish.activate()
    before = snapshots.current
    assert (before.bases.keys(), before.base_pools) == ({"tiny"}, {"tiny": "pool-tiny"})
    await publish.activate()
    assert snapshots.current is before  # nothing new: the very same
    assert len(fleet.synced) == 2
    await add_version(db, clock, "pirate")
    details = await publish.activate()
    after = snapshots.current
    assert after.number > before.number
    assert after.adapters["haiku"] is before.adapters["haiku"]  # not read again
    assert "pirate" not in before.adapters
    assert details["adapters"] == 2


async def test_a_second_gateway_follows(db: Database, db_url: str, clock: MovableClock) -> None:
    other = Database(db_url)
    publish, snapshots = publisher(other)
    await add_pool(db, clock)
    await add_version(db, clock)
    await publish.activate()
    await add_version(db, clock, seed=2)
    async with db.begin() as session:
        await adapters.set_alias(
            session, clock, adapter="pirate", alias="prod", targets=[(1, 9), (2, 1)]
        )
        added = await pools.add_replica(session, clock, pool="pool-tiny", url="http://h")
        view, secret = await keys.create(session, clock, name="k", scopes=[Scope.ADMIN])
    await publish.activate()
    served = snapshots.current
    assert served.adapters["pirate"].aliases["prod"].targets == ((1, 9), (2, 1))
    assert list(served.replicas) == [added.replica.id]
    assert served.keys[keys.digest(secret)].key_id == view.id
    async with db.begin() as session:
        await keys.revoke(session, clock, view.id)
        await adapters.delete(session, clock, "pirate")
        await pools.remove_replica(session, added.replica.id, force=True)
    await publish.activate()
    served = snapshots.current
    assert (served.keys, served.adapters, served.replicas) == ({}, {}, {})
    await other.close()


async def test_a_registry_that_went_back_in_time_is_read_anew(
    db: Database, clock: MovableClock
) -> None:
    publish, snapshots = publisher(db)
    await add_pool(db, clock)
    await add_version(db, clock)
    await publish.activate()
    async with db.begin() as session:
        await session.execute(update(RevisionRow).values(value=0))
    await publish.activate()
    assert snapshots.current.number == 0
    assert "pirate" in snapshots.current.adapters


async def test_anonymous_is_for_loopback_before_the_first_key(
    db: Database, clock: MovableClock
) -> None:
    async def anonymous(settings: Settings) -> bool:
        publish, snapshots = publisher(db, settings)
        await publish.activate()
        return snapshots.current.anonymous is not None

    secret = SecretStr("hush")
    assert await anonymous(Settings())
    assert not await anonymous(Settings(host="0.0.0.0"))
    assert not await anonymous(Settings(admin_key=secret))
    async with db.begin() as session:
        view, _ = await keys.create(session, clock, name="k", scopes=[Scope.ADMIN])
    assert not await anonymous(Settings())
    async with db.begin() as session:
        await keys.revoke(session, clock, view.id)
    assert not await anonymous(Settings())  # a key was made once: never again
    publish, snapshots = publisher(db, Settings(admin_key=secret))
    await publish.activate()
    assert snapshots.current.keys[keys.digest("hush")].scopes == frozenset(Scope)


@pytest.mark.parametrize(
    ("host", "is_"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_loopback(host: str, is_: bool) -> None:
    assert is_loopback(host) is is_


@pytest.mark.parametrize("dialect", ["sqlite", POSTGRES])
async def test_a_snapshot_is_one_moment(
    dialect: str, new_database: Callable[[str], str], clock: MovableClock
) -> None:
    """While another gateway writes as fast as it can, no snapshot shows half a transaction."""
    url = new_database(dialect)
    writer, reader = Database(url), Database(url)
    publish, snapshots = publisher(reader)
    await add_pool(writer, clock)

    async def write() -> None:
        for seed in range(40):
            await add_version(writer, clock, seed=seed, alias="prod")

    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(write())
        while not writing.done():
            await publish.activate()
            for adapter in snapshots.current.adapters.values():
                newest = max(adapter.versions)
                for alias in adapter.aliases.values():
                    assert alias.targets == ((newest, 1),)
    await publish.activate()
    assert len(snapshots.current.adapters["pirate"].versions) == 40
    await writer.close()
    await reader.close()


# --- reap and sweep


class Reaped:
    """A registry with one pool of one replica, weights in the store, and a reaper."""

    def __init__(
        self, db: Database, store: AdapterStore, clock: MovableClock, fleet: FakeFleet
    ) -> None:
        self.db, self.store, self.clock, self.fleet = db, store, clock, fleet
        settings = Settings(reap_grace_s=GRACE_S)
        self.reap = Reap(db, store, fleet, clock, settings)
        self.replica = FakeReplica("", "pool-tiny")

    async def start(self) -> None:
        await add_pool(self.db, self.clock)
        async with self.db.begin() as session:
            view = await pools.add_replica(session, self.clock, pool="pool-tiny", url="http://h")
        self.replica.id = view.replica.id
        self.fleet.replicas.append(self.replica)

    async def register(self, name: str, seed: int) -> str:
        with self.store.staging() as folder:
            digest = self.store.commit(write_adapter(folder, seed=seed))
        async with self.db.begin() as session:
            done = await adapters.register(
                session,
                self.clock,
                name=name,
                base_model="tiny",
                digest=digest,
                facts=FACTS,
                source="test",
            )
        self.replica.loaded[done.version.model] = str(self.store.path(digest))
        return digest

    async def delete(self, name: str) -> None:
        async with self.db.begin() as session:
            await adapters.delete(session, self.clock, name)

    def stored(self, digest: str) -> bool:
        return self.store.path(digest).is_dir()


@pytest.fixture
async def reaped(
    db: Database, store: AdapterStore, clock: MovableClock, fleet: FakeFleet
) -> AsyncIterator[Reaped]:
    made = Reaped(db, store, clock, fleet)
    await made.start()
    yield made  # noqa: PT022  # the hook that awaits fixtures awaits generators


async def test_a_deleted_adapter_is_unloaded_then_collected(reaped: Reaped) -> None:
    digest = await reaped.register("pirate", 1)
    kept = await reaped.register("haiku", 2)
    await reaped.delete("pirate")
    assert (await reaped.reap.activate())["released"] == 0
    assert reaped.replica.unloaded == ["pirate@1"]
    assert reaped.stored(digest)  # another gateway may still be serving it
    reaped.clock.forward(GRACE_S)
    details = await reaped.reap.activate()
    assert (details["released"], details["collected"]) == (1, 1)
    assert not reaped.stored(digest)
    assert reaped.stored(kept)
    assert reaped.replica.loaded.keys() == {"haiku@1"}
    assert (await reaped.reap.activate())["deleted"] == 0


async def test_files_another_version_needs_stay(reaped: Reaped) -> None:
    digest = await reaped.register("pirate", 1)
    assert await reaped.register("twin", 1) == digest
    await reaped.delete("pirate")
    reaped.clock.forward(GRACE_S)
    for _ in range(2):
        await reaped.reap.activate()
    assert reaped.stored(digest)
    await reaped.delete("twin")
    reaped.clock.forward(GRACE_S)
    for _ in range(2):
        await reaped.reap.activate()
    assert not reaped.stored(digest)


async def test_a_version_in_use_is_not_unloaded(reaped: Reaped, fleet: FakeFleet) -> None:
    digest = await reaped.register("pirate", 1)
    await reaped.delete("pirate")
    reaped.clock.forward(GRACE_S)
    fleet.running["pirate@1"] = 1
    assert (await reaped.reap.activate())["released"] == 0
    assert reaped.replica.unloaded == []
    fleet.running.clear()
    assert (await reaped.reap.activate())["released"] == 1
    assert not reaped.stored(digest)


@pytest.mark.parametrize("how", ["unhealthy", "broken", "unknown"])
async def test_a_replica_that_cannot_be_asked_postpones(reaped: Reaped, how: str) -> None:
    digest = await reaped.register("pirate", 1)
    await reaped.delete("pirate")
    reaped.clock.forward(GRACE_S)
    if how == "unhealthy":
        reaped.replica.state = ReplicaState.UNHEALTHY
    elif how == "broken":
        reaped.replica.broken = True
    else:
        reaped.fleet.replicas.clear()
    details = await reaped.reap.activate()
    assert details["waiting_for_pools"] == ["pool-tiny"]
    assert reaped.stored(digest)
    reaped.replica.state, reaped.replica.broken = ReplicaState.HEALTHY, False
    reaped.fleet.replicas[:] = [reaped.replica]
    await reaped.reap.activate()
    assert not reaped.stored(digest)


async def test_files_loaded_under_another_name_stay(reaped: Reaped) -> None:
    digest = await reaped.register("pirate", 1)
    reaped.replica.loaded = {"by-hand": f"/mnt/store/{digest[:2]}/{digest}/"}
    await reaped.delete("pirate")
    reaped.clock.forward(GRACE_S)
    assert (await reaped.reap.activate())["released"] == 0
    assert reaped.stored(digest)


async def test_files_registered_again_at_the_last_moment_stay(reaped: Reaped) -> None:
    digest = await reaped.register("pirate", 1)
    await reaped.delete("pirate")
    reaped.clock.forward(GRACE_S)
    with reaped.store.staging() as folder:  # a registration between its two steps
        reaped.store.commit(write_adapter(folder, seed=1))
    assert (await reaped.reap.activate())["collected"] == 0
    assert reaped.stored(digest)


async def test_orphans_are_swept_when_they_are_old(reaped: Reaped) -> None:
    known = await reaped.register("pirate", 1)
    deleted = await reaped.register("haiku", 2)
    await reaped.delete("haiku")
    with reaped.store.staging() as folder:  # the crash came before the row
        orphan = reaped.store.commit(write_adapter(folder, seed=3))
    sweep = Sweep(reaped.db, reaped.store, older_than_s=60)
    assert (await sweep.activate())["orphans"] == 0
    reaped.clock.forward(61)
    assert (await sweep.activate())["orphans"] == 1
    assert [reaped.stored(digest) for digest in (known, deleted, orphan)] == [True, True, False]


# --- usage


async def test_usage_is_written_down_once(db: Database, clock: MovableClock) -> None:
    meter = Meter()
    meter.used("k", "m", 3, 4)
    flush = FlushUsage(db, meter, clock)
    assert await flush.activate() == {"records": 1}
    assert await flush.activate() == {"records": 0}
    meter.used("k", "m", 1, 1)
    await flush.activate()
    async with db.read() as session:
        (line,) = await usage.list_(session)
    assert (line.requests, line.usage) == (2, Usage(4, 5))


async def test_usage_that_cannot_be_written_is_kept(db: Database, clock: MovableClock) -> None:
    meter = Meter()
    meter.used("k", "m", 3, 4)
    meter.restore([UsageRecord("k", "\ud800", 1, Usage(1, 1))])
    with pytest.raises(Exception):  # noqa: B017, PT011  # whichever error the driver has for it
        await FlushUsage(db, meter, clock).activate()
    assert len(meter.drain()) == 2


async def test_released_versions_are_not_looked_at_again(reaped: Reaped) -> None:
    await reaped.register("pirate", 1)
    await reaped.delete("pirate")
    reaped.clock.forward(GRACE_S)
    await reaped.reap.activate()
    async with reaped.db.read() as session:
        row = (await session.scalars(select(VersionRow))).one()
        assert row.released_at == reaped.clock.at
