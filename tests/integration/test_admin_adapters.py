"""Registering, listing, aliasing and deleting adapters over the admin API."""

from __future__ import annotations

import io
import json
import logging
import socket
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.settings import Settings
from app.telemetry import Event
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, Gateway, StartGateway, Workbench

FILES = ("adapter_config.json", "adapter_model.safetensors")


def tar(folder: Path, mode: str = "w") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        for name in FILES:
            archive.add(folder / name, name)
    return packed.getvalue()


def zipped(folder: Path) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in FILES:
            archive.write(folder / name, name)
    return packed.getvalue()


def upload(gateway: Gateway, name: str, body: Any, media_type: str, **query: str) -> httpx.Response:
    return gateway.client.post(
        "/admin/adapters",
        params={"name": name, **query},
        content=body,
        headers={"content-type": media_type},
    )


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    assert found["message"]
    return found


def models(gateway: Gateway) -> list[str]:
    return [model["id"] for model in gateway.client.get("/v1/models").json()["data"]]


def stored(gateway: Gateway) -> list[str]:
    """Every file in the adapter store."""
    root = gateway.settings.store_path
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_register_from_a_folder(gateway: Gateway, workbench: Workbench) -> None:
    answer = gateway.client.post(
        "/admin/adapters",
        json={
            "name": "pirate",
            "source": {"path": str(workbench.adapter())},
            "alias": "prod",
            "metadata": {"team": "sea"},
        },
    )
    assert answer.status_code == 201
    found = answer.json()
    assert found["created"] is True
    version = found["version"]
    assert (version["model"], version["number"], version["rank"]) == ("pirate@1", 1, 4)
    assert sorted(version["target_modules"]) == ["q_proj", "v_proj"]
    assert len(version["digest"]) == 64
    adapter = found["adapter"]
    assert adapter["name"] == "pirate"
    assert adapter["base_model"] == BASE
    assert adapter["latest"] == 1
    assert adapter["metadata"] == {"team": "sea"}
    one = [{"version": 1, "weight": 1}]
    assert adapter["aliases"] == {"latest": one, "prod": one}
    assert adapter["versions"] == [version]
    # It is served by the time it is answered; nobody has to wait and ask again.
    assert {"pirate", "pirate@1", "pirate:prod"} <= set(models(gateway))
    assert gateway.client.get("/admin/adapters/pirate").json() == adapter
    assert gateway.client.get("/admin/adapters/pirate/versions/1").json() == version


PACKINGS = [
    pytest.param(tar, "application/x-tar", id="tar"),
    pytest.param(lambda folder: tar(folder, "w:gz"), "application/gzip", id="tar.gz"),
    pytest.param(lambda folder: tar(folder, "w:gz"), "application/x-gzip", id="x-gzip"),
    pytest.param(zipped, "application/zip", id="zip"),
]


@pytest.mark.parametrize(("pack", "media_type"), PACKINGS)
def test_register_an_archive(
    gateway: Gateway, workbench: Workbench, pack: Any, media_type: str
) -> None:
    folder = workbench.adapter(seed=7)
    answer = upload(gateway, "pirate", pack(folder), media_type, alias="prod")
    assert answer.status_code == 201, answer.text
    by_path = gateway.client.post(
        "/admin/adapters/pirate/versions", json={"source": {"path": str(folder)}}
    )
    # The same weights, however they came, are the same version, and stored once.
    assert by_path.status_code == 200
    assert by_path.json()["created"] is False
    assert by_path.json()["version"]["number"] == 1
    assert len(stored(gateway)) == 2


def test_an_archives_metadata_is_in_the_url(gateway: Gateway, workbench: Workbench) -> None:
    packed = tar(workbench.adapter())
    made = upload(gateway, "pirate", packed, TAR, metadata='{"team": "sea & søn"}')
    assert made.json()["adapter"]["metadata"] == {"team": "sea & søn"}
    again = gateway.client.post(
        "/admin/adapters/pirate/versions",
        params={"metadata": '{"run": 7}'},
        content=tar(workbench.adapter()),
        headers={"content-type": TAR},
    )
    assert again.json()["version"]["metadata"] == {"run": 7}
    assert again.json()["adapter"]["metadata"] == {"team": "sea & søn"}


