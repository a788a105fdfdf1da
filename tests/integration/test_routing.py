"""From the name a client writes to the adapter a replica is asked for."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from tests.fakes.faults import Stall
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, Gateway, StartGateway, StartUpstream, Workbench
from tests.waiting import wait_until

COMPLETIONS = "/v1/completions"


def asked(gateway: Gateway, model: str) -> str:
    """Which model answered to this name."""
    answer = gateway.client.post(COMPLETIONS, json={"model": model, "prompt": "hi"})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert found["choices"][0]["text"] == f"{found['model']} heard: hi"
    return str(found["model"])


@pytest.fixture
def versions(gateway: Gateway, workbench: Workbench) -> Gateway:
    """pirate@1, pirate@2, pirate@3."""
    for number in (1, 2, 3):
        registered = gateway.register("pirate", workbench.adapter())
        assert registered["version"]["number"] == number
    return gateway


def test_names(versions: Gateway) -> None:
    assert asked(versions, BASE) == BASE
    assert asked(versions, "pirate@1") == "pirate@1"
    assert asked(versions, "pirate@2") == "pirate@2"
    assert asked(versions, "pirate@3") == "pirate@3"
    assert asked(versions, "pirate") == "pirate@3"
    assert asked(versions, "pirate:latest") == "pirate@3"


def test_a_new_version_takes_over(gateway: Gateway, workbench: Workbench) -> None:
    gateway.register("pirate", workbench.adapter())
    assert asked(gateway, "pirate") == "pirate@1"
    gateway.register("pirate", workbench.adapter())
    assert asked(gateway, "pirate") == "pirate@2"
    assert asked(gateway, "pirate@1") == "pirate@1"


def test_an_alias_moves(versions: Gateway) -> None:
    for version in (1, 3, 2):
        versions.set_alias("pirate", "prod", version=version)
        wait_until(partial(_answers, versions, "pirate:prod", f"pirate@{version}"), within_s=1)
    assert asked(versions, "pirate") == "pirate@3"


def test_a_rollback_is_latest_moved_back(versions: Gateway) -> None:
    assert asked(versions, "pirate") == "pirate@3"
    body = {"alias": "latest"}
    versions.client.post("/admin/adapters/pirate/rollback", json=body).raise_for_status()
    wait_until(lambda: asked(versions, "pirate") == "pirate@2", within_s=1)


def test_weights_split_the_requests(versions: Gateway) -> None:
    targets = [{"version": 1, "weight": 3}, {"version": 2, "weight": 1}]
    versions.set_alias("pirate", "prod", targets=targets)
    wait_until(lambda: versions.client.get("/v1/models/pirate:prod").status_code == 200)
    counts = Counter(asked(versions, "pirate:prod") for _ in range(80))
    assert set(counts) == {"pirate@1", "pirate@2"}
    # 60 are expected, with a standard deviation of 3.9: this is five of them.
    assert 40 <= counts["pirate@1"] <= 79


def test_a_deleted_adapter_is_unknown(versions: Gateway) -> None:
    assert asked(versions, "pirate") == "pirate@3"
    versions.client.delete("/admin/adapters/pirate").raise_for_status()

    def unknown() -> bool:
        body = {"model": "pirate", "prompt": "hi"}
        return versions.client.post(COMPLETIONS, json=body).status_code == 404

    wait_until(unknown, within_s=1)


def test_a_recreated_adapter_is_a_new_version(versions: Gateway, workbench: Workbench) -> None:
    """An engine's caches are keyed by the name: pirate@1 must never mean other weights."""
    assert asked(versions, "pirate@1") == "pirate@1"
    versions.client.delete("/admin/adapters/pirate").raise_for_status()
    registered = versions.register("pirate", workbench.adapter())
    assert registered["version"]["number"] == 4
    assert asked(versions, "pirate") == "pirate@4"


