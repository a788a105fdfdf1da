"""A new version gets where the old one is before an alias points to it, and is proven there.

The fake replicas' logprobs come from the weights they loaded, so a probe made from other numbers
is what a wrongly served adapter looks like.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.faults import Stall, Status
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, Gateway, StartGateway, StartUpstream, Workbench
from tests.waiting import wait_until

COMPLETIONS = "/v1/completions"
LOAD = "/v1/load_lora_adapter"
UNLOAD = "/v1/unload_lora_adapter"
VERSIONS = "/admin/adapters/pirate/versions"
ALIAS = "/admin/adapters/pirate/aliases/prod"
TOKENS = [[5, 6, 7, 8], [9, 10]]


def ask(gateway: Gateway, model: str = "pirate", prompt: Any = "hi") -> httpx.Response:
    return gateway.client.post(COMPLETIONS, json={"model": model, "prompt": prompt})


def heard(gateway: Gateway, model: str = "pirate") -> str:
    """The version that answered."""
    answer = ask(gateway, model)
    assert answer.status_code == 200, answer.text
    version = answer.headers["x-loragate-adapter-version"]
    assert answer.json()["choices"][0]["text"] == f"{version} heard: hi"
    return version


def use_everywhere(gateway: Gateway, model: str = "pirate") -> None:
    """A batch large enough to be worth a load on every replica."""
    answer = ask(gateway, model, [f"{n} " * 40 for n in range(64)])
    assert answer.status_code == 200, answer.text


def register(gateway: Gateway, folder: Path, **fields: Any) -> httpx.Response:
    body = {"source": {"path": str(folder)}, **fields}
    return gateway.client.post(VERSIONS, json=body)


def points_to(gateway: Gateway, alias: str = "latest") -> int:
    found = gateway.client.get("/admin/adapters/pirate").json()
    (target,) = found["aliases"][alias]
    return int(target["version"])


def numbers(gateway: Gateway) -> list[int]:
    found = gateway.client.get("/admin/adapters/pirate").json()
    return [version["number"] for version in found["versions"]]


def replica_of(gateway: Gateway, upstream: FakeUpstream) -> dict[str, Any]:
    listed = gateway.client.get("/admin/replicas").json()["data"]
    (found,) = [replica for replica in listed if replica["url"] == upstream.url]
    return dict(found)


Probe = dict[str, Any]


@pytest.fixture
def train(start_upstream: StartUpstream) -> Callable[[Path], Probe]:
    """What a trainer would say of an adapter: a replica's numbers that no gateway knows."""
    trainer = start_upstream()

    def probe(folder: Path) -> Probe:
        name = f"trained-{folder.name}"
        load = {"lora_name": name, "lora_path": str(folder)}
        httpx.post(f"{trainer.url}{LOAD}", json=load).raise_for_status()
        rows = []
        for tokens in TOKENS:
            body = {"model": name, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0}
            answer = httpx.post(f"{trainer.url}{COMPLETIONS}", json=body).json()
            (choice,) = answer["choices"]
            pairs = zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True)
            rows.append([ranked[str(token)]["logprob"] for token, ranked in pairs])
        return {"token_ids": TOKENS, "logprobs": rows, "dtype": "float32"}

    return probe


def probed(folder: Path, probe: Probe) -> Path:
    (folder / "probe.json").write_text(json.dumps(probe))
    return folder


@pytest.fixture
def used(gateway: Gateway, pirate: str) -> Gateway:
    """A gateway with pirate@1 in use."""
    assert heard(gateway) == "pirate@1"
    return gateway


# --- before an alias moves


