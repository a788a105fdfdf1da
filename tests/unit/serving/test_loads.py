"""Loads: once for many, one at a time on a replica, proven by probes, forgotten by restarts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from app.backends.base import EngineStatus, Features
from app.domain import AdapterVersion, Probe
from app.errors import AdapterLoadFailed, ProbeFailed, UpstreamBroke, UpstreamError
from app.serving.fleet import Fleet
from app.serving.replica import LiveReplica
from tests.unit.serving.made import STORE, FakeBackend, FleetOfMemory, path_of, snapshot, version
from tests.waiting import until

PROBED = replace(version(), probed=True)
IDS = ((1, 2, 3), (4, 5))


class Proven(FleetOfMemory):
    """A fleet whose probed versions have a probe of their files."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.probe: Probe | None = None
        self.fleet = Fleet(
            self._connect,
            clock=self.clock,
            store_root=STORE,
            store_path=lambda digest: STORE / digest[:2] / digest,
            find_probe=self._find,
        )

    async def _find(self, version: AdapterVersion) -> Probe | None:
        self.found.append(version.upstream_name)
        return self.probe

    async def right(self, version: AdapterVersion) -> Probe:
        """What an honest replica says of these files."""
        honest = FakeBackend(self.connected[0].replica)
        honest.adapters = {version.upstream_name: path_of(version)}
        rows = await honest.score(version.upstream_name, IDS)
        return Probe(IDS, tuple(map(tuple, rows)))

    async def one(self) -> LiveReplica:
        (replica,) = await self.sync(snapshot())
        self.probe = await self.right(PROBED)
        return replica


@pytest.fixture
async def proven() -> AsyncIterator[Proven]:
    proven = Proven()
    async with proven.fleet:
        yield proven


async def test_one_load_at_a_time_on_a_replica_and_side_by_side_on_two(
    made: FleetOfMemory,
) -> None:
    one, two = await made.sync(snapshot(replicas=2))
    gate = asyncio.Event()
    for backend in made.connected:
        backend.loading = gate
    async with asyncio.TaskGroup() as tasks:
        for replica in (one, two):
            for number in (1, 2, 3):
                tasks.create_task(made.fleet.loads.load(replica, version(number=number)))
        await until(lambda: all(len(b.loads) == 1 for b in made.connected))
        await asyncio.sleep(0)
        assert [len(b.loads) for b in made.connected] == [1, 1]
        gate.set()
    assert [len(b.loads) for b in made.connected] == [3, 3]


async def test_a_load_is_verified_once(proven: Proven) -> None:
    replica = await proven.one()
    assert proven.fleet.loads.needed(replica, PROBED.upstream_name, PROBED)
    for _ in range(3):
        await proven.fleet.loads.load(replica, PROBED)
        assert not proven.fleet.loads.needed(replica, PROBED.upstream_name, PROBED)
    assert len(proven.connected[0].loads) == 1
    assert replica.verified == {"pirate@1"}


async def test_what_a_replica_held_already_is_verified_before_it_is_served(proven: Proven) -> None:
    replica = await proven.one()
    await proven.fleet.loads.load(replica, version())
    scored = len(proven.connected[0].scored)
    assert proven.fleet.loads.needed(replica, PROBED.upstream_name, PROBED)
    await proven.fleet.loads.load(replica, PROBED)
    assert len(proven.connected[0].loads) == 1
    assert len(proven.connected[0].scored) == scored + 1


async def lying(proven: Proven) -> LiveReplica:
    replica = await proven.one()
    assert proven.probe is not None
    off = tuple(tuple(value - 1 for value in row) for row in proven.probe.logprobs)
    proven.probe = replace(proven.probe, logprobs=off)
    with pytest.raises(ProbeFailed, match=r"r0 serves 'pirate@1' wrongly.*max 1 "):
        await proven.fleet.loads.load(replica, PROBED)
    return replica


async def test_wrong_weights_are_quarantined_with_their_numbers(proven: Proven) -> None:
    replica = await lying(proven)
    assert "max 1 (allowed" in replica.quarantined["pirate@1"]
    assert proven.fleet.loads.counts[("pool", "quarantined")] == 1
    assert proven.fleet.loads.needed(replica, PROBED.upstream_name, PROBED)
    with pytest.raises(ProbeFailed, match="max 1 "):
        await proven.fleet.loads.load(replica, PROBED)
    assert proven.fleet.loads.counts[("pool", "quarantined")] == 1, "it is not asked again"


