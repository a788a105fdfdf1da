"""/docs is a manual: every route says what it takes, what it answers and how it fails."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from fastapi import FastAPI

from app.api import errors, health, openapi, tink
from app.api.admin import router as admin
from app.api.inference import PATHS
from app.api.openai import files, fine_tuning, models, uploads

#: Every public route. A new one is added here on purpose, with its line in the changelog.
ROUTES = {
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/embeddings",
    "POST /v1/responses",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /v1/files",
    "POST /v1/files",
    "GET /v1/files/{file_id}",
    "DELETE /v1/files/{file_id}",
    "GET /v1/files/{file_id}/content",
    "DELETE /v1/models/{model}",
    "GET /v1/fine_tuning/jobs",
    "POST /v1/fine_tuning/jobs",
    "GET /v1/fine_tuning/jobs/{job_id}",
    "POST /v1/fine_tuning/jobs/{job_id}/cancel",
    "POST /v1/fine_tuning/jobs/{job_id}/pause",
    "POST /v1/fine_tuning/jobs/{job_id}/resume",
    "GET /v1/fine_tuning/jobs/{job_id}/events",
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints",
    "POST /v1/uploads",
    "POST /v1/uploads/{upload_id}/parts",
    "POST /v1/uploads/{upload_id}/complete",
    "POST /v1/uploads/{upload_id}/cancel",
    "POST /api/v1/add_lora",
    "POST /api/v1/add_lora_async",
    "POST /api/v1/remove_lora",
    "POST /api/v1/remove_lora_async",
    "POST /api/v1/fwdbwd",
    "POST /api/v1/fwdbwd_async",
    "POST /api/v1/optim",
    "POST /api/v1/optim_async",
    "POST /api/v1/sample",
    "POST /api/v1/asample",
    "POST /api/v1/retrieve_future",
    "POST /api/v1/get_info",
    "POST /v1/load_lora_adapter",
    "POST /v1/unload_lora_adapter",
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
    "GET /admin/adapters",
    "POST /admin/adapters",
    "GET /admin/adapters/{name}",
    "DELETE /admin/adapters/{name}",
    "POST /admin/adapters/{name}/versions",
    "GET /admin/adapters/{name}/versions/{number}",
    "DELETE /admin/adapters/{name}/versions/{number}",
    "GET /admin/adapters/{name}/versions/{number}/probe",
    "PUT /admin/adapters/{name}/versions/{number}/probe",
    "DELETE /admin/adapters/{name}/versions/{number}/probe",
    "PUT /admin/adapters/{name}/aliases/{alias}",
    "DELETE /admin/adapters/{name}/aliases/{alias}",
    "POST /admin/adapters/{name}/rollback",
    "GET /admin/pools",
    "POST /admin/pools",
    "GET /admin/pools/{name}",
    "PATCH /admin/pools/{name}",
    "DELETE /admin/pools/{name}",
    "GET /admin/pools/{name}/replicas",
    "POST /admin/pools/{name}/replicas",
    "GET /admin/replicas",
    "PATCH /admin/replicas/{id}",
    "DELETE /admin/replicas/{id}",
    "GET /admin/keys",
    "POST /admin/keys",
    "DELETE /admin/keys/{id}",
    "GET /admin/tasks",
    "GET /admin/usage",
}
OPENAI = models.router, files.router, uploads.router, fine_tuning.router, tink.router
OPEN = {"GET /healthz", "GET /readyz", "GET /metrics"}


def made() -> dict[str, Any]:
    app = FastAPI(version="0")
    for router in (health.router, *OPENAI, admin):
        app.include_router(router)
    errors.install(app)
    openapi.install(app)
    return app.openapi()


DOCUMENT = made()
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}


def test_these_and_no_other_routes_are_public() -> None:
    assert set(OPERATIONS) == ROUTES
    assert {route.split()[1] for route in ROUTES} >= PATHS


@pytest.mark.parametrize("route", sorted(ROUTES))
def test_a_route_is_explained_with_examples(route: str) -> None:
    operation = OPERATIONS[route]
    assert operation["summary"]
    assert operation["description"]
    assert operation["tags"]
    for parameter in operation.get("parameters", ()):
        assert parameter.get("description") or route.startswith("GET /v1/models"), parameter["name"]
    for body in operation.get("requestBody", {}).get("content", {}).values():
        assert exemplified(body)
    successes = [r for status, r in operation["responses"].items() if int(status) < 400]
    assert successes
    for response in successes:
        assert response["content"]
        assert all(exemplified(body) for body in response["content"].values())


def exemplified(body: dict[str, Any]) -> bool:
    return "example" in body or "examples" in body or body["schema"].get("format") == "binary"


@pytest.mark.parametrize("route", sorted(ROUTES - OPEN))
def test_a_route_says_how_it_fails_and_what_key_it_needs(route: str) -> None:
    operation = OPERATIONS[route]
    assert {"401", "403"} <= set(operation["responses"])
    assert {scheme for each in operation["security"] for scheme in each} == {
        "HTTPBearer",
        "APIKeyHeader",
    }
    for status, response in operation["responses"].items():
        if int(status) >= 400:
            error = response["content"]["application/json"]["example"]["error"]
            assert error["code"]
            assert response["description"]


def test_a_503_is_the_storages_or_the_replicas() -> None:
    def code(route: str) -> str:
        answer = OPERATIONS[route]["responses"]["503"]["content"]["application/json"]
        return str(answer["example"]["error"]["code"])

    admins = {route for route in ROUTES if " /admin/" in route} | {"POST /v1/load_lora_adapter"}
    assert {code(route) for route in admins} == {"storage_unavailable"}
    assert code("POST /v1/completions") == "no_replica_available"


def test_every_request_field_is_described() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    requests = {
        "NewAdapter", "NewVersion", "Origin", "NewAlias", "Rollback", "NewPool",
        "PoolChange", "NewReplica", "ReplicaChange", "NewKey", "Load", "Unload", "Target",
        "NewUpload", "Order", "ExpiresAfter", "NewFineTuningJob", "NewMethod", "OfMethod",
        "Hyperparameters", "NewLora", "ModelName", "Fwdbwd", "AdamParams", "Optim",
        "SamplingParams", "Sample", "Retrieve",
    }  # fmt: skip
    for name in requests:
        for field, schema in schemas[name]["properties"].items():
            assert schema.get("description"), f"{name}.{field}"
        assert schemas[name].get("additionalProperties") is False or name in {
            "Load", "Unload", "Target",
        }  # fmt: skip


def test_every_reference_leads_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    for name in set(re.findall(r"#/components/schemas/(\w+)", text)):
        assert name in DOCUMENT["components"]["schemas"]
    assert "HTTPValidationError" not in text


def test_no_machine_path_or_secret_is_in_the_examples() -> None:
    text = json.dumps(DOCUMENT)
    assert "lg-7Qd1" in text
    assert not re.search(r"lg-[\w-]{20,}|/home/|/root/", text)
