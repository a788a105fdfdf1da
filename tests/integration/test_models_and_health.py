"""/v1/models with the real client, and /healthz, /readyz, /metrics of a running gateway."""

from __future__ import annotations

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import telemetry
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, Gateway, StartGateway, StartUpstream, Workbench
from tests.waiting import wait_until


def test_list_and_retrieve_with_the_openai_client(
    gateway: Gateway, client: openai.OpenAI, workbench: Workbench
) -> None:
    gateway.register("pirate", workbench.adapter())
    gateway.set_alias("pirate", "prod", version=1)
    found = {model.id: model for model in client.models.list()}
    assert set(found) == {BASE, "pirate", "pirate@1", "pirate:latest", "pirate:prod"}
    for name, model in found.items():
        one = client.models.retrieve(name)
        assert one == model
        assert (model.object, model.owned_by) == ("model", "loragate")
        assert getattr(model, "parent") == (None if name == BASE else BASE)  # noqa: B009
    text = gateway.client.get("/v1/models").text
    assert str(workbench.root) not in text


def test_an_unknown_model_names_its_neighbours(client: openai.OpenAI, pirate: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("pirat")
    assert caught.value.code == "model_not_found"
    assert "pirate" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("pirate@9")


def test_a_key_sees_what_it_may_use(gateway: Gateway, workbench: Workbench) -> None:
    for name in ("pirate", "poet"):
        gateway.register(name, workbench.adapter())
    gateway.create_key("admin")
    key = gateway.create_key("inference", models=["pir*"])
    with gateway.openai_client(key["secret"]) as client:
        assert {model.id for model in client.models.list()} == {
            "pirate", "pirate@1", "pirate:latest",
        }  # fmt: skip
        with pytest.raises(openai.PermissionDeniedError):
            client.models.retrieve("poet")


def test_a_base_with_a_slash_in_its_name(
    start_gateway: StartGateway, start_upstream: StartUpstream
) -> None:
    gateway = start_gateway()
    body = {"name": "other", "base_model": "acme/base-1B"}
    assert gateway.client.post("/admin/pools", json=body).status_code == 201
    with gateway.openai_client() as client:
        assert client.models.retrieve("acme/base-1B").id == "acme/base-1B"


def test_health_needs_no_key(gateway: Gateway) -> None:
    gateway.create_key("admin")
    gateway.client.headers.pop("authorization")
    assert gateway.client.get("/healthz").json() == {"status": "ok"}
    ready = gateway.client.get("/readyz").json()
    assert ready["pools"] == {"pool": {"healthy": 1, "replicas": 1}}
    assert gateway.client.get("/metrics").status_code == 200
    assert gateway.client.get("/openapi.json").status_code == 200
    assert gateway.client.get("/docs").status_code == 200


def test_metrics_follow_the_requests(gateway: Gateway, pirate: str) -> None:
    with gateway.openai_client() as client:
        client.completions.create(model=pirate, prompt="hello")

    def samples() -> dict[tuple[str, ...], float]:
        text = gateway.client.get("/metrics").text
        families = list(text_string_to_metric_families(text))
        assert {family.name for family in families} == {m.name for m in telemetry.METRICS}
        return {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in families
            for sample in family.samples
        }

    found = wait_until(
        lambda: (s := samples()).get(("loragate_requests_total", "/v1/completions", "200")) and s
    )
    assert found["loragate_tokens_total", "pirate@1", "prompt"] > 0
    assert found["loragate_adapter_loads_total", "loaded", "pool"] == 1
    assert found["loragate_snapshot_versions",] == 1
    openmetrics = gateway.client.get(
        "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


def test_metrics_for_admins_only(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = start_gateway(upstream.url, metrics_auth=True)
    assert gateway.client.get("/metrics").status_code == 200  # anonymous, on loopback
    gateway.create_key("admin")
    reader = gateway.create_key("inference")["secret"]
    for headers, status, code in (
        ({}, 401, "invalid_api_key"),
        ({"x-api-key": "lg-unknown"}, 401, "invalid_api_key"),
        ({"x-api-key": reader}, 403, "permission_denied"),
    ):
        refused = httpx.get(f"{gateway.url}/metrics", headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
        assert "loragate_requests_total" not in refused.text
    assert "loragate_requests_total" in gateway.client.get("/metrics").text
    assert httpx.get(f"{gateway.url}/readyz").status_code == 200
