"""Keys, tasks and usage over the admin API."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.integration.gateway import BASE, Gateway
from tests.waiting import wait_until


def test_a_secret_is_shown_once_and_works_at_once(gateway: Gateway) -> None:
    made = gateway.client.post("/admin/keys", json={"name": "root", "scopes": ["admin"]})
    assert made.status_code == 201
    key = made.json()
    assert key["secret"].startswith("lg-")
    headers = {"x-api-key": key["secret"]}
    assert gateway.client.get("/admin/keys").status_code == 401  # nobody is anonymous any more
    listed = gateway.client.get("/admin/keys", headers=headers)
    assert key["secret"] not in listed.text
    (shown,) = listed.json()["data"]
    assert shown == {name: value for name, value in key.items() if name != "secret"}
    assert shown["expires_at"] is shown["revoked_at"] is shown["models"] is None


def test_the_first_key_must_be_able_to_make_others(gateway: Gateway) -> None:
    answer = gateway.client.post("/admin/keys", json={"name": "ci"})
    assert answer.status_code == 409
    assert "'admin'" in answer.json()["error"]["message"]
    gateway.create_key("admin")
    second = gateway.client.post("/admin/keys", json={"name": "ci", "models": ["pirate*"]})
    assert second.status_code == 201
    assert second.json()["scopes"] == ["inference"]
    assert second.json()["models"] == ["pirate*"]


def test_expiry_by_span_and_by_date(gateway: Gateway) -> None:
    gateway.create_key("admin")
    in_an_hour = gateway.client.post("/admin/keys", json={"name": "a", "expires_in_s": 3600})
    left = datetime.fromisoformat(in_an_hour.json()["expires_at"]) - datetime.now(UTC)
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    when = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    by_date = gateway.client.post("/admin/keys", json={"name": "b", "expires_at": when})
    assert datetime.fromisoformat(by_date.json()["expires_at"]) == datetime.fromisoformat(when)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({"name": "x", "scopes": []}, 422),
        ({"name": "x", "scopes": ["root"]}, 422),
        ({"name": "x", "models": []}, 422),
        ({"name": "x", "models": [""]}, 400),
        ({"name": "x", "expires_in_s": 0}, 422),
        ({"name": "x", "expires_in_s": 10**30}, 422),
        ({"name": "x", "expires_in_s": 9, "expires_at": "2099-01-01T00:00:00Z"}, 422),
        ({"name": "x", "expires_at": "2099-01-01T00:00:00"}, 422),
        ({"name": "x", "expires_at": "9999-12-31T23:59:59-14:00"}, 422),
        ({"name": "x", "expires_at": "2001-01-01T00:00:00Z"}, 400),
        ({"name": ""}, 400),
        ({"name": "x", "secret": "mine"}, 422),
    ],
)
def test_a_key_that_makes_no_sense(gateway: Gateway, body: Any, status: int) -> None:
    gateway.create_key("admin")
    answer = gateway.client.post("/admin/keys", json=body)
    assert answer.status_code == status, answer.text


def test_revoking_takes_effect_with_the_answer(gateway: Gateway) -> None:
    gateway.create_key("admin")
    key = gateway.create_key("inference")
    headers = {"authorization": f"Bearer {key['secret']}"}
    assert gateway.client.get("/v1/models", headers=headers).status_code == 200
    revoked = gateway.client.delete(f"/admin/keys/{key['id']}")
    assert revoked.json() == {"id": key["id"], "object": "key", "deleted": True}
    assert gateway.client.get("/v1/models", headers=headers).status_code == 401
    listed = gateway.client.get("/admin/keys", params={"revoked": False}).json()["data"]
    assert key["id"] not in [each["id"] for each in listed]
    assert gateway.client.delete("/admin/keys/key-none").status_code == 404


def test_keys_by_pages(gateway: Gateway) -> None:
    made = sorted(gateway.create_key("admin")["id"] for _ in range(3))
    first = gateway.client.get("/admin/keys", params={"limit": 2}).json()
    assert first["has_more"] is True
    rest = gateway.client.get("/admin/keys", params={"after": first["next_after"]}).json()
    assert [key["id"] for key in first["data"] + rest["data"]] == made


def test_tasks_tell_what_they_did(gateway: Gateway) -> None:
    tasks = {task["name"]: task for task in gateway.client.get("/admin/tasks").json()["data"]}
    assert {"publish", "reap", "flush_usage"} <= set(tasks)
    assert tasks["publish"]["failures"] == 0
    wait_until(lambda: gateway.client.get("/admin/tasks").json()["data"][0]["runs"] > 0, within_s=5)


def test_usage_is_written_down_by_key_and_model(gateway: Gateway, pirate: str) -> None:
    with gateway.openai_client() as client:
        for model in (BASE, "pirate", "pirate:latest"):
            client.completions.create(model=model, prompt="hello")

    def used(**query: Any) -> dict[str, Any]:
        found = gateway.client.get("/admin/usage", params=query).json()["data"]
        return {each["model"]: each for each in found}

    found = wait_until(
        lambda: {} if len(used()) < 2 or used()["pirate@1"]["requests"] < 2 else used(), 15
    )
    assert found[BASE]["requests"] == 1
    assert found["pirate@1"]["requests"] == 2
    assert found["pirate@1"]["prompt_tokens"] > 0
    assert set(used(model="pirate@1")) == {"pirate@1"}
    assert used(until="2001-01-01T00:00:00Z") == {}
    assert set(used(since="2001-01-01T00:00:00Z")) == set(found)
    for odd in ("2001-01-01T00:00:00", "9999-12-31T23:59:59-14:00", "soon"):
        answer = gateway.client.get("/admin/usage", params={"since": odd})
        assert answer.status_code == 422
        assert answer.json()["error"]["param"] == "since"