def test_latest_moves_once_the_new_version_is_loaded(
    used: Gateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    stall = Stall()
    upstream.script(LOAD, stall)
    with ThreadPoolExecutor(1) as threads:
        registering = threads.submit(register, used, workbench.adapter())
        assert stall.reached.wait(5)
        assert (numbers(used), points_to(used)) == ([1, 2], 1)
        assert heard(used) == "pirate@1"
        stall.release()
        assert registering.result().status_code == 201
    assert points_to(used) == 2
    assert heard(used) == "pirate@2"
    assert len(upstream.loads("pirate@2")) == 1


def test_an_alias_moves_once_its_version_is_loaded(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    """Also to a version that was unloaded since."""
    gateway = start_gateway(upstream.url, unload_grace_s=0.1)
    gateway.register("pirate", workbench.adapter(), alias="prod")
    assert heard(gateway, "pirate:prod") == "pirate@1"
    for _ in (2, 3):
        register(gateway, workbench.adapter()).raise_for_status()
    wait_until(lambda: set(upstream.engine.adapters) == {"pirate@1", "pirate@3"})
    stall = Stall()
    upstream.script(LOAD, stall)
    with ThreadPoolExecutor(1) as threads:
        moving = threads.submit(gateway.set_alias, "pirate", "prod", version=2)
        assert stall.reached.wait(5)
        assert heard(gateway, "pirate:prod") == "pirate@1"
        stall.release()
        moving.result()
    assert heard(gateway, "pirate:prod") == "pirate@2"
    assert len(upstream.loads("pirate@2")) == 2


def test_a_new_version_goes_where_the_old_one_is_and_nowhere_else(
    start_gateway: StartGateway, start_upstream: StartUpstream, workbench: Workbench
) -> None:
    upstreams = [start_upstream() for _ in range(3)]
    gateway = start_gateway(*[upstream.url for upstream in upstreams])
    wait_until(lambda: all(replica_of(gateway, each)["state"] == "healthy" for each in upstreams))
    gateway.register("pirate", workbench.adapter())
    heard(gateway)
    (home,) = [upstream for upstream in upstreams if upstream.loads()]
    register(gateway, workbench.adapter()).raise_for_status()
    assert [len(upstream.loads("pirate@2")) for upstream in upstreams] == [
        int(upstream is home) for upstream in upstreams
    ]
    use_everywhere(gateway)
    assert all(upstream.loads("pirate@2") for upstream in upstreams)
    register(gateway, workbench.adapter()).raise_for_status()
    assert [len(upstream.loads("pirate@3")) for upstream in upstreams] == [1, 1, 1]


def test_an_adapter_that_nobody_uses_is_not_loaded(
    gateway: Gateway, pirate: str, upstream: FakeUpstream, workbench: Workbench
) -> None:
    register(gateway, workbench.adapter()).raise_for_status()
    gateway.set_alias("pirate", "prod", version=1)
    assert points_to(gateway) == 2
    assert upstream.loads() == []


def test_weights_that_no_replica_takes_move_no_alias(
    used: Gateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    upstream.script(LOAD, Status(500, b'{"error":{"message":"worker failed"}}'))
    answer = register(used, workbench.adapter())
    assert answer.status_code == 502
    error = answer.json()["error"]
    assert error["code"] == "adapter_load_failed"
    assert "pirate@2 is registered, but its aliases stay where they were" in error["message"]
    assert "worker failed" in error["message"]
    assert (numbers(used), points_to(used)) == ([1, 2], 1)
    assert heard(used) == "pirate@1"


# --- probes


def test_a_probe_that_agrees_lets_the_alias_move(
    used: Gateway, workbench: Workbench, train: Callable[[Path], Probe]
) -> None:
    folder = workbench.adapter()
    answer = register(used, probed(folder, train(folder)), alias="prod")
    assert answer.status_code == 201, answer.text
    assert heard(used) == heard(used, "pirate:prod") == "pirate@2"


def test_a_probe_that_disagrees_keeps_latest(
    used: Gateway, upstream: FakeUpstream, workbench: Workbench, train: Callable[[Path], Probe]
) -> None:
    """The version is there, to look at; nobody is answered by it, by whatever name."""
    answer = register(used, probed(workbench.adapter(), train(workbench.adapter())), alias="prod")
    assert answer.status_code == 502, answer.text
    error = answer.json()["error"]
    assert error["code"] == "probe_failed"
    assert "pirate@2 is registered, but its aliases stay where they were" in error["message"]
    assert "differ: max" in error["message"]
    assert (numbers(used), points_to(used)) == ([1, 2], 1)
    assert heard(used) == "pirate@1"
    refused = ask(used, "pirate@2")
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "probe_failed")
    assert ask(used, "pirate:prod").status_code == 404
    quarantined = replica_of(used, upstream)["quarantined"]
    assert list(quarantined) == ["pirate@2"]
    assert "max" in quarantined["pirate@2"]


def test_an_alias_is_not_put_on_a_version_that_is_served_wrongly(
    used: Gateway, workbench: Workbench, train: Callable[[Path], Probe]
) -> None:
    used.set_alias("pirate", "prod", version=1)
    assert heard(used, "pirate:prod") == "pirate@1"
    register(used, probed(workbench.adapter(), train(workbench.adapter())))
    for target in ({"version": 2}, {"targets": [{"version": 2, "weight": 9}]}):
        answer = used.client.put(ALIAS, json=target)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "probe_failed")
        assert points_to(used, "prod") == 1
    assert heard(used, "pirate:prod") == "pirate@1"


def test_a_probed_version_is_verified_though_nobody_uses_the_adapter(
    gateway: Gateway, pirate: str, workbench: Workbench, train: Callable[[Path], Probe]
) -> None:
    wrong = probed(workbench.adapter(), train(workbench.adapter()))
    registered = register(gateway, wrong)
    assert registered.status_code == 201, registered.text
    answer = gateway.client.put(ALIAS, json={"version": 2})
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "probe_failed")


