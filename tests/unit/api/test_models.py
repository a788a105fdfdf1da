"""The list of models: who sees what, and at what price with very many."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime

import pytest

from app.api.openai.models import Catalogue
from app.domain import Adapter, AdapterVersion, Alias, BaseModel, Pool, Principal, Scope
from app.serving.snapshot import Snapshot

MADE = datetime(2026, 1, 31, tzinfo=UTC)


def adapter(name: str, *numbers: int) -> Adapter:
    versions = {n: AdapterVersion(name, n, "0" * 64, 8, "tiny") for n in numbers}
    latest = Alias("latest", ((max(numbers), 1),))
    return Adapter(name, "tiny", "pool", MADE, versions, {"latest": latest})


def snapshot(*adapters: Adapter, number: int = 1) -> Snapshot:
    return Snapshot(
        number=number,
        bases={"tiny": BaseModel("tiny"), "unserved": BaseModel("unserved")},
        pools={"pool": Pool("pool", "tiny", "tiny")},
        base_pools={"tiny": "pool"},
        adapters={each.name: each for each in adapters},
    )


def caller(*globs: str) -> Principal:
    return Principal("key-1", "test", frozenset({Scope.INFERENCE}), globs or None)


async def ids(catalogue: Catalogue, of: Snapshot, *globs: str) -> list[str]:
    found = json.loads(await catalogue.listing(of, caller(*globs)))
    assert found["object"] == "list"
    return [model["id"] for model in found["data"]]


async def test_bases_adapters_versions_and_aliases() -> None:
    of = snapshot(adapter("bot", 1, 3))
    found = await ids(Catalogue(), of)
    assert found == ["tiny", "bot", "bot@1", "bot@3", "bot:latest"]
    body = json.loads(await Catalogue().listing(of, caller()))
    assert body["data"][1] == {
        "id": "bot",
        "object": "model",
        "created": int(MADE.timestamp()),
        "owned_by": "loragate",
        "parent": "tiny",
    }
    assert body["data"][0]["parent"] is None


async def test_an_allow_list_hides_the_rest() -> None:
    of, catalogue = snapshot(adapter("bot", 1), adapter("other", 1)), Catalogue()
    assert await ids(catalogue, of, "bot") == ["bot", "bot@1", "bot:latest"]
    assert await ids(catalogue, of, "*@1") == ["bot@1", "other@1"]
    assert await ids(catalogue, of, "tin?") == ["tiny"]
    assert await ids(catalogue, of, "nothing") == []
    assert len(await ids(catalogue, of)) == 7


async def test_a_new_snapshot_is_seen_and_an_old_list_is_kept() -> None:
    catalogue = Catalogue()
    first, second = snapshot(adapter("bot", 1)), snapshot(adapter("bot", 1, 2), number=2)
    kept = await catalogue.listing(first, caller())
    assert await catalogue.listing(first, caller()) is kept
    assert "bot@2" in await ids(catalogue, second)


async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.openai.models._KEPT_BYTES", 1500)
    of, catalogue = snapshot(adapter("bot", 1)), Catalogue()
    first = await catalogue.listing(of, caller("bot"))
    for n in range(20):
        await catalogue.listing(of, caller("bot", f"other-{n}"))
    assert await catalogue.listing(of, caller("bot")) == first
    assert sum(map(len, catalogue._lists.values())) <= 1500


async def test_a_hundred_thousand_adapters_do_not_hold_up_the_loop() -> None:
    of, catalogue = snapshot(*(adapter(f"bot-{n}", 1) for n in range(100_000))), Catalogue()
    longest, running = 0.0, True

    async def watch() -> None:
        nonlocal longest
        while running:
            before = time.monotonic()
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - before)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watch())
        lists = await asyncio.gather(*(catalogue.listing(of, caller()) for _ in range(4)))
        running = False
    assert lists[0].count(b'"id"') == 300_001
    assert all(each is lists[0] for each in lists)
    assert longest < 1.0