@pytest.mark.parametrize("how", ["restart", "distrust", "lost"])
async def test_what_ends_a_quarantine(proven: Proven, how: str) -> None:
    replica = await lying(proven)
    proven.probe = await proven.right(PROBED)
    backend = proven.connected[0]
    if how == "restart":
        backend.adapters.clear()
        backend.engine = EngineStatus(started_at=2.0)
        await proven.fleet.probe()
        assert replica.residency.known == {}
    elif how == "distrust":
        proven.fleet.distrust("pirate@1")
    else:
        proven.fleet.lost(replica, PROBED)
    assert replica.quarantined == {}
    await proven.fleet.loads.load(replica, PROBED)
    assert replica.verified == {"pirate@1"}


async def test_a_restart_forgets_what_was_verified(proven: Proven) -> None:
    """It lists the name, and may hold anything under it."""
    replica = await proven.one()
    await proven.fleet.loads.load(replica, PROBED)
    proven.connected[0].engine = EngineStatus(started_at=2.0)
    await proven.fleet.probe()
    assert replica.residency.known == {"pirate@1": path_of(PROBED)}
    assert proven.fleet.loads.needed(replica, PROBED.upstream_name, PROBED)


async def test_distrust_verifies_again_what_was_right(proven: Proven) -> None:
    replica = await proven.one()
    await proven.fleet.loads.load(replica, PROBED)
    proven.fleet.distrust("pirate@1")
    assert proven.fleet.loads.needed(replica, PROBED.upstream_name, PROBED)
    await proven.fleet.loads.load(replica, PROBED)
    assert len(proven.connected[0].loads) == 1


async def test_a_probe_that_the_replica_declines_proves_nothing(proven: Proven) -> None:
    replica = await proven.one()
    proven.connected[0].score_error = UpstreamError("too long for its context")
    await proven.fleet.loads.load(replica, PROBED)
    assert replica.verified == {"pirate@1"}
    assert replica.quarantined == {}


async def test_a_replica_that_dies_of_the_probe_is_not_verified(proven: Proven) -> None:
    replica = await proven.one()
    proven.connected[0].score_error = UpstreamBroke("it died")
    with pytest.raises(UpstreamBroke):
        await proven.fleet.loads.load(replica, PROBED)
    assert proven.fleet.loads.needed(replica, PROBED.upstream_name, PROBED)
    assert replica.quarantined == {}


async def test_who_cannot_answer_prompt_logprobs_is_not_asked_for_them(proven: Proven) -> None:
    proven_replica = await proven.one()
    proven_replica.features = Features(False, False, False)
    scored = len(proven.connected[0].scored)
    await proven.fleet.loads.load(proven_replica, PROBED)
    assert len(proven.connected[0].scored) == scored


async def test_a_version_whose_probe_is_gone_is_served(proven: Proven) -> None:
    replica = await proven.one()
    proven.probe = None
    await proven.fleet.loads.load(replica, PROBED)
    assert not proven.fleet.loads.needed(replica, PROBED.upstream_name, PROBED)


async def test_an_adapter_that_changes_lm_head_is_known_to_be_there(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    await made.fleet.loads.load(replica, replace(version(), targets_lm_head=True))
    assert replica.lm_head == {"pirate@1"}
    await replica.unload("pirate@1")
    assert replica.lm_head == set()


async def test_a_rollout_to_where_nobody_is(made: FleetOfMemory) -> None:
    await made.sync(snapshot(replicas=1))
    await made.fleet.prepare(version(), "no such pool", ())
    await made.fleet.prepare(version(), "pool", ("nobody@1",))
    assert made.connected[0].loads == []


async def test_a_rollout_loads_where_the_old_one_is(made: FleetOfMemory) -> None:
    one, _, three = await made.sync(snapshot(replicas=3))
    for replica in (one, three):
        await made.fleet.loads.load(replica, version())
    made.connected[2].load_errors = [AdapterLoadFailed("no such file here")]
    await made.fleet.prepare(version(number=2), "pool", ("pirate@1",))
    assert [len(b.loads) for b in made.connected] == [2, 0, 2]
    assert made.fleet.pools["pool"].homes["pirate@2"] == (one,)
    for backend in (made.connected[0], made.connected[2]):
        backend.load_errors = [AdapterLoadFailed("no such file here")]
    with pytest.raises(AdapterLoadFailed):
        await made.fleet.prepare(version(number=3), "pool", ("pirate@1",))


async def test_a_rollout_of_a_probed_version_verifies_it_somewhere(proven: Proven) -> None:
    replica = await proven.one()
    await proven.fleet.prepare(PROBED, "pool", ())
    assert replica.verified == {"pirate@1"}