def test_vllm_s_own_calls_register_for_the_pool(
    gateway: Gateway, workbench: Workbench, upstream: FakeUpstream
) -> None:
    body = {"lora_name": "parrot", "lora_path": str(workbench.adapter())}
    answer = gateway.client.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == 200
    assert answer.text == "Success: LoRA adapter 'parrot' added successfully."
    wait_until(lambda: gateway.client.get("/v1/models/parrot").status_code == 200)
    assert asked(gateway, "parrot") == "parrot@1"
    answer = gateway.client.post("/v1/unload_lora_adapter", json={"lora_name": "parrot"})
    assert answer.status_code == 200
    assert answer.text == "Success: LoRA adapter 'parrot' removed successfully."
    wait_until(lambda: gateway.client.get("/v1/models/parrot").status_code == 404)


def test_the_replica_is_given_a_path_of_the_store(
    gateway: Gateway, pirate: str, upstream: FakeUpstream
) -> None:
    asked(gateway, pirate)
    (load,) = upstream.loads()
    assert load.json["lora_name"] == "pirate@1"
    assert load.json["lora_path"].startswith(str(gateway.settings.store_path))
    assert not load.json.get("load_inplace")


def test_the_store_may_be_mounted_elsewhere(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    mount = workbench.root / "mounted"
    mount.symlink_to(workbench.root / "data" / "store")
    pool = workbench.settings(upstream.url).pools[0].model_copy(update={"store_mount": str(mount)})
    gateway = start_gateway(upstream.url, pools=(pool,))
    gateway.register("pirate", workbench.adapter())
    assert asked(gateway, "pirate") == "pirate@1"
    assert upstream.loads()[0].json["lora_path"].startswith(f"{mount}/")


def test_requests_spread_over_the_replicas(
    start_gateway: StartGateway, start_upstream: StartUpstream
) -> None:
    replicas = [start_upstream() for _ in range(3)]
    gateway = start_gateway(*[replica.url for replica in replicas])
    wait_until(lambda: _healthy(gateway) == 3)
    stalls = [Stall() for _ in replicas]
    for replica, stall in zip(replicas, stalls, strict=True):
        replica.script(COMPLETIONS, stall)
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(asked, gateway, BASE) for _ in replicas]
        wait_until(lambda: all(stall.reached.is_set() for stall in stalls))
        for stall in stalls:
            stall.release()
        assert [answer.result() for answer in answers] == [BASE] * 3


def test_a_cordoned_replica_gets_nothing_new(
    start_gateway: StartGateway, start_upstream: StartUpstream
) -> None:
    one, two = start_upstream(), start_upstream()
    gateway = start_gateway(one.url, two.url)
    wait_until(lambda: _healthy(gateway) == 2)
    listed = gateway.client.get("/admin/replicas").json()["data"]
    (cordoned,) = [replica["id"] for replica in listed if replica["url"] == one.url]
    path = f"/admin/replicas/{cordoned}"
    gateway.client.patch(path, json={"cordoned": True}).raise_for_status()
    wait_until(lambda: _flag(gateway, cordoned, "cordoned"))
    before = len(one.requests(COMPLETIONS))
    for _ in range(10):
        asked(gateway, BASE)
    assert len(one.requests(COMPLETIONS)) == before


def test_a_replica_added_while_running_is_used(
    start_gateway: StartGateway, start_upstream: StartUpstream
) -> None:
    gateway = start_gateway(ready=False)
    upstream = start_upstream()
    body = {"url": upstream.url}
    answer = gateway.client.post("/admin/pools/pool/replicas", json=body)
    assert answer.status_code == 201, answer.text
    wait_until(gateway.ready)
    assert asked(gateway, BASE) == BASE


def _answers(gateway: Gateway, model: str, wanted: str) -> bool:
    return asked(gateway, model) == wanted


def _healthy(gateway: Gateway) -> int:
    listed = gateway.client.get("/admin/replicas").json()["data"]
    return sum(replica["state"] == "healthy" for replica in listed)


def _flag(gateway: Gateway, replica_id: str, flag: str) -> bool:
    listed = gateway.client.get("/admin/replicas").json()["data"]
    return any(replica["id"] == replica_id and replica[flag] for replica in listed)
