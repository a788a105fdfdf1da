"""Every error the gateway answers by itself: status, envelope, code, and the client's exception."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.fakes.faults import Status
from tests.fakes.upstream import FakeUpstream, refused_url
from tests.integration.gateway import BASE, DOORS, Gateway, StartGateway
from tests.integration.wire import Wire

pytestmark = pytest.mark.parametrize("door", DOORS)

CHAT = "/v1/chat/completions"
PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
)
ASK: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def wire(gateway: Gateway) -> Iterator[Wire]:
    with Wire(gateway) as wire:
        yield wire


def error(answer: tuple[int, dict[str, str], bytes], status: int, code: str) -> dict[str, Any]:
    """Check the envelope and return what is in it."""
    found_status, headers, body = answer
    assert (found_status, headers["content-type"]) == (status, "application/json"), body
    found: dict[str, Any] = json.loads(body)["error"]
    assert {"message", "type", "param", "code"} <= set(found)
    assert found["code"] == code
    return found


def test_unknown_model_names_near_matches(
    client: openai.OpenAI, pirate: str, upstream: FakeUpstream
) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="pirat", messages=ASK)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "'pirat'" in caught.value.message
    assert "pirate" in caught.value.message.replace("'pirat'", "")
    assert upstream.requests() == []


@pytest.mark.parametrize("name", ["pirate@2", "pirate@0", "pirate@x", "pirate:prod", "pirate@1@1"])
def test_unknown_version_or_alias(client: openai.OpenAI, pirate: str, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=name, messages=ASK)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../pirate", "x" * 10_000, "pirate\u0000", "pirate\n", " pirate"]
)
def test_odd_model_names_are_unknown(gateway: Gateway, pirate: str, name: str) -> None:
    answer = gateway.client.post(CHAT, json={"model": name, "messages": ASK})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["code"] in ("invalid_request", "model_not_found")
    assert len(answer.content) < 2000


def test_unknown_model_on_a_gateway_without_models(start_gateway: StartGateway) -> None:
    gateway = start_gateway(pools=(), ready=False)
    answer = gateway.client.post(CHAT, json={"model": "pirate", "messages": ASK})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"model=tiny", "invalid_json"),
        (b"\xff\xfe{}", "invalid_json"),
        (b'{"model": "tiny"} x', "invalid_json"),
        (b'{"model": "tiny", "prompt": "\xff"}', None),
        (b'{"model": "tiny", "prompt": "\\ud800"}', None),
        (b'"tiny"', "invalid_json"),
        (b'["tiny"]', "invalid_json"),
        (b"null", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, None),
        (b'{"model": "tiny", "model": "tiny", "prompt": ""}', None),
        (b"{}", "missing_required_parameter"),
        (b'{"model": null}', "invalid_type"),
        (b'{"model": 7}', "invalid_type"),
        (b'{"model": ["tiny"]}', "invalid_type"),
        (b'{"model": {"model": "tiny"}}', "invalid_type"),
        (b'{"model": "tiny", "stream": "yes", "prompt": ""}', None),
    ],
)
def test_bad_bodies(wire: Wire, upstream: FakeUpstream, body: bytes, code: str | None) -> None:
    """Never a 5xx, and nothing the gateway refuses reaches the replica."""
    for path in PATHS:
        answer = wire.request("POST", path, body)
        assert answer[0] < 500, (path, answer)
        if code is not None:
            found = error(answer, 400, code)
            assert found["param"] == (None if code == "invalid_json" else "model")
            assert upstream.requests() == []
    assert wire.request("GET", "/healthz")[0] == 200, "the connection must stay usable"


def test_one_model_key_is_what_the_replica_sees(wire: Wire, upstream: FakeUpstream) -> None:
    """A key sent twice must not be read one way here and the other way there."""
    body = b'{"model": "tiny", "prompt": "hi", "model": "secret@1"}'
    status, _, _ = wire.request("POST", "/v1/completions", body)
    seen = upstream.requests("/v1/completions")
    if status == 200:
        assert seen[0].body.count(b'"model"') == 1
        assert seen[0].json["model"] == "tiny"
    else:
        assert status in (400, 404)
        assert seen == []


def test_escaped_key_names_are_the_same_key(
    wire: Wire, upstream: FakeUpstream, pirate: str
) -> None:
    body = rb'{"\u006dodel": "pirate", "prompt": "hi"}'
    status, _, _ = wire.request("POST", "/v1/completions", body)
    assert status == 200
    assert upstream.requests("/v1/completions")[0].json == {"model": "pirate@1", "prompt": "hi"}


def test_a_model_key_further_down_is_not_the_model(
    wire: Wire, upstream: FakeUpstream, pirate: str
) -> None:
    payload = {"extra": {"model": "nope"}, "prompt": '"model": "nope"', "model": "pirate"}
    status, _, _ = wire.post("/v1/completions", payload)
    assert status == 200
    assert upstream.requests("/v1/completions")[0].json == payload | {"model": "pirate@1"}


def test_body_too_large_by_its_length(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = start_gateway(upstream.url, max_body_bytes=2048)
    with Wire(gateway) as wire:
        wire.send(wire.message("POST", CHAT, None, content_length="10000000"))
        error(wire.answer(), 413, "body_too_large")
    assert upstream.requests() == []


def test_body_too_large_by_its_chunks(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = start_gateway(upstream.url, max_body_bytes=2048)
    with Wire(gateway) as wire:
        wire.send(wire.message("POST", CHAT, None, transfer_encoding="chunked"))
        wire.send(b"800\r\n" + b" " * 2048 + b"\r\n" + b"1\r\n \r\n")
        error(wire.answer(), 413, "body_too_large")
    assert upstream.requests() == []


def test_body_of_exactly_the_limit(start_gateway: StartGateway, upstream: FakeUpstream) -> None:
    gateway = start_gateway(upstream.url, max_body_bytes=2048)
    body = json.dumps({"model": BASE, "prompt": ""}).encode().ljust(2048)
    with Wire(gateway) as wire:
        assert wire.request("POST", "/v1/completions", body)[0] == 200
        assert wire.request("POST", "/v1/completions", body + b" ")[0] == 413


def test_no_replica_says_when_to_come_back(start_gateway: StartGateway) -> None:
    gateway = start_gateway(refused_url(), ready=False)
    with gateway.openai_client() as client, pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=BASE, messages=ASK)
    assert caught.value.status_code == 503
    assert caught.value.code in ("no_replica_available", "upstream_unavailable")
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_no_replica_at_all(start_gateway: StartGateway) -> None:
    gateway = start_gateway(ready=False)
    answer = gateway.client.post(CHAT, json={"model": BASE, "messages": ASK})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "no_replica_available"
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("status", "body", "raised"),
    [
        (400, b'{"error": {"message": "temperature",  "code": 400}}', openai.BadRequestError),
        (422, b'{ "detail" : [] }', openai.UnprocessableEntityError),
        (404, b'{"object":"error","message":"other 404"}', openai.NotFoundError),
        (418, b"short and stout", openai.APIStatusError),
    ],
)
def test_the_replica_s_own_4xx_passes_unchanged(
    gateway: Gateway, upstream: FakeUpstream, status: int, body: bytes, raised: type[Exception]
) -> None:
    headers = (("content-type", "application/json; x=y"), ("server", "replica-7"))
    upstream.script(CHAT, *[Status(status, body, headers)] * 2)
    answer = gateway.client.post(CHAT, json={"model": BASE, "messages": ASK})
    assert (answer.status_code, answer.content) == (status, body)
    assert answer.headers["content-type"] == "application/json; x=y"
    assert "replica-7" not in str(answer.headers), "who answered is nobody's business"
    with gateway.openai_client() as client, pytest.raises(raised):
        client.chat.completions.create(model=BASE, messages=ASK)


def test_the_replica_s_own_500_passes_unchanged(gateway: Gateway, upstream: FakeUpstream) -> None:
    """It reached the model: sent once, and what it said is the answer."""
    body = b'{"error":{"message":"engine","type":"InternalServerError","code":500}}'
    upstream.script(CHAT, Status(500, body))
    answer = gateway.client.post(CHAT, json={"model": BASE, "messages": ASK})
    assert (answer.status_code, answer.content) == (500, body)
    assert len(upstream.requests(CHAT)) == 1


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
def test_other_methods(wire: Wire, upstream: FakeUpstream, method: str) -> None:
    for path in PATHS:
        answer = wire.request(method, path)
        assert "POST" in answer[1]["allow"]
        if method == "OPTIONS":
            assert answer[0] in (200, 204, 405)
        elif method == "HEAD":
            assert (answer[0], answer[2]) == (405, b"")
        else:
            error(answer, 405, "method_not_allowed")
    assert upstream.requests() == []


def test_unknown_path(wire: Wire) -> None:
    error(wire.request("GET", "/v1/nothing"), 404, "not_found")
    error(wire.request("POST", "/v1/completions/more", b"{}"), 404, "not_found")
