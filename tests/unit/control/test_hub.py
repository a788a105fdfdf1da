"""The hub source against a stand-in that speaks the two routes it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from app.control.hub import fetch_adapter
from app.errors import AdapterRejected, InvalidRequest, NotFound, SourceUnavailable
from app.settings import Settings
from tests.fakes.adapters import write_adapter
from tests.fakes.hub import COMMIT, FILES, Hub, running


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as server:
        yield server


@pytest.fixture
def weights(tmp_path: Path, hub: Hub) -> Path:
    folder = write_adapter(tmp_path / "hub")
    hub.offer("acme/pirate", folder, "main", "refs/pr/1")
    return folder


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def settings_for(hub: Hub, **more: Any) -> Settings:
    return Settings(hub_endpoint=hub.url + "/", **more)


async def test_the_two_files_of_a_commit_arrive(hub: Hub, weights: Path, into: Path) -> None:
    settings = settings_for(hub, hub_token=SecretStr("hf_secret"))
    assert await fetch_adapter("acme/pirate", None, into, settings) == COMMIT
    for name in FILES:
        assert (into / name).read_bytes() == (weights / name).read_bytes()
    assert [path for path, _ in hub.asked] == [
        "/api/models/acme/pirate/revision/main",
        *(f"/acme/pirate/resolve/{COMMIT}/{name}" for name in ("probe.json", *FILES)),
    ]
    assert not (into / "probe.json").exists(), "a repository needs none"
    assert {key for _, key in hub.asked} == {"Bearer hf_secret"}


async def test_a_probe_comes_along(hub: Hub, weights: Path, into: Path) -> None:
    hub.answer(f"/acme/pirate/resolve/{COMMIT}/probe.json", {"token_ids": [[1, 2]]})
    await fetch_adapter("acme/pirate", None, into, settings_for(hub))
    assert json.loads((into / "probe.json").read_text()) == {"token_ids": [[1, 2]]}


async def test_a_revision_may_have_slashes(hub: Hub, weights: Path, into: Path) -> None:
    assert await fetch_adapter("acme/pirate", "refs/pr/1", into, settings_for(hub)) == COMMIT


async def test_the_token_stays_with_its_endpoint(hub: Hub, weights: Path, into: Path) -> None:
    path = f"/acme/pirate/resolve/{COMMIT}/{FILES[1]}"
    elsewhere = hub.url.replace("127.0.0.1", "localhost") + "/blob"
    hub.answer("/blob", hub.answers[path][1])
    hub.answer(path, b"", status=302, Location=elsewhere)
    await fetch_adapter("acme/pirate", None, into, settings_for(hub, hub_token=SecretStr("t")))
    assert hub.asked[-1] == ("/blob", None)


@pytest.mark.parametrize(
    ("repo", "revision"),
    [
        ("pirate", None),
        ("a/b/c", None),
        ("../../etc", None),
        ("acme/..", None),
        ("acme/pi rate", None),
        ("acme/pirate", "../x"),
        ("acme/pirate", "a b"),
        ("acme/pirate?x=1", None),
    ],
)
async def test_what_is_no_repo_id_is_not_asked_for(
    hub: Hub, into: Path, repo: str, revision: str | None
) -> None:
    with pytest.raises(InvalidRequest):
        await fetch_adapter(repo, revision, into, settings_for(hub))
    assert hub.asked == []


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_repo_that_is_not_shown_is_not_found(hub: Hub, into: Path, status: int) -> None:
    hub.answer("/api/models/acme/pirate/revision/main", {}, status=status)
    with pytest.raises(NotFound, match="acme/pirate"):
        await fetch_adapter("acme/pirate", None, into, settings_for(hub))


async def test_a_repo_without_safetensors_is_refused(hub: Hub, weights: Path, into: Path) -> None:
    del hub.answers[f"/acme/pirate/resolve/{COMMIT}/{FILES[1]}"]
    with pytest.raises(AdapterRejected, match=FILES[1]):
        await fetch_adapter("acme/pirate", None, into, settings_for(hub))


async def test_a_file_over_the_limit_is_refused(hub: Hub, weights: Path, into: Path) -> None:
    with pytest.raises(AdapterRejected, match="at most 1000 bytes"):
        await fetch_adapter("acme/pirate", None, into, settings_for(hub, max_adapter_bytes=1000))


@pytest.mark.parametrize(
    ("path", "status", "body", "headers"),
    [
        ("info", 500, b"", {}),
        ("info", 200, b"<html>", {}),
        ("info", 200, b"[]", {}),
        ("info", 200, b"{}", {}),
        ("info", 200, b'{"sha": 3}', {}),
        ("info", 200, b'{"sha": "../../x"}', {}),
        ("info", 302, b"", {"Location": "/api/models/acme/pirate/revision/main"}),
        ("info", 302, b"", {"Location": "ftp://x"}),
        ("file", 503, b"", {}),
        ("file", 200, b"short", {"Content-Length": "5000"}),
    ],
)
async def test_a_hub_that_misbehaves_is_unavailable(
    hub: Hub,
    weights: Path,
    into: Path,
    path: str,
    status: int,
    body: bytes,
    headers: dict[str, str],
) -> None:
    paths = {
        "info": "/api/models/acme/pirate/revision/main",
        "file": f"/acme/pirate/resolve/{COMMIT}/{FILES[1]}",
    }
    hub.answer(paths[path], body, status, **headers)
    with pytest.raises(SourceUnavailable, match="could not be fetched"):
        await fetch_adapter("acme/pirate", None, into, settings_for(hub))


async def test_a_hub_that_is_not_there_is_unavailable(into: Path) -> None:
    settings = Settings(hub_endpoint="http://127.0.0.1:1")
    with pytest.raises(SourceUnavailable):
        await fetch_adapter("acme/pirate", None, into, settings)
