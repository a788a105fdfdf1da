"""Who may do what: keys, scopes, model allow-lists, and the anonymous caller on loopback."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import openai
import pytest

from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, Gateway, StartGateway, Workbench
from tests.integration.wire import Wire
from tests.waiting import wait_until

ASK: Any = [{"role": "user", "content": "hello"}]
PAYLOAD = {"model": BASE, "messages": ASK}
CHAT = "/v1/chat/completions"


@pytest.fixture
def admin(gateway: Gateway) -> str:
    """The first key. From here on nobody is anonymous."""
    secret: str = gateway.create_key("admin")["secret"]
    return secret


@pytest.fixture
def key(gateway: Gateway, admin: str) -> str:
    secret: str = gateway.create_key("inference")["secret"]
    return secret


def refused(gateway: Gateway, key: str) -> openai.APIStatusError:
    with gateway.openai_client(key) as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model=BASE, messages=ASK)
    return caught.value


def test_a_key_is_accepted_either_way(gateway: Gateway, key: str) -> None:
    with Wire(gateway) as wire:
        assert wire.post(CHAT, PAYLOAD, authorization=f"Bearer {key}")[0] == 200
        assert wire.post(CHAT, PAYLOAD, authorization=f"bearer {key}")[0] == 200
        assert wire.post(CHAT, PAYLOAD, x_api_key=key)[0] == 200


def test_a_missing_key(gateway: Gateway, key: str, upstream: FakeUpstream) -> None:
    with Wire(gateway) as wire:
        for headers in ({}, {"authorization": ""}, {"authorization": "Bearer"}, {"x_api_key": ""}):
            status, answer, body = wire.post(CHAT, PAYLOAD, **headers)
            assert status == 401, headers
            assert b'"invalid_api_key"' in body
            assert answer["www-authenticate"].lower().startswith("bearer")
    assert upstream.requests() == []


@pytest.mark.parametrize("wrong", ["nonsense", "lg-" + "x" * 40, "lg-", "\u00e9", "x" * 10_000])
def test_an_unknown_key(gateway: Gateway, key: str, wrong: str, upstream: FakeUpstream) -> None:
    with Wire(gateway) as wire:
        status, _, body = wire.post(CHAT, PAYLOAD, authorization=f"Bearer {wrong}")
    assert status == 401
    assert b'"invalid_api_key"' in body
    assert wrong.encode() not in body or len(wrong) < 4
    assert upstream.requests() == []


def test_the_client_s_exceptions(gateway: Gateway, key: str, admin: str) -> None:
    unknown = refused(gateway, "lg-unknown")
    assert isinstance(unknown, openai.AuthenticationError)
    assert unknown.code == "invalid_api_key"
    forbidden = refused(gateway, admin)
    assert isinstance(forbidden, openai.PermissionDeniedError)
    assert forbidden.code == "permission_denied"


def test_a_revoked_key(gateway: Gateway, key: str) -> None:
    other = gateway.create_key("inference")
    assert gateway.client.delete(f"/admin/keys/{other['id']}").status_code in (200, 204)

    def is_refused() -> bool:
        headers = {"authorization": f"Bearer {other['secret']}"}
        return gateway.client.post(CHAT, json=PAYLOAD, headers=headers).status_code == 401

    wait_until(is_refused)
    assert isinstance(refused(gateway, other["secret"]), openai.AuthenticationError)
    with gateway.openai_client(key) as client:
        client.chat.completions.create(model=BASE, messages=ASK)


def test_an_expired_key(gateway: Gateway, admin: str) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=1.5)).isoformat()
    key = gateway.create_key("inference", expires_at=soon)["secret"]

    def is_refused() -> bool:
        headers = {"authorization": f"Bearer {key}"}
        return gateway.client.post(CHAT, json=PAYLOAD, headers=headers).status_code == 401

    assert not is_refused()
    wait_until(is_refused)
    assert refused(gateway, key).code == "invalid_api_key"


def test_scopes(gateway: Gateway, key: str, admin: str) -> None:
    for path in ("/admin/adapters", "/admin/keys", "/admin/pools", "/admin/tasks"):
        for secret, status in ((key, 403), (admin, 200)):
            headers = {"authorization": f"Bearer {secret}"}
            assert gateway.client.get(path, headers=headers).status_code == status, path
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        headers = {"authorization": f"Bearer {key}"}
        body = {"lora_name": "x", "lora_path": "/x"}
        assert gateway.client.post(path, json=body, headers=headers).status_code == 403


def test_a_key_for_some_models(
    gateway: Gateway, admin: str, workbench: Workbench, upstream: FakeUpstream
) -> None:
    gateway.create_key("inference")
    for name in ("pirate", "parrot", "poet"):
        gateway.client.post(
            "/admin/adapters",
            json={"name": name, "source": {"path": str(workbench.adapter())}},
        ).raise_for_status()
    key = gateway.create_key("inference", models=["p*r*t*"])["secret"]
    with gateway.openai_client(key) as client:
        names = {model.id for model in client.models.list()}
        assert {"pirate", "parrot", "pirate@1"} <= names
        assert not {"poet", "poet@1", BASE} & names
        client.chat.completions.create(model="pirate", messages=ASK)
        client.chat.completions.create(model="parrot@1", messages=ASK)
        for model in ("poet", "poet@1", "poet:latest", BASE):
            with pytest.raises(openai.PermissionDeniedError) as caught:
                client.chat.completions.create(model=model, messages=ASK)
            assert caught.value.code == "model_not_allowed"
        with pytest.raises((openai.PermissionDeniedError, openai.NotFoundError)):
            client.models.retrieve("poet")
    assert {load.json["lora_name"] for load in upstream.loads()} == {"pirate@1", "parrot@1"}


def test_near_matches_do_not_tell_of_what_a_key_may_not_see(
    gateway: Gateway, admin: str, workbench: Workbench
) -> None:
    gateway.create_key("inference")
    body = {"name": "merger-plans", "source": {"path": str(workbench.adapter())}}
    gateway.client.post("/admin/adapters", json=body).raise_for_status()
    key = gateway.create_key("inference", models=["pirate", "merger-plan"])["secret"]
    headers = {"authorization": f"Bearer {key}"}
    payload = {"model": "merger-plan", "messages": ASK}
    answer = gateway.client.post(CHAT, json=payload, headers=headers)
    assert answer.status_code == 404
    assert "merger-plans" not in answer.text


def test_anonymous_on_loopback(gateway: Gateway) -> None:
    with Wire(gateway) as wire:
        for host in (wire.host, f"localhost:{gateway.port}", "localhost", "127.0.0.1", "[::1]:80"):
            assert wire.post(CHAT, PAYLOAD, host=host)[0] == 200, host
        assert wire.request("GET", "/admin/adapters")[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "10.0.0.1",
        "",
    ],
)
def test_a_rebound_name_is_not_anonymous(
    gateway: Gateway, upstream: FakeUpstream, host: str
) -> None:
    """A web page's script can reach loopback under its own name, but not with ours."""
    with Wire(gateway) as wire:
        assert wire.post(CHAT, PAYLOAD, host=host)[0] in (400, 401, 403)
        assert wire.request("GET", "/admin/adapters", host=host)[0] in (400, 401, 403)
        assert wire.request("GET", "/v1/models", host=host)[0] in (400, 401, 403)
        assert wire.post("/v1/load_lora_adapter", {}, host=host)[0] in (400, 401, 403)
    assert upstream.requests() == []