@pytest.mark.parametrize(
    "metadata",
    ["", "x", "[]", "null", "{", '{"a": NaN}', '{"a": "\\ud800"}', "[" * 9000, f'"{"x" * 20_000}"',
     json.dumps({"a": "x" * 17_000})],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_metadata_that_is_no_object_or_too_long(
    gateway: Gateway, workbench: Workbench, metadata: str
) -> None:
    answer = upload(gateway, "pirate", tar(workbench.adapter()), TAR, metadata=metadata)
    assert error(answer, 400)["param"] == "metadata"
    assert stored(gateway) == []


def test_an_upload_in_chunks_of_unknown_length(gateway: Gateway, workbench: Workbench) -> None:
    packed = tar(workbench.adapter())
    chunks = (packed[at : at + 999] for at in range(0, len(packed), 999))
    assert upload(gateway, "pirate", chunks, "application/x-tar").status_code == 201


def test_an_upload_over_the_limit_leaves_nothing(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    gateway = start_gateway(upstream.url, max_adapter_bytes=10_000)
    endless = (bytes(1 << 20) for _ in range(64))
    member = tarfile.TarInfo(FILES[1])
    member.size = 64 << 20
    chunks = (chunk for part in ([member.tobuf()], endless) for chunk in part)
    found = error(upload(gateway, "big", chunks, "application/x-tar"), 413)
    assert found["code"] == "body_too_large"
    assert stored(gateway) == []


def test_a_declared_length_over_the_limit_is_refused_unread(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    gateway = start_gateway(upstream.url, max_adapter_bytes=10_000)
    with socket.create_connection(("127.0.0.1", gateway.port)) as wire:
        wire.sendall(
            b"POST /admin/adapters?name=big HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/x-tar\r\ncontent-length: 99000000\r\n\r\n"
        )
        wire.settimeout(15)
        answer = wire.makefile("rb").read()  # to the end: the connection is closed too
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"LORAGATE_MAX_ADAPTER_BYTES" in answer


def test_a_client_that_leaves_while_uploading_leaves_nothing(
    gateway: Gateway, workbench: Workbench
) -> None:
    packed = tar(workbench.adapter())
    with socket.create_connection(("127.0.0.1", gateway.port)) as wire:
        wire.sendall(
            b"POST /admin/adapters?name=gone HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/x-tar\r\ncontent-length: %d\r\n\r\n" % len(packed)
        )
        wire.sendall(packed[:2000])
    assert gateway.client.get("/admin/adapters/gone").status_code == 404
    assert upload(gateway, "after", packed, "application/x-tar").status_code == 201
    assert len(stored(gateway)) == 2


def test_a_large_upload_is_not_held_in_memory(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    """The archive is refused for what it holds, after 200 MB of it went by."""
    gateway = start_gateway(upstream.url, max_adapter_bytes=1 << 30)
    before, size = peak_memory(), 200 << 20
    member = tarfile.TarInfo(FILES[1])
    member.size = size
    chunks = (chunk for part in ([member.tobuf()], zeros(size)) for chunk in part)
    assert upload(gateway, "big", chunks, "application/x-tar").status_code in (400, 422)
    assert peak_memory() - before < 60 << 20
    assert stored(gateway) == []


def zeros(size: int) -> Iterator[bytes]:
    for _ in range(size >> 20):
        yield bytes(1 << 20)
    yield bytes(2 * tarfile.BLOCKSIZE)


def peak_memory() -> int:
    """Most memory this process, with the gateway in it, ever had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if "VmHWM" in line)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "source"),
        ({"name": "x", "source": {}}, "source"),
        ({"name": "x", "source": {"path": "/p", "hf_repo": "a/b"}}, "source"),
        ({"name": "x", "source": {"path": "/p", "revision": "main"}}, "source"),
        ({"name": "x", "source": {"paht": "/p"}}, "source.paht"),
        ({"name": "x", "source": {"path": "/p"}, "alais": "prod"}, "alais"),
        ({"name": 3, "source": {"path": "/p"}}, "name"),
    ],
)
def test_a_wrong_field_is_named(gateway: Gateway, body: Any, param: str) -> None:
    found = error(gateway.client.post("/admin/adapters", json=body), 422)
    assert found["code"] == "invalid_request"
    assert found["param"] == param


def test_bodies_that_are_neither(gateway: Gateway) -> None:
    post = gateway.client.post
    broken = error(post("/admin/adapters", content=b"{", headers=JSON), 400)
    assert broken["code"] == "invalid_json"
    empty = error(post("/admin/adapters", content=b"", headers=JSON), 400)
    assert empty["code"] == "invalid_json"
    form = error(post("/admin/adapters", data={"name": "x"}), 400)
    assert form["code"] == "unsupported_media_type"
    assert "application/x-tar" in form["message"]
    nameless = error(post("/admin/adapters", content=b"", headers={"content-type": TAR}), 400)
    assert nameless["param"] == "name"


JSON = {"content-type": "application/json"}
TAR = "application/x-tar"


def test_weights_that_cannot_be_served_are_refused_with_every_reason(
    gateway: Gateway, workbench: Workbench
) -> None:
    folder = workbench.adapter(rank=64)
    config = json.loads((folder / FILES[0]).read_text())
    (folder / FILES[0]).write_text(json.dumps({**config, "use_dora": True}))
    answer = upload(gateway, "wide", tar(folder), TAR)
    found = error(answer, 422)
    assert found["code"] == "adapter_rejected"
    fields = {detail["field"] for detail in found["details"]}
    assert "r" in fields
    assert "use_dora" in fields
    assert {"field", "found", "allowed"} == set(found["details"][0])
    assert stored(gateway) == []
    assert gateway.client.get("/admin/adapters/wide").status_code == 404


def test_a_folder_outside_the_import_folders(gateway: Gateway, tmp_path: Path) -> None:
    body = {"name": "x", "source": {"path": "/etc"}}
    answer = gateway.client.post("/admin/adapters", json=body)
    assert answer.status_code in (400, 403, 422), answer.text
    assert "LORAGATE_IMPORT_DIRS" in answer.text


def test_names_that_exist_and_that_do_not(gateway: Gateway, workbench: Workbench) -> None:
    gateway.register("pirate", workbench.adapter())
    body = {"source": {"path": str(workbench.adapter())}}
    twice = gateway.client.post("/admin/adapters", json={"name": "pirate", **body})
    assert error(twice, 409)["code"] == "conflict"
    assert twice.headers["x-should-retry"] == "false"
    missing = gateway.client.post("/admin/adapters/nobody/versions", json=body)
    assert error(missing, 404)["code"] == "not_found"
    for bad in ("a b", "a@1", "a:b", "-a", "x" * 129):
        answer = gateway.client.post("/admin/adapters", json={"name": bad, **body})
        assert error(answer, 400)["param"] == "name"


def test_versions_aliases_and_rollback(gateway: Gateway, workbench: Workbench) -> None:
    for _ in range(3):
        gateway.register("pirate", workbench.adapter())
    client, url = gateway.client, "/admin/adapters/pirate"
    split = [{"version": 2, "weight": 9}, {"version": 3, "weight": 1}]
    assert client.put(f"{url}/aliases/prod", json={"version": 1}).status_code == 200
    moved = client.put(f"{url}/aliases/prod", json={"targets": split})
    assert moved.json()["aliases"]["prod"] == split
    assert "pirate:prod" in models(gateway)
    back = client.post(f"{url}/rollback", json={"alias": "prod"})
    assert back.json()["aliases"]["prod"] == [{"version": 1, "weight": 1}]
    latest = client.post(f"{url}/rollback")
    assert latest.json()["latest"] == 2

    pointed = client.delete(f"{url}/versions/1")
    assert error(pointed, 409)["code"] == "conflict"
    gone = client.delete(f"{url}/aliases/prod")
    assert gone.json() == {"id": "pirate:prod", "object": "adapter.alias", "deleted": True}
    assert "pirate:prod" not in models(gateway)
    deleted = client.delete(f"{url}/versions/1")
    assert deleted.json() == {"id": "pirate@1", "object": "adapter.version", "deleted": True}
    assert error(client.get(f"{url}/versions/1"), 404)
    assert error(client.delete(f"{url}/aliases/latest"), 409)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({"version": 1, "targets": []}, 422),
        ({"version": 0}, 422),
        ({"targets": []}, 400),
        ({"targets": [{"version": 1, "weight": 0}]}, 422),
        ({"version": 9}, 404),
    ],
)
def test_an_alias_that_makes_no_sense(
    gateway: Gateway, pirate: str, body: Any, status: int
) -> None:
    assert error(gateway.client.put("/admin/adapters/pirate/aliases/prod", json=body), status)


def test_delete_an_adapter(gateway: Gateway, pirate: str, workbench: Workbench) -> None:
    answer = gateway.client.delete("/admin/adapters/pirate")
    assert answer.json() == {"id": "pirate", "object": "adapter", "deleted": True}
    assert not [model for model in models(gateway) if model.startswith("pirate")]
    assert error(gateway.client.delete("/admin/adapters/pirate"), 404)
    again = gateway.register("pirate", workbench.adapter())
    assert again["version"]["number"] == 2  # a number is never given twice


def test_the_log_says_who(
    gateway: Gateway, workbench: Workbench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        key = gateway.create_key("admin")["id"]
        folder = str(workbench.adapter())
        gateway.client.post("/admin/adapters", json={"name": "a", "source": {"path": folder}})
        upload(gateway, "b", tar(workbench.adapter()), TAR)
        for name in ("a", "b"):
            gateway.client.post(
                f"/admin/adapters/{name}/versions",
                content=tar(workbench.adapter()),
                headers={"content-type": TAR},
            )
        loaded = {"lora_name": "c", "lora_path": str(workbench.adapter())}
        gateway.client.post("/v1/load_lora_adapter", json=loaded)
        gateway.client.put("/admin/adapters/a/aliases/prod", json={"version": 1})
        gateway.client.post("/admin/adapters/a/rollback")
        gateway.client.delete("/admin/adapters/a/aliases/prod")
        gateway.client.delete("/admin/adapters/a/versions/2")
        gateway.client.delete("/admin/adapters/b")
        gateway.client.post("/v1/unload_lora_adapter", json={"lora_name": "c"})
    logged = [(record.message, vars(record).get("fields", {})) for record in caplog.records]
    said = [(event, fields["by"]) for event, fields in logged if event in CHANGES]
    assert said == [
        (event, key) for event in (CHANGES[:1] * 5 + CHANGES[1:2] * 3 + CHANGES[2:] * 3)
    ]


CHANGES = [Event.ADAPTER_REGISTERED, Event.ALIAS_MOVED, Event.ADAPTER_DELETED]


def test_the_list_by_pages(gateway: Gateway, workbench: Workbench) -> None:
    folder = workbench.adapter()
    for name in ("ant", "bee", "bear", "cow"):
        gateway.register(name, folder)

    def page(**query: Any) -> tuple[list[str], bool, str | None]:
        found = gateway.client.get("/admin/adapters", params=query).json()
        assert found["object"] == "list"
        return [each["name"] for each in found["data"]], found["has_more"], found["next_after"]

    assert page(limit=2) == (["ant", "bear"], True, "bear")
    assert page(limit=2, after="bear") == (["bee", "cow"], False, None)
    assert page(prefix="be") == (["bear", "bee"], False, None)
    assert page(base_model=BASE, limit=1, prefix="c") == (["cow"], False, None)
    assert page(base_model="other") == ([], False, None)
    for limit in ("0", "1001", "many"):
        answer = gateway.client.get("/admin/adapters", params={"limit": limit})
        assert error(answer, 422)["param"] == "limit"


def test_a_restart_forgets_nothing(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    first = start_gateway(upstream.url)
    shown = first.register("pirate", workbench.adapter())["adapter"]
    first.close()
    settings: Settings = workbench.settings(upstream.url)
    assert settings.data_path == first.settings.data_path
    second = start_gateway(upstream.url)
    assert second.client.get("/admin/adapters/pirate").json() == shown
