"""Pools and replicas over the admin API, and what the fleet sees of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, Gateway, StartGateway, StartUpstream, Workbench
from tests.waiting import wait_until

OTHER = "acme/other-base"


def replicas(gateway: Gateway) -> dict[str, dict[str, Any]]:
    return {each["url"]: each for each in gateway.client.get("/admin/replicas").json()["data"]}


def test_a_declared_pool_is_shown(gateway: Gateway, upstream: FakeUpstream) -> None:
    (pool,) = gateway.client.get("/admin/pools").json()["data"]
    assert pool == gateway.client.get("/admin/pools/pool").json()
    assert (pool["name"], pool["base_model"], pool["served_name"]) == ("pool", BASE, BASE)
    assert pool["declared"] is True
    assert pool["base_model_known"] is True
    (replica,) = pool["replicas"]
    assert replica["url"] == upstream.url
    assert replica["state"] == "healthy"
    assert replica["inflight"] == 0
    assert gateway.client.get("/admin/pools/pool/replicas").json()["data"] == [replica]


def test_a_pool_added_by_hand_serves(
    gateway: Gateway, start_upstream: StartUpstream, workbench: Workbench, tmp_path: Path
) -> None:
    server = start_upstream()
    config = json.loads((workbench.base / "config.json").read_text())
    answer = gateway.client.post(
        "/admin/pools",
        json={
            "name": "other",
            "base_model": OTHER,
            "base_model_config": config,
            "base_model_aliases": ["/models/other"],
            "served_name": BASE,
            "max_lora_rank": 8,
            "max_loras": 4,
            "max_cpu_loras": 16,
            "max_inflight": 32,
            "max_queue": 64,
            "replicas": [{"url": server.url, "api_key": "upstream-secret"}],
        },
    )
    assert answer.status_code == 201, answer.text
    assert "upstream-secret" not in answer.text
    assert answer.json()["replicas"][0]["pool"] == "other"
    fields = ("max_loras", "max_cpu_loras", "max_inflight", "max_queue")
    assert [answer.json()[field] for field in fields] == [4, 16, 32, 64]
    wait_until(lambda: replicas(gateway)[server.url]["state"] == "healthy")
    assert gateway.client.get(f"/v1/models/{OTHER}").json()["parent"] is None
    registered = gateway.register("pirate", workbench.adapter(base="/models/other"))
    assert registered["adapter"]["pool"] == "other"
    with gateway.openai_client() as client:
        client.completions.create(model="pirate", prompt="hello")
    assert replicas(gateway)[server.url]["resident"] == ["pirate@1"]


def test_changing_a_pool(gateway: Gateway) -> None:
    url = "/admin/pools/pool"
    changed = gateway.client.patch(url, json={"max_lora_rank": 128, "base_model_aliases": ["t"]})
    assert changed.status_code == 200, changed.text
    assert changed.json()["max_lora_rank"] == 128
    assert changed.json()["base_model_aliases"] == ["t"]
    assert changed.json()["base_model_known"] is True
    mounted = gateway.client.patch(url, json={"store_mount": "/mnt", "max_loras": None})
    assert (mounted.json()["store_mount"], mounted.json()["max_loras"]) == ("/mnt", 8)
    assert gateway.client.patch(url, json={"store_mount": None}).json()["store_mount"] is None
    slots = gateway.client.patch(url, json={"max_loras": 2, "max_cpu_loras": 4}).json()
    assert (slots["max_loras"], slots["max_cpu_loras"]) == (2, 4)
    slots = gateway.client.patch(url, json={"max_loras": 8, "max_cpu_loras": None}).json()
    assert (slots["max_loras"], slots["max_cpu_loras"]) == (8, None)
    for body, param in (
        ({"max_lora_rank": 0}, "max_lora_rank"),
        ({"base_model": "x"}, "base_model"),
        ({"max_inflight": 0}, "max_inflight"),
        ({"max_queue": -1}, "max_queue"),
    ):
        answer = gateway.client.patch(url, json=body)
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"]["param"] == param
    answer = gateway.client.patch(url, json={"max_cpu_loras": 7})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_cpu_loras")


def test_a_base_gets_to_be_known(gateway: Gateway, workbench: Workbench) -> None:
    """From then on adapters are checked against it, under its new names too."""
    made = gateway.client.post("/admin/pools", json={"name": "other", "base_model": OTHER}).json()
    assert made["base_model_known"] is False
    config = json.loads((workbench.base / "config.json").read_text())
    change = {"base_model_config": config, "base_model_aliases": ["also"]}
    changed = gateway.client.patch("/admin/pools/other", json=change).json()
    assert changed["base_model_known"] is True
    assert gateway.register("fits", workbench.adapter(base="also"))["adapter"]["pool"] == "other"
    wider = {**config, "hidden_size": config["hidden_size"] * 2}
    gateway.client.patch("/admin/pools/other", json={"base_model_config": wider})
    body = {"name": "odd", "source": {"path": str(workbench.adapter(base="also"))}}
    refused = gateway.client.post("/admin/adapters", json=body)
    assert refused.json()["error"]["code"] == "adapter_rejected", refused.text


def test_deleting_a_pool(gateway: Gateway, pirate: str) -> None:
    needed = gateway.client.delete("/admin/pools/pool")
    assert needed.status_code == 409
    gateway.client.delete(f"/admin/adapters/{pirate}")
    deleted = gateway.client.delete("/admin/pools/pool")
    assert deleted.json() == {"id": "pool", "object": "pool", "deleted": True}
    assert gateway.client.get("/admin/pools").json()["data"] == []
    assert replicas(gateway) == {}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/admin/pools", {"name": "pool", "base_model": "new"}, 409, "name"),
        ("/admin/pools", {"name": "new", "base_model": BASE}, 409, "base_model"),
        ("/admin/pools", {"name": "a b", "base_model": "new"}, 400, "name"),
        ("/admin/pools", {"name": "new"}, 422, "base_model"),
        ("/admin/pools/pool/replicas", {"url": "http://h/v1"}, 400, "url"),
        ("/admin/pools/pool/replicas", {"url": "ftp://h"}, 400, "url"),
        ("/admin/pools/nowhere/replicas", {"url": "http://h"}, 404, "pool"),
    ],
)
def test_what_is_refused(gateway: Gateway, path: str, body: Any, status: int, param: str) -> None:
    answer = gateway.client.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


def test_cordon_drain_and_remove(
    start_gateway: StartGateway, start_upstream: StartUpstream
) -> None:
    kept, going = start_upstream(), start_upstream()
    gateway = start_gateway(kept.url)
    added = gateway.client.post("/admin/pools/pool/replicas", json={"url": going.url})
    assert added.status_code == 201
    again = gateway.client.post("/admin/pools/pool/replicas", json={"url": going.url})
    assert again.status_code == 409
    url = f"/admin/replicas/{added.json()['id']}"
    wait_until(lambda: replicas(gateway)[going.url]["state"] == "healthy")

    assert gateway.client.patch(url, json={"cordoned": True}).json()["cordoned"] is True
    with gateway.openai_client() as client:
        for _ in range(6):
            client.completions.create(model=BASE, prompt="hello")
    assert not [each for each in going.requests() if each.path == "/v1/completions"]

    early = gateway.client.delete(url)
    assert early.status_code == 409
    drained = gateway.client.patch(url, json={"draining": True}).json()
    assert (drained["state"], drained["draining"]) == ("draining", True)
    assert gateway.client.delete(url).json()["deleted"] is True
    assert set(replicas(gateway)) == {kept.url}
    assert gateway.client.delete(url).status_code == 404


def test_a_dead_replica_is_shown_as_such_and_removed_by_force(
    start_gateway: StartGateway, start_upstream: StartUpstream
) -> None:
    server = start_upstream()
    gateway = start_gateway(server.url)
    server.stop()
    wait_until(lambda: replicas(gateway)[server.url]["state"] == "unhealthy")
    id = replicas(gateway)[server.url]["id"]
    ready = gateway.client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["status"] == "no healthy replica"
    forced = gateway.client.delete(f"/admin/replicas/{id}", params={"force": True})
    assert forced.json()["deleted"] is True
    assert gateway.client.get("/readyz").json()["status"] == "ready"
