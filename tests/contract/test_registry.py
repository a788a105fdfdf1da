"""The verbs on adapters, aliases, pools, keys and usage, on both dialects."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.control import adapters, keys, pools, usage
from app.control.declared import sync_declared
from app.db.engine import Database
from app.domain import BaseModel, Scope, Usage, UsageRecord
from app.errors import ConfigurationError, Conflict, InvalidRequest, LoragateError, NotFound
from app.settings import Settings
from tests.contract.registry import BASE, FACTS, MovableClock, add_pool, add_version, digest_of


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


async def test_versions_count_up_and_latest_follows(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    first = await add_version(db, clock, seed=1, create=True, metadata={"team": "sea"})
    assert (first.created, first.version.number, first.adapter.latest) == (True, 1, 1)
    assert (first.adapter.metadata, first.version.metadata) == ({"team": "sea"}, {})
    second = await add_version(db, clock, seed=2, create=False, metadata={"run": 7}, alias="prod")
    assert (second.version.model, second.adapter.latest) == ("pirate@2", 2)
    assert second.version.metadata == {"run": 7}
    assert second.adapter.aliases == {"latest": ((2, 1),), "prod": ((2, 1),)}
    async with db.read() as session:
        shown = await adapters.show(session, "pirate")
        assert shown == second.adapter
        assert await adapters.show_version(session, "pirate", 2) == second.version
    assert (shown.pool, shown.base_model, shown.created_at) == ("pool-tiny", "tiny", clock.at)
    assert [version.number for version in shown.versions] == [1, 2]


async def test_the_newest_weights_again_are_the_newest_version(
    db: Database, clock: MovableClock
) -> None:
    await add_pool(db, clock)
    await add_version(db, clock, seed=1)
    await add_version(db, clock, seed=2)
    again = await add_version(db, clock, seed=2, alias="prod")
    assert (again.created, again.version.number) == (False, 2)
    assert again.adapter.aliases["prod"] == ((2, 1),)
    older = await add_version(db, clock, seed=1)
    assert (older.created, older.version.number) == (True, 3)


async def test_a_name_stands_for_nothing_until_it_is_given_to_a_version(
    db: Database, clock: MovableClock
) -> None:
    await add_pool(db, clock)
    first = await add_version(db, clock, seed=1, alias="one", move_latest=False)
    assert (first.created, first.pending, first.adapter.latest) == (True, False, None)
    second = await add_version(db, clock, seed=2, alias="two", move_latest=False)
    assert second.adapter.aliases == {"one": ((1, 1),), "two": ((2, 1),)}
    async with db.begin() as session:
        with pytest.raises(NotFound, match="has no alias 'latest'"):
            await adapters.rollback(session, adapter="pirate")
    # The last weights may be those of the checkpoint before: it is one version, with both names.
    last = await add_version(db, clock, seed=2, alias="three")
    assert (last.created, last.adapter.latest) == (False, 2)
    assert last.adapter.aliases["three"] == last.adapter.aliases["two"] == ((2, 1),)
    async with db.begin() as session:
        with pytest.raises(Conflict, match="no earlier version"):
            await adapters.rollback(session, adapter="pirate")


async def test_asking_again_does_not_undo_a_rollback(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    await add_version(db, clock, seed=1)
    await add_version(db, clock, seed=2)
    async with db.begin() as session:
        await adapters.rollback(session, adapter="pirate")
    assert (await add_version(db, clock, seed=2)).adapter.latest == 1


async def test_a_number_is_never_given_twice(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    await add_version(db, clock, seed=1)
    await add_version(db, clock, seed=2)
    async with db.begin() as session:
        await adapters.delete_version(session, clock, adapter="pirate", number=2)
    assert (await add_version(db, clock, seed=3)).version.number == 3
    async with db.begin() as session:
        await adapters.delete(session, clock, "pirate")
    async with db.read() as session:
        with pytest.raises(NotFound):
            await adapters.show(session, "pirate")
    reborn = await add_version(db, clock, seed=1, create=True)
    assert [version.number for version in reborn.adapter.versions] == [4]
    assert reborn.adapter.aliases == {"latest": ((4, 1),)}


async def test_create_says_what_it_expects(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    with pytest.raises(NotFound):
        await add_version(db, clock, create=False)
    await add_version(db, clock, create=True)
    with pytest.raises(Conflict):
        await add_version(db, clock, create=True)
    with pytest.raises(NotFound, match="No pool serves"):
        await add_version(db, clock, name="other", base_model="missing")


async def test_an_adapter_keeps_its_base(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    await add_pool(db, clock, BaseModel("large"))
    await add_version(db, clock)
    with pytest.raises(Conflict, match="for base 'tiny'"):
        await add_version(db, clock, base_model="large")
    async with db.begin() as session:
        await adapters.delete(session, clock, "pirate")
    assert (await add_version(db, clock, base_model="large")).adapter.pool == "pool-large"


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "a@1", "a:b", "ä", "a" * 129, "a\n"])
async def test_names_stay_apart_from_versions_and_aliases(
    db: Database, clock: MovableClock, name: str
) -> None:
    await add_pool(db, clock)
    with pytest.raises(InvalidRequest):
        await add_version(db, clock, name=name)
    with pytest.raises(InvalidRequest):
        await add_version(db, clock, alias=name or "-")


async def test_a_base_and_an_adapter_cannot_share_a_name(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    with pytest.raises(Conflict):
        await add_version(db, clock, name="tiny")
    await add_version(db, clock, name="pirate")
    with pytest.raises(Conflict):
        await add_pool(db, clock, BaseModel("pirate"))


async def test_an_alias_moves_and_moves_back(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    for seed in (1, 2, 3):
        await add_version(db, clock, seed=seed)

    async def move(*targets: tuple[int, int]) -> object:
        async with db.begin() as session:
            view = await adapters.set_alias(
                session, clock, adapter="pirate", alias="prod", targets=targets
            )
        return view.aliases["prod"]

    async def back() -> object:
        async with db.begin() as session:
            return (await adapters.rollback(session, adapter="pirate", alias="prod")).aliases[
                "prod"
            ]

    assert await move((1, 1)) == ((1, 1),)
    assert await move((1, 90), (2, 10)) == ((1, 90), (2, 10))
    assert await move((1, 90), (2, 10)) == ((1, 90), (2, 10))  # not a move
    assert await move((3, 1)) == ((3, 1),)
    assert await back() == ((1, 90), (2, 10))
    assert await back() == ((1, 1),)
    with pytest.raises(Conflict, match="no earlier"):
        await back()
    await move((2, 1))
    await move((3, 1))
    async with db.begin() as session:
        await adapters.delete_version(session, clock, adapter="pirate", number=2)
    assert await back() == ((1, 1),)  # over the deleted version


@pytest.mark.parametrize(
    "targets",
    [(), ((1, 0),), ((1, -1),), ((1, 1), (1, 2)), ((1, 10**9),), tuple((n, 1) for n in range(101))],
)
async def test_odd_targets_are_refused(
    db: Database, clock: MovableClock, targets: tuple[tuple[int, int], ...]
) -> None:
    await add_pool(db, clock)
    await add_version(db, clock)
    async with db.begin() as session:
        with pytest.raises(InvalidRequest):
            await adapters.set_alias(
                session, clock, adapter="pirate", alias="prod", targets=targets
            )


async def test_latest_is_one_version_and_stays(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    await add_version(db, clock, seed=1)
    await add_version(db, clock, seed=2)
    async with db.begin() as session:
        view = await adapters.set_alias(
            session, clock, adapter="pirate", alias="latest", targets=[(1, 1)]
        )
        assert view.latest == 1
    async with db.begin() as session:
        with pytest.raises(InvalidRequest):
            await adapters.set_alias(
                session, clock, adapter="pirate", alias="latest", targets=[(1, 1), (2, 1)]
            )
        with pytest.raises(Conflict):
            await adapters.delete_alias(session, adapter="pirate", alias="latest")


async def test_a_version_in_use_cannot_be_deleted(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    await add_version(db, clock, seed=1, alias="prod")
    with pytest.raises(Conflict, match="'prod'"):
        async with db.begin() as session:
            await adapters.delete_version(session, clock, adapter="pirate", number=1)
    async with db.begin() as session:
        await adapters.delete_alias(session, adapter="pirate", alias="prod")
    with pytest.raises(Conflict, match="only version"):
        async with db.begin() as session:
            await adapters.delete_version(session, clock, adapter="pirate", number=1)
    await add_version(db, clock, seed=2)
    async with db.begin() as session:
        view = await adapters.delete_version(session, clock, adapter="pirate", number=2)
    assert (view.latest, len(view.versions)) == (1, 1)


async def test_lists_come_in_pages(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    await add_pool(db, clock, BaseModel("large"))
    for name in ("a1", "a2", "a3", "A4", "b1"):
        await add_version(db, clock, name=name)
    await add_version(db, clock, name="big", base_model="large")
    async with db.begin() as session:
        await adapters.delete(session, clock, "a2")
    found: list[str] = []
    after = None
    async with db.read() as session:
        while True:
            page = await adapters.list_(session, limit=2, after=after)
            found += [view.name for view in page.data]
            if not page.has_more:
                break
            after = page.next_after
        assert sorted(found) == ["A4", "a1", "a3", "b1", "big"]
        by_prefix = await adapters.list_(session, prefix="a")
        assert [view.name for view in by_prefix.data] == ["a1", "a3"]
        by_base = await adapters.list_(session, base_model="large")
        assert [view.name for view in by_base.data] == ["big"]
        with pytest.raises(InvalidRequest):
            await adapters.list_(session, limit=0)


@pytest.mark.parametrize(
    "ask",
    [
        lambda s: adapters.show(s, "x\0y"),
        lambda s: adapters.show_version(s, "pirate", 10**30),
        lambda s: adapters.show_version(s, "pirate", -1),
        lambda s: adapters.list_(s, after="\0"),
        lambda s: adapters.list_(s, prefix="\0"),
        lambda s: adapters.list_(s, base_model="\ud800"),
        lambda s: pools.show(s, "\0"),
        lambda s: pools.show_replica(s, "\0"),
        lambda s: keys.list_(s, after="\0"),
        lambda s: usage.list_(s, model="\0"),
    ],
)
async def test_values_no_database_can_hold_are_the_callers_fault(
    db: Database, clock: MovableClock, ask: Callable[[Any], Any]
) -> None:
    await add_pool(db, clock)
    await add_version(db, clock)
    try:
        async with db.read() as session:
            await ask(session)
    except LoragateError as exc:
        assert isinstance(exc, NotFound | InvalidRequest)  # noqa: PT017  # SQLite may find nothing


async def test_metadata_may_hold_any_json(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    odd = {"nul": "\0", "lone": "\ud800", "deep": [{"a": [1.5, None, True]}]}
    await add_version(db, clock, metadata=odd)
    async with db.read() as session:
        assert (await adapters.show(session, "pirate")).metadata == odd
    for bad in ({"a": float("nan")}, {"a": object()}, {"a": "x" * 20_000}):
        with pytest.raises(InvalidRequest):
            await add_version(db, clock, seed=2, metadata=bad)


async def test_replicas_come_change_and_go(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    async with db.begin() as session:
        added = await pools.add_replica(
            session, clock, pool="pool-tiny", url="HTTP://Host:8000/", api_key="secret"
        )
        assert added.replica.url == "http://host:8000"
        assert "secret" not in repr(added)
        with pytest.raises(Conflict):
            await pools.add_replica(session, clock, pool="pool-tiny", url="http://host:8000")
        changed = await pools.update_replica(session, added.replica.id, cordoned=True)
        assert (changed.replica.cordoned, changed.replica.draining) == (True, False)
        with pytest.raises(Conflict, match="drain it first"):
            await pools.remove_replica(session, added.replica.id)
        await pools.update_replica(session, added.replica.id, cordoned=False, draining=True)
        assert (await pools.show(session, "pool-tiny")).replicas[0].replica.draining
        await pools.remove_replica(session, added.replica.id)
        assert await pools.list_replicas(session) == []
        again = await pools.add_replica(session, clock, pool="pool-tiny", url="http://host:8000")
        assert again.replica.id == added.replica.id


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host",
        "ftp://host",
        "http://",
        "http://u:p@h",
        "http://h/v1",
        "http://h:x",
        "http://h?a",
    ],
)
async def test_a_replica_needs_a_plain_url(db: Database, clock: MovableClock, url: str) -> None:
    await add_pool(db, clock)
    async with db.begin() as session:
        with pytest.raises(InvalidRequest):
            await pools.add_replica(session, clock, pool="pool-tiny", url=url)


async def test_a_pool_is_removed_when_nothing_needs_it(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)
    await add_version(db, clock)
    async with db.begin() as session:
        await pools.add_replica(session, clock, pool="pool-tiny", url="http://h")
        with pytest.raises(Conflict):
            await pools.create(session, clock, name="second", base=BASE)
        with pytest.raises(Conflict, match="1 adapters"):
            await pools.delete(session, "pool-tiny")
        await adapters.delete(session, clock, "pirate")
        await pools.delete(session, "pool-tiny")
        assert await pools.list_(session) == []
        changed = await pools.create(session, clock, name="again", base=BASE, max_lora_rank=8)
        assert (changed.pool.served_name, changed.pool.max_lora_rank) == ("tiny", 8)
        changed = await pools.update(session, "again", served_name="t", store_mount="/store")
        assert (changed.pool.served_name, changed.pool.store_mount) == ("t", "/store")
        changed = await pools.update(
            session, "again", max_loras=4, max_cpu_loras=8, max_inflight=2, max_queue=0
        )
        assert changed.pool.cpu_slots == 8
        assert (changed.pool.max_inflight, changed.pool.max_queue) == (2, 0)
        changed = await pools.update(session, "again", max_cpu_loras=None)
        assert (changed.pool.max_cpu_loras, changed.pool.cpu_slots) == (None, 4)
        for wrong in (
            {"max_lora_rank": 0},
            {"base_model": "x"},
            {"store_mount": "relative"},
            {"max_queue": -1},
            {"max_cpu_loras": 3},
        ):
            with pytest.raises(InvalidRequest):
                await pools.update(session, "again", **wrong)


def declared(tmp_path: Any, *pool: dict[str, Any]) -> Settings:
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    return Settings.model_validate({"pools": pool})


async def test_declared_pools_become_rows_and_stay_themselves(
    db: Database, clock: MovableClock, tmp_path: Any
) -> None:
    pool = {
        "name": "p",
        "base_model": "tiny",
        "base_model_path": str(tmp_path),
        "replicas": ["http://a:1", "http://b:1"],
    }

    async def synced(settings: Settings) -> pools.PoolView:
        async with db.begin() as session:
            await sync_declared(session, settings, clock)
        async with db.read() as session:
            return await pools.show(session, "p")

    first = await synced(declared(tmp_path, pool))
    assert first.base.config == {"hidden_size": 64}
    assert str(tmp_path) in first.base.aliases
    assert [replica.replica.url for replica in first.replicas] == ["http://a:1", "http://b:1"]
    assert await synced(declared(tmp_path, pool)) == first
    async with db.begin() as session:
        await pools.add_replica(session, clock, pool="p", url="http://by-hand:1")
        await pools.update_replica(session, first.replicas[0].replica.id, cordoned=True)
    second = await synced(
        declared(
            tmp_path,
            pool
            | {"replicas": ["http://a:1"], "max_loras": 2, "api_key": "k"}
            | {"max_cpu_loras": 6, "max_inflight": 3, "max_queue": 9},
        )
    )
    assert {view.replica.url: view.replica.cordoned for view in second.replicas} == {
        "http://a:1": True,
        "http://by-hand:1": False,
    }
    assert (second.pool.max_loras, second.pool.max_cpu_loras) == (2, 6)
    assert (second.pool.max_inflight, second.pool.max_queue) == (3, 9)
    assert await synced(Settings()) == second, "settings without any pool change nothing"
    other = {"name": "q", "base_model": "other", "replicas": ["http://q:1"]}
    gone = await synced(declared(tmp_path, other))
    assert [view.replica.url for view in gone.replicas] == ["http://by-hand:1"]
    for wrong in (pool | {"base_model": "other"}, pool | {"replicas": ["nonsense"]}):
        with pytest.raises(ConfigurationError, match="'p'"):
            await synced(declared(tmp_path, wrong))
    with pytest.raises(ConfigurationError, match="twice"):
        await synced(declared(tmp_path, pool, pool))


async def test_a_keys_secret_is_shown_once(db: Database, clock: MovableClock) -> None:
    async with db.begin() as session:
        view, secret = await keys.create(
            session,
            clock,
            name="ci",
            scopes=[Scope.INFERENCE, Scope.ADMIN],
            models=["support-*"],
            expires_at=clock.at + timedelta(days=1),
        )
    assert secret.startswith("lg-")
    assert len(secret) == 43
    assert secret not in repr(view)
    async with db.read() as session:
        assert (await keys.list_(session)).data == (view,)
    async with db.begin() as session:
        revoked = await keys.revoke(session, clock, view.id)
        assert revoked.revoked_at == clock.at
        clock.forward(60)
        assert await keys.revoke(session, clock, view.id) == revoked
        assert (await keys.list_(session, revoked=False)).data == ()
        with pytest.raises(NotFound):
            await keys.revoke(session, clock, "key-none")


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "a\0"},
        {"scopes": []},
        {"models": []},
        {"models": ["x" * 301]},
        {"expires_at": datetime(2029, 1, 1, tzinfo=UTC)},
        {"expires_at": datetime(2031, 1, 1)},  # noqa: DTZ001  # no offset: that is the point
    ],
)
async def test_an_odd_key_is_refused(
    db: Database, clock: MovableClock, wrong: dict[str, Any]
) -> None:
    async with db.begin() as session:
        with pytest.raises(InvalidRequest):
            await keys.create(session, clock, **({"name": "k", "scopes": [Scope.ADMIN]} | wrong))


async def test_usage_adds_up_by_the_hour(db: Database, clock: MovableClock) -> None:
    def record(key: str, model: str, tokens: int) -> UsageRecord:
        return UsageRecord(key, model, 1, Usage(tokens, 2 * tokens))

    async with db.begin() as session:
        await usage.add(session, [record("k", "m", 1), record("k", "m", 2)], clock.at)
        await usage.add(session, [record("k", "m", 4), record("k", "n", 1)], clock.at)
        await usage.add(session, [record("k", "m", 1)], clock.at + timedelta(hours=1))
        await usage.add(session, [], clock.at)
        many = [record("other", f"m{n}", 1) for n in range(2500)]
        await usage.add(session, many, clock.at)
    async with db.read() as session:
        lines = await usage.list_(session, key_id="k")
        hour = clock.at.replace(minute=0)
        assert [(line.hour, line.model, line.requests, line.usage) for line in lines] == [
            (hour + timedelta(hours=1), "m", 1, Usage(1, 2)),
            (hour, "m", 3, Usage(7, 14)),
            (hour, "n", 1, Usage(1, 2)),
        ]
        assert len(await usage.list_(session, model="m")) == 2
        assert len(await usage.list_(session, since=hour + timedelta(hours=1))) == 1
        assert len(await usage.list_(session, until=hour + timedelta(hours=1), limit=5000)) == 2502
        with pytest.raises(InvalidRequest):
            await usage.list_(session, limit=0)


async def test_a_failed_transaction_leaves_nothing(db: Database, clock: MovableClock) -> None:
    await add_pool(db, clock)

    async def register_and_fail() -> None:
        async with db.begin() as session:
            await adapters.register(
                session,
                clock,
                name="half",
                base_model="tiny",
                digest=digest_of(1),
                facts=FACTS,
                source="test",
            )
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await register_and_fail()
    async with db.read() as session:
        assert (await adapters.list_(session)).data == ()
