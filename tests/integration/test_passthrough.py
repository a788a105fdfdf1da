"""What the gateway does not read it does not touch: bytes and headers, both ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.faults import Raw, Status
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, DOORS, Gateway, StartGateway, StartUpstream
from tests.integration.wire import Wire

pytestmark = pytest.mark.parametrize("door", DOORS)

CHAT = "/v1/chat/completions"
ODD_JSON = (
    '{ "messages" :\t[{"role":"user","content":"\\u00e9\\ud83d\\ude00 é \\/ \\u0000"}],\n'
    '  "seed": 12345678901234567890, "temperature": 1.0000000000000000001, "top_p":1e-7,\n'
    '  "logit_bias": {"50256": -100, "50256": 1},\r\n  "min_p": -0.0, "big": 1E400,\n'
    '  "model": %s, "guided": {"a": [[], {}, null, true]}, "": "say \\"model\\": x" }  \n'
)


@pytest.fixture
def wire(gateway: Gateway) -> Iterator[Wire]:
    with Wire(gateway) as wire:
        yield wire


@pytest.mark.parametrize(
    "spelled", ['"pirate"', '"pir\\u0061te"', ' \n "pirate" ', '"pirate:latest"', '"pirate@1"']
)
def test_only_the_model_s_name_is_rewritten(
    wire: Wire, upstream: FakeUpstream, pirate: str, spelled: str
) -> None:
    body = (ODD_JSON % spelled).encode()
    status, _, _ = wire.request("POST", CHAT, body)
    assert status == 200
    seen = upstream.requests(CHAT)[0].body
    before, _, after = body.partition(spelled.strip().encode())
    assert seen == before + b'"pirate@1"' + after


def test_a_base_s_body_is_forwarded_byte_for_byte(wire: Wire, upstream: FakeUpstream) -> None:
    body = (ODD_JSON % json.dumps(BASE)).encode()
    assert wire.request("POST", CHAT, body)[0] == 200
    assert upstream.requests(CHAT)[0].body == body


def test_what_stands_beside_an_ambiguous_name_is_kept(
    wire: Wire, upstream: FakeUpstream, pirate: str
) -> None:
    """A schema may have a key `model` too. Each member's text stays as it was written."""
    schema = b'{ "model" : {"type":"string"}, "big":1E400, "n": 1.0000000000000000001 }'
    body = b'{"guided_json": %b, "model": "pirate", "messages": [{"content": "x"}]}' % schema
    assert wire.request("POST", CHAT, body)[0] == 200
    seen = upstream.requests(CHAT)[0]
    assert schema in seen.body
    assert seen.json["model"] == "pirate@1"


def test_the_served_name_may_differ(
    start_upstream: StartUpstream, start_gateway: StartGateway, workbench: Any
) -> None:
    upstream = start_upstream("/models/tiny-3")
    settings = workbench.settings(upstream.url)
    pool = settings.pools[0].model_copy(update={"served_name": "/models/tiny-3"})
    gateway = start_gateway(upstream.url, pools=(pool,))
    answer = gateway.client.post(CHAT, json={"model": BASE, "messages": [{"content": "x"}]})
    assert answer.status_code == 200
    assert upstream.requests(CHAT)[0].json["model"] == "/models/tiny-3"


def test_the_answer_comes_back_byte_for_byte(wire: Wire, upstream: FakeUpstream) -> None:
    body = b'{ "x_new" : [1.0, -0.0, 1e400, "\\u00e9"], "usage":null,"choices":[ ] }\n\n'
    upstream.script(CHAT, Status(200, body))
    status, got, answer = wire.post(CHAT, {"model": BASE, "messages": []})
    assert (status, answer) == (200, body)
    assert got["content-type"] == "application/json"


def test_a_stream_comes_back_byte_for_byte(wire: Wire, upstream: FakeUpstream) -> None:
    """Comments, odd line ends, unknown fields, events split anywhere: not ours to change."""
    pieces = [b": ping\r\n\r\n", b"event: new\nid: 7\ndata: {", b'"x":1}\n\n', b"data: [DONE]\n\n"]
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    upstream.script(CHAT, Raw(head + chunks + b"0\r\nx-trailer: 1\r\n\r\n"))
    status, headers, body = wire.post(CHAT, {"model": BASE, "messages": [], "stream": True})
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    assert body == b"".join(pieces)
    assert wire.request("GET", "/healthz")[0] == 200


