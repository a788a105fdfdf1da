"""A gateway whose disk is full or whose database is locked: it says so, serves, and recovers."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from app.telemetry import Event
from tests.disks import fill, small_disk
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, Gateway, StartGateway, Workbench
from tests.integration.test_admin_adapters import tar, zipped


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


def said(answer: httpx.Response) -> str:
    assert answer.status_code == 503, answer.text
    assert answer.headers["retry-after"] == "5"
    found = answer.json()["error"]
    assert (found["code"], found["type"]) == ("storage_unavailable", "server_error")
    return str(found["message"])


def completes(gateway: Gateway, model: str = BASE) -> None:
    with gateway.openai_client() as client:
        client.completions.create(model=model, prompt="hello")


Send = Callable[[Gateway, Path], httpx.Response]


def by_path(gateway: Gateway, folder: Path) -> httpx.Response:
    body = {"name": "pirate", "source": {"path": str(folder)}}
    return gateway.client.post("/admin/adapters", json=body)


def packed(pack: Callable[[Path], bytes], media_type: str) -> Send:
    def send(gateway: Gateway, folder: Path) -> httpx.Response:
        return gateway.client.post(
            "/admin/adapters",
            params={"name": "pirate"},
            content=pack(folder),
            headers={"content-type": media_type},
        )

    return send


@pytest.mark.parametrize(
    "send",
    [by_path, packed(tar, "application/x-tar"), packed(zipped, "application/zip")],
    ids=["folder", "tar", "zip"],
)
def test_a_full_store(
    start_gateway: StartGateway,
    upstream: FakeUpstream,
    workbench: Workbench,
    disk: Path,
    caplog: pytest.LogCaptureFixture,
    send: Send,
) -> None:
    gateway = start_gateway(upstream.url, store_dir=disk / "store")
    gateway.register("parrot", workbench.adapter())
    kept = files(disk / "store")
    filler = fill(disk)
    refused = said(send(gateway, workbench.adapter()))
    assert "adapter store cannot be written: No space left" in refused
    (logged,) = [r for r in caplog.records if r.message == Event.REQUEST_FAILED]
    assert "No space left" in vars(logged)["fields"]["cause"]
    assert files(disk / "store") == kept
    completes(gateway, "parrot")

    filler.unlink()
    assert send(gateway, workbench.adapter()).status_code == 201
    completes(gateway, "pirate")


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_a_full_database(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench, disk: Path
) -> None:
    gateway = start_gateway(
        upstream.url, data_dir=disk / "data", store_dir=workbench.root / "store"
    )
    gateway.register("parrot", workbench.adapter())
    filler = fill(disk)
    before = gateway.client.get("/admin/pools/pool").json()
    change = {"base_model_aliases": ["x" * 4000] * 100}
    assert "database" in said(gateway.client.patch("/admin/pools/pool", json=change))
    assert gateway.client.get("/admin/pools/pool").json() == before
    completes(gateway, "parrot")

    filler.unlink()
    assert gateway.client.patch("/admin/pools/pool", json=change).status_code == 200
    gateway.register("parrot", workbench.adapter())


def test_a_locked_database(
    start_gateway: StartGateway,
    upstream: FakeUpstream,
    workbench: Workbench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.db.engine.BUSY_TIMEOUT_MS", 20)
    gateway = start_gateway(upstream.url)
    gateway.register("parrot", workbench.adapter())
    path = gateway.settings.data_path / "loragate.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        url = "/admin/adapters/parrot/aliases/prod"
        assert "database is locked" in said(gateway.client.put(url, json={"version": 1}))
        assert "database is locked" in said(by_path(gateway, workbench.adapter()))
        assert gateway.client.get("/admin/adapters/parrot").json()["aliases"].keys() == {"latest"}
        completes(gateway, "parrot")
        other.execute("ROLLBACK")
        assert gateway.client.put(url, json={"version": 1}).status_code == 200