def test_a_right_probe_set_later_lifts_the_quarantine(
    used: Gateway, upstream: FakeUpstream, workbench: Workbench, train: Callable[[Path], Probe]
) -> None:
    folder = workbench.adapter()
    right = train(folder)
    register(used, probed(folder, train(workbench.adapter())))
    assert ask(used, "pirate@2").status_code == 502
    used.client.put(f"{VERSIONS}/2/probe", json=right).raise_for_status()
    assert replica_of(used, upstream)["quarantined"] == {}
    assert heard(used, "pirate@2") == "pirate@2"
    assert points_to(used) == 1
    used.set_alias("pirate", "latest", version=2)
    assert heard(used) == "pirate@2"
    assert len(upstream.loads("pirate@2")) == 1, "the weights were right all the time"


def test_a_wrong_probe_set_later_stops_the_version(
    used: Gateway, workbench: Workbench, train: Callable[[Path], Probe]
) -> None:
    wrong = train(workbench.adapter())
    used.client.put(f"{VERSIONS}/1/probe", json=wrong).raise_for_status()
    assert ask(used).json()["error"]["code"] == "probe_failed"
    used.client.delete(f"{VERSIONS}/1/probe").raise_for_status()
    assert heard(used) == "pirate@1"


def test_a_replica_that_serves_a_version_wrongly_serves_it_to_nobody(
    start_gateway: StartGateway,
    start_upstream: StartUpstream,
    workbench: Workbench,
    train: Callable[[Path], Probe],
) -> None:
    """And everything else as before; the others serve that version."""
    right, wrong = start_upstream(), start_upstream()
    wrong.engine.wrong = True
    gateway = start_gateway(right.url, wrong.url)
    wait_until(lambda: replica_of(gateway, wrong)["state"] == "healthy")
    folder = workbench.adapter()
    gateway.register("pirate", probed(folder, train(folder)))
    gateway.register("parrot", workbench.adapter())
    use_everywhere(gateway)
    wait_until(lambda: "pirate@1" in replica_of(gateway, wrong)["quarantined"])
    assert "differ: max" in replica_of(gateway, wrong)["quarantined"]["pirate@1"]
    assert replica_of(gateway, right)["quarantined"] == {}
    for _ in range(20):
        assert heard(gateway) == "pirate@1"
    use_everywhere(gateway)
    served = [r for r in wrong.requests(COMPLETIONS) if r.json["model"] == "pirate@1"]
    assert all("prompt_logprobs" in request.json for request in served), "nothing but the probe"
    use_everywhere(gateway, "parrot")
    use_everywhere(gateway, BASE)
    asked = {request.json["model"] for request in wrong.requests(COMPLETIONS)}
    assert {"parrot@1", BASE} <= asked


def test_a_restarted_replica_is_trusted_again_after_it_is_asked(
    used: Gateway, upstream: FakeUpstream, workbench: Workbench, train: Callable[[Path], Probe]
) -> None:
    folder = workbench.adapter()
    upstream.engine.wrong = True
    assert register(used, probed(folder, train(folder))).status_code == 502
    upstream.engine.wrong = False
    upstream.stop()
    wait_until(lambda: replica_of(used, upstream)["state"] == "unhealthy")
    upstream.engine.adapters.clear()
    upstream.start()
    wait_until(lambda: replica_of(used, upstream)["state"] == "healthy")
    assert replica_of(used, upstream)["quarantined"] == {}
    assert heard(used, "pirate@2") == "pirate@2"


