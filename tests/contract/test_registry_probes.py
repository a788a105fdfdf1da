"""Probes and what a fleet needs to know of versions and aliases, on both databases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.control import adapters, probes
from app.control.folders import copy_adapter
from app.control.intake import Candidate, PathSource, admit
from app.db.blobs import AdapterStore
from app.db.engine import Database
from app.domain import BaseModel, Pool, Probe, Sticky
from app.errors import AdapterRejected, InvalidRequest, NotFound
from app.settings import Settings
from tests.contract.registry import (
    FACTS,
    MovableClock,
    add_pool,
    add_version,
    digest_of,
    publisher,
)
from tests.fakes.adapters import BASE_CONFIG, write_adapter

GIVEN: dict[str, Any] = {
    "token_ids": [[1, 2, 3], [4, 5]],
    "logprobs": [[-0.5, -1.0], [-2.5]],
    "dtype": "float32",
}
PROBE = Probe(((1, 2, 3), (4, 5)), ((-0.5, -1.0), (-2.5,)), "float32")


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


async def probe_of(db: Database, name: str, number: int) -> Probe | None:
    async with db.read() as session:
        return await probes.probe_of(session, name, number)


async def test_a_probe_is_given_shown_and_taken_away(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    await add_version(db, clock)
    publish, snapshots = publisher(db)
    await publish.activate()

    async def probed() -> bool:
        await publish.activate()
        served = snapshots.current.adapters["pirate"].versions[1].probed
        async with db.read() as session:
            assert (await adapters.show_version(session, "pirate", 1)).probed is served
            assert (await adapters.show(session, "pirate")).versions[0].probed is served
        return served

    assert await probed() is False
    assert await probe_of(db, "pirate", 1) is None
    async with db.begin() as session:
        assert await probes.put(session, "pirate", 1, GIVEN) == PROBE
    assert await probed() is True
    assert await probe_of(db, "pirate", 1) == PROBE
    async with db.begin() as session:
        await probes.put(session, "pirate", 1, {**GIVEN, "dtype": "bfloat16"})
    async with db.read() as session:
        assert await probes.show(session, "pirate", 1) == replace(PROBE, dtype="bfloat16")
    async with db.begin() as session:
        await probes.remove(session, "pirate", 1)
    assert await probed() is False
    assert await probe_of(db, "pirate", 1) is None


async def test_a_probe_of_nothing(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    await add_version(db, clock)
    for name, number in (("pirate", 2), ("nobody", 1)):
        assert await probe_of(db, name, number) is None
        async with db.begin() as session:
            with pytest.raises(NotFound):
                await probes.put(session, name, number, GIVEN)
    async with db.begin() as session:
        for verb in (probes.show, probes.remove):
            with pytest.raises(NotFound, match="pirate@1 has no probe"):
                await verb(session, "pirate", 1)


async def test_a_probe_must_fit_the_base(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock, BaseModel("tiny", {"vocab_size": 4}))
    await add_version(db, clock)
    async with db.begin() as session:
        with pytest.raises(AdapterRejected, match=r"token_ids\[1\]: found 4, allowed token ids"):
            await probes.put(session, "pirate", 1, GIVEN)
    assert await probe_of(db, "pirate", 1) is None


async def test_a_probe_comes_with_the_weights_and_goes_with_them(
    db: Database, clock: MovableClock
) -> None:
    await add_pool(db, clock)
    first = await add_version(db, clock, seed=1, probe=PROBE)
    assert (first.version.probed, first.adapter.versions[0].probed) == (True, True)
    second = await add_version(db, clock, seed=2)
    assert second.version.probed is False, "each version has its own"
    again = await add_version(db, clock, seed=2, probe=PROBE)
    assert (again.created, again.version.probed) == (False, True)
    kept = await add_version(db, clock, seed=2)
    assert (kept.created, kept.version.probed) == (False, True)
    async with db.begin() as session:
        await adapters.delete_version(session, clock, adapter="pirate", number=1)
    assert await probe_of(db, "pirate", 1) is None
    async with db.begin() as session:
        await adapters.delete(session, clock, "pirate")
    assert await probe_of(db, "pirate", 2) is None
    await add_version(db, clock, seed=3)
    assert await probe_of(db, "pirate", 2) is None, "a name that comes back starts without"


async def test_the_snapshot_knows_what_routing_needs(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    await add_version(db, clock)
    async with db.begin() as session:
        await adapters.register(
            session,
            clock,
            name="pirate",
            base_model="tiny",
            digest=digest_of("head"),
            facts=replace(FACTS, target_modules=("lm_head", "q_proj")),
            source="test",
        )
    publish, snapshots = publisher(db)

    async def seen() -> Any:
        await publish.activate()
        return snapshots.current.adapters["pirate"]

    versions = (await seen()).versions
    assert [versions[n].targets_lm_head for n in (1, 2)] == [False, True]
    split = [(1, 9), (2, 1)]
    for given, then in (
        (None, Sticky.USER),
        (Sticky.KEY, Sticky.KEY),
        (None, Sticky.KEY),  # left out, it stays
        (Sticky.NONE, Sticky.NONE),
        (Sticky.USER, Sticky.USER),
    ):
        async with db.begin() as session:
            view = await adapters.set_alias(
                session, clock, adapter="pirate", alias="prod", targets=split, sticky=given
            )
        assert view.sticky == {"latest": Sticky.USER, "prod": then}
        assert (await seen()).aliases["prod"].sticky is then


async def test_a_rollback_leaves_stickiness_alone(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    await add_version(db, clock, seed=1)
    await add_version(db, clock, seed=2)
    targets: list[list[tuple[int, int]]] = [[(1, 1)], [(1, 9), (2, 1)]]
    async with db.begin() as session:
        for each, sticky in zip(targets, (Sticky.NONE, Sticky.KEY), strict=True):
            await adapters.set_alias(
                session, clock, adapter="pirate", alias="prod", targets=each, sticky=sticky
            )
        back = await adapters.rollback(session, adapter="pirate", alias="prod")
    assert (back.aliases["prod"], back.sticky["prod"]) == (((1, 1),), Sticky.KEY)


async def test_a_probe_is_no_part_of_the_weights(tmp_path: Path) -> None:
    """The same files are the same version, whoever wrote down what they answer."""
    candidate = Candidate(BaseModel("tiny", BASE_CONFIG), Pool("pool", "tiny", "tiny"))
    store = AdapterStore(tmp_path / "store")
    folder = write_adapter(tmp_path / "adapter")

    async def admitted() -> Any:
        source = PathSource(folder, roots=(tmp_path,))
        return await admit(source, candidates=[candidate], store=store, settings=Settings())

    bare = await admitted()
    assert bare.probe is None
    (folder / "probe.json").write_text(
        '{"token_ids": [[1, 2, 3], [4, 5]], "logprobs": [[-0.5, -1], [-2.5]]}'
    )
    probed = await admitted()
    assert probed.probe == PROBE
    assert probed.digest == bare.digest
    assert sorted(path.name for path in store.path(bare.digest).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    (folder / "probe.json").write_text('{"token_ids": [[1, 300]], "logprobs": [[-1]]}')
    with pytest.raises(AdapterRejected, match=r"probe\.json: token_ids\[0\]: found 300"):
        await admitted()
    (folder / "probe.json").write_bytes(b" " * (3 << 20))
    with pytest.raises(AdapterRejected, match="at most 2097152 bytes"):
        await admitted()


def test_a_probe_is_copied_from_where_the_weights_may_come_from(tmp_path: Path) -> None:
    """Also when it is a link: it must not lead out of the allowed folders."""
    folder = write_adapter(tmp_path / "allowed" / "adapter")
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "probe.json").symlink_to(secret)
    (tmp_path / "into").mkdir()
    with pytest.raises(InvalidRequest, match="not a folder that adapters may be taken from"):
        copy_adapter(
            folder,
            [tmp_path / "allowed"],
            tmp_path / "into",
            max_bytes=1 << 20,
            check=lambda: None,
        )
