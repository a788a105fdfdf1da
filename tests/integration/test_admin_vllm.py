"""vLLM's own load and unload routes, on the gateway."""

from __future__ import annotations

from typing import Any

from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import Gateway, StartGateway, Workbench


def load(gateway: Gateway, **body: Any) -> tuple[int, str]:
    answer = gateway.client.post("/v1/load_lora_adapter", json=body)
    return answer.status_code, answer.text


def unload(gateway: Gateway, name: str) -> tuple[int, str]:
    answer = gateway.client.post("/v1/unload_lora_adapter", json={"lora_name": name})
    return answer.status_code, answer.text


def names(gateway: Gateway) -> set[str]:
    return {model["id"] for model in gateway.client.get("/v1/models").json()["data"]}


def test_load_and_unload_as_vllm_does(gateway: Gateway, workbench: Workbench) -> None:
    path = str(workbench.adapter())
    # A tool may send fields of a vLLM we do not know.
    loaded = load(gateway, lora_name="pirate", lora_path=path, is_3d_lora_weight=False)
    assert loaded == (200, "Success: LoRA adapter 'pirate' added successfully.")
    with gateway.openai_client() as client:
        assert client.completions.create(model="pirate", prompt="hi").model == "pirate@1"

    status, text = load(gateway, lora_name="pirate", lora_path=path)
    assert status == 400
    assert "load_inplace" in text
    again = load(gateway, lora_name="pirate", lora_path=str(workbench.adapter()), load_inplace=True)
    assert again[0] == 200
    assert "pirate@2" in names(gateway)

    assert unload(gateway, "pirate@1")[0] == 200
    assert "pirate@1" not in names(gateway)
    removed = unload(gateway, "pirate")
    assert removed == (200, "Success: LoRA adapter 'pirate' removed successfully.")
    assert not [name for name in names(gateway) if name.startswith("pirate")]


def test_what_vllm_would_say(gateway: Gateway, workbench: Workbench) -> None:
    status, text = unload(gateway, "nobody")
    assert status == 404
    assert "The lora adapter 'nobody' cannot be found." in text
    assert unload(gateway, "nobody@3")[0] == 404
    assert load(gateway, lora_name="", lora_path="/x")[0] == 400
    assert load(gateway, lora_name="x")[0] == 422
    nowhere = load(gateway, lora_name="x", lora_path=str(workbench.root / "nowhere"))
    assert nowhere[0] in (400, 404)


def test_an_adapter_that_cannot_be_served_is_the_callers_fault(
    gateway: Gateway, workbench: Workbench
) -> None:
    """vLLM answers 500, and its callers try again for ever."""
    status, text = load(gateway, lora_name="wide", lora_path=str(workbench.adapter(rank=64)))
    assert status == 422
    assert "adapter_rejected" in text


def test_it_is_for_admins(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    gateway = start_gateway(upstream.url)
    gateway.create_key("admin")
    key = gateway.create_key("inference")
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        answer = gateway.client.post(
            path,
            json={"lora_name": "x", "lora_path": str(workbench.adapter())},
            headers={"authorization": f"Bearer {key['secret']}"},
        )
        assert answer.status_code == 403