def test_moving_back_to_a_verified_version_does_not_verify_again(
    used: Gateway, upstream: FakeUpstream, workbench: Workbench, train: Callable[[Path], Probe]
) -> None:
    folder = workbench.adapter()
    register(used, probed(folder, train(folder))).raise_for_status()

    def scored() -> int:
        return len([r for r in upstream.requests(COMPLETIONS) if "prompt_logprobs" in r.json])

    assert scored() == len(TOKENS)
    for version in (1, 2, 1, 2):
        used.set_alias("pirate", "prod", version=version)
        assert heard(used, "pirate:prod") == f"pirate@{version}"
    assert scored() == len(TOKENS)


# --- back


def test_a_rollback_is_one_call_and_at_once(
    used: Gateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    register(used, workbench.adapter()).raise_for_status()
    assert heard(used) == "pirate@2"
    before = len(upstream.loads())
    used.client.post("/admin/adapters/pirate/rollback").raise_for_status()
    assert heard(used) == "pirate@1"
    assert len(upstream.loads()) == before, "it was still there"


def test_a_rollback_needs_no_replica(
    used: Gateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    register(used, workbench.adapter()).raise_for_status()
    upstream.stop()
    used.client.post("/admin/adapters/pirate/rollback").raise_for_status()
    assert points_to(used) == 1


def test_the_same_weights_again_move_an_alias_that_was_held_back(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    """Once whatever held them back is mended; what happened in between does not matter."""
    gateway = start_gateway(upstream.url)
    gateway.register("pirate", workbench.adapter())
    heard(gateway)
    folder = workbench.adapter()
    upstream.script(LOAD, Status(500, b'{"error":{"message":"worker failed"}}'))
    assert register(gateway, folder).status_code == 502
    upstream.stop()
    wait_until(lambda: replica_of(gateway, upstream)["state"] == "unhealthy")
    upstream.restart()
    wait_until(lambda: replica_of(gateway, upstream)["state"] == "healthy")
    again = register(gateway, folder)
    assert again.status_code == 200, again.text
    assert (again.json()["created"], again.json()["version"]["number"]) == (False, 2)
    assert heard(gateway) == "pirate@2"


def test_the_same_weights_again_do_not_undo_a_rollback(used: Gateway, workbench: Workbench) -> None:
    folder = workbench.adapter()
    register(used, folder).raise_for_status()
    used.client.post("/admin/adapters/pirate/rollback").raise_for_status()
    assert register(used, folder).json()["created"] is False
    assert points_to(used) == 1


# --- unloading


def test_a_version_over_its_grace_is_unloaded_however_much_it_was_asked_for(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    gateway = start_gateway(upstream.url, unload_grace_s=0.2)
    gateway.register("pirate", workbench.adapter())
    for _ in range(100):
        heard(gateway)
    register(gateway, workbench.adapter()).raise_for_status()
    assert heard(gateway) == "pirate@2"
    wait_until(lambda: list(upstream.engine.adapters) == ["pirate@2"])
    assert replica_of(gateway, upstream)["resident"] == ["pirate@2"]
    assert heard(gateway, "pirate@1") == "pirate@1", "it is registered, and loaded for who asks"


def test_a_version_an_alias_points_to_stays_loaded(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    gateway = start_gateway(upstream.url, unload_grace_s=0.0)
    for _ in range(3):
        gateway.register("pirate", workbench.adapter())
    gateway.set_alias("pirate", "prod", targets=[{"version": 1, "weight": 1}])
    for number in (1, 2, 3):
        assert heard(gateway, f"pirate@{number}") == f"pirate@{number}"
    wait_until(lambda: set(upstream.engine.adapters) == {"pirate@1", "pirate@3"})


def test_a_load_asked_for_while_the_engine_unloads_comes_after(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    """Before, the engine would say that it has it, and then forget it."""
    gateway = start_gateway(upstream.url, unload_grace_s=0.1)
    gateway.register("pirate", workbench.adapter())
    heard(gateway)
    stall = Stall()
    upstream.script(UNLOAD, stall)
    register(gateway, workbench.adapter()).raise_for_status()
    assert stall.reached.wait(5)
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(heard, gateway, "pirate@1")
        wait_until(lambda: replica_of(gateway, upstream)["inflight"] == 1)
        stall.release()
        assert asking.result() == "pirate@1"
    assert len(upstream.loads("pirate@1")) == 2
    asked = [r for r in upstream.requests(COMPLETIONS) if r.json["model"] == "pirate@1"]
    assert len(asked) == 2, "none was sent to be refused"
    wait_until(lambda: all(request.finished for request in asked))