def test_a_page_s_script_is_not_anonymous(gateway: Gateway, upstream: FakeUpstream) -> None:
    """A form post from another site needs no preflight; its Origin gives it away, or its type."""
    with Wire(gateway) as wire:
        headers = {"origin": "https://evil.example", "content_type": "text/plain"}
        status, _, _ = wire.post("/admin/keys", {"name": "x", "scopes": ["admin"]}, **headers)
    assert status in (400, 401, 403, 415, 422)


def test_anonymous_ends_with_the_first_key(gateway: Gateway) -> None:
    anonymous = gateway.openai_client("unused")
    anonymous.chat.completions.create(model=BASE, messages=ASK)
    gateway.create_key("admin")
    with anonymous, pytest.raises(openai.AuthenticationError):
        anonymous.chat.completions.create(model=BASE, messages=ASK)
    with Wire(gateway) as wire:
        assert wire.post(CHAT, PAYLOAD)[0] == 401
        assert wire.request("GET", "/v1/models")[0] == 401
        assert wire.request("GET", "/admin/adapters")[0] == 401


def test_anonymous_does_not_come_back_with_the_last_key_s_end(gateway: Gateway) -> None:
    key = gateway.create_key("admin", "inference")
    gateway.client.delete(f"/admin/keys/{key['id']}")
    wait_until(lambda: gateway.client.get("/admin/keys").status_code == 401)
    with Wire(gateway) as wire:
        assert wire.post(CHAT, PAYLOAD)[0] == 401


def test_the_admin_key_from_the_settings(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    gateway = start_gateway(upstream.url, admin_key="from-the-settings")
    with Wire(gateway) as wire:
        secret = "Bearer from-the-settings"
        assert wire.request("GET", "/admin/keys", authorization=secret)[0] == 200
        assert wire.post(CHAT, PAYLOAD, authorization=secret)[0] == 200
        assert wire.post(CHAT, PAYLOAD, authorization="Bearer other")[0] == 401


def test_keys_are_shown_once(gateway: Gateway, key: str, admin: str) -> None:
    text = gateway.client.get("/admin/keys").text
    assert key not in text
    assert admin not in text
    database = gateway.settings.data_path
    for file in database.rglob("*"):
        if file.is_file():
            assert key.encode() not in file.read_bytes(), file


def test_open_doors(gateway: Gateway, key: str) -> None:
    """Probes and scrapes need no key and tell nothing worth one."""
    with Wire(gateway) as wire:
        for path in ("/healthz", "/readyz"):
            assert wire.request("GET", path)[0] == 200