def test_an_answer_without_a_length_ends_with_its_connection(
    wire: Wire, upstream: FakeUpstream
) -> None:
    upstream.script(CHAT, Raw(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{}"))
    assert wire.post(CHAT, {"model": BASE, "messages": []})[2] == b"{}"


def test_an_interim_answer_is_not_the_answer(wire: Wire, upstream: FakeUpstream) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
    final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
    upstream.script(CHAT, Raw(interim + final))
    status, _, body = wire.post(CHAT, {"model": BASE, "messages": []})
    assert (status, body) == (200, b"{}")


def test_hop_by_hop_headers_stay_on_their_hop(wire: Wire, upstream: FakeUpstream) -> None:
    payload = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    status, _, _ = wire.post(
        CHAT,
        payload,
        connection="keep-alive, x-named",
        x_named="1",
        keep_alive="timeout=5",
        te="trailers",
        upgrade="h2c",
        proxy_authorization="Basic eA==",
        proxy_connection="keep-alive",
        accept_encoding="gzip, br",
    )
    assert status == 200
    seen = upstream.requests(CHAT)[0]
    for name in ("x-named", "keep-alive", "te", "upgrade", "proxy-authorization", "trailer"):
        assert seen.header(name) is None, name
    assert seen.header("proxy-connection") is None
    assert "close" not in (seen.header("connection") or "")


def test_the_caller_s_secrets_stay_here(wire: Wire, upstream: FakeUpstream) -> None:
    payload = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    secrets = {"authorization": "Bearer s3cret", "x_api_key": "s3cret", "cookie": "a=s3cret"}
    assert wire.post(CHAT, payload, **secrets)[0] == 200
    assert "s3cret" not in str(upstream.requests(CHAT)[0].headers)


def test_the_replica_gets_its_own_key(
    start_upstream: StartUpstream, start_gateway: StartGateway, workbench: Any
) -> None:
    upstream = start_upstream(api_key="of-the-replica")
    gateway = start_gateway(upstream.url, replica_key="of-the-replica")
    gateway.register("pirate", workbench.adapter())
    payload = {"model": "pirate", "messages": [{"role": "user", "content": "x"}]}
    headers = {"authorization": "Bearer of-the-caller"}
    answer = gateway.client.post(CHAT, json=payload, headers=headers)
    assert answer.status_code == 200, answer.text
    for request in upstream.requests():
        assert request.header("authorization") == "Bearer of-the-replica"


def test_the_replica_s_wrong_key_is_not_the_caller_s_fault(
    start_upstream: StartUpstream, start_gateway: StartGateway
) -> None:
    upstream = start_upstream(api_key="right")
    gateway = start_gateway(upstream.url, replica_key="wrong", ready=False)
    answer = gateway.client.post(CHAT, json={"model": BASE, "messages": []})
    assert answer.status_code >= 500
    assert "wrong" not in answer.text


def test_host_and_tracing_headers(wire: Wire, upstream: FakeUpstream) -> None:
    payload = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    own = {"traceparent": trace, "tracestate": "a=b", "x_session_id": "s", "x_vllm_priority": "3"}
    assert wire.post(CHAT, payload, **own)[0] == 200
    seen = upstream.requests(CHAT)[0]
    assert seen.header("host") == f"127.0.0.1:{upstream.port}"
    assert seen.header("traceparent") == trace
    assert seen.header("tracestate") == "a=b"
    assert seen.header("x-session-id") == "s"
    assert seen.header("x-vllm-priority") == "3"
    assert seen.header("content-type") == "application/json"


def test_a_request_id_is_kept(wire: Wire, upstream: FakeUpstream) -> None:
    payload = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    status, headers, _ = wire.post(CHAT, payload, x_request_id="my-id-1")
    assert (status, headers["x-request-id"]) == (200, "my-id-1")
    assert upstream.requests(CHAT)[0].header("x-request-id") == "my-id-1"


def test_a_request_id_is_made(wire: Wire, upstream: FakeUpstream) -> None:
    payload = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    ids = [wire.post(CHAT, payload)[1]["x-request-id"] for _ in range(3)]
    assert len(set(ids)) == 3
    assert [seen.header("x-request-id") for seen in upstream.requests(CHAT)] == ids


@pytest.mark.parametrize("odd", ["x" * 5000, "a b", "\u00e9", ""])
def test_an_odd_request_id_does_no_harm(wire: Wire, odd: str) -> None:
    payload = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    status, headers, _ = wire.post(CHAT, payload, x_request_id=odd)
    assert status == 200
    assert 0 < len(headers["x-request-id"]) <= 200


def test_errors_have_request_ids(wire: Wire) -> None:
    for answer in (
        wire.post(CHAT, {"model": "nope"}, x_request_id="err-1"),
        wire.request("GET", "/v1/models/nope", x_request_id="err-1"),
        wire.request("GET", "/nothing", x_request_id="err-1"),
        wire.request("GET", CHAT, x_request_id="err-1"),
    ):
        assert answer[1]["x-request-id"] == "err-1"


def test_a_query_string_does_not_hide_the_path(wire: Wire, upstream: FakeUpstream) -> None:
    payload = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    assert wire.post(f"{CHAT}?api-version=1", payload)[0] == 200


def test_tokenize_goes_to_the_model_s_pool(gateway: Gateway, pirate: str) -> None:
    answer = gateway.client.post("/tokenize", json={"model": "pirate", "prompt": "hi"}).json()
    assert answer["count"] == 2
    body = {"model": "pirate", "tokens": answer["tokens"]}
    assert gateway.client.post("/detokenize", json=body).json() == {"prompt": "hi"}


def test_a_large_body_arrives_whole(wire: Wire, upstream: FakeUpstream) -> None:
    payload = {"model": BASE, "prompt": "word " * 2_000_000, "max_tokens": 1}
    upstream.script("/v1/completions", Status(200, b"{}"))  # else: longer than its context
    status, _, _ = wire.post("/v1/completions", payload)
    assert status == 200
    assert upstream.requests("/v1/completions")[0].json == payload


def test_a_large_answer_arrives_whole(wire: Wire, upstream: FakeUpstream) -> None:
    body = b'{"x":"' + b"y" * 20_000_000 + b'"}'
    upstream.script(CHAT, Status(200, body))
    assert wire.post(CHAT, {"model": BASE, "messages": []})[2] == body
