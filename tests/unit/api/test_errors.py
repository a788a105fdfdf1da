"""Every error has a status and an envelope the `openai` client turns into the right class."""

from __future__ import annotations

import inspect
import json
import logging
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from app import errors, telemetry
from app.api import errors as mapping
from app.settings import Settings

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.LoragateError)
]


def make(cls: type[errors.LoragateError]) -> errors.LoragateError:
    if cls is errors.AdapterRejected:
        return errors.AdapterRejected([errors.Fault("r", 128, "at most 64")])
    return cls("replica pool-1 is away; add one")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_is_mapped_itself(cls: type[errors.LoragateError]) -> None:
    assert cls in mapping.KINDS
    status, kind = mapping.KINDS[cls]
    assert 400 <= status < 600
    assert kind == ("invalid_request_error" if status < 500 else "server_error")


def test_the_drawn_tree_names_every_class_and_its_code() -> None:
    tree = inspect.getdoc(errors)
    assert tree is not None
    for cls in CLASSES:
        line = next(line for line in tree.splitlines() if f" {cls.__name__} " in f" {line} ")
        if not cls.__subclasses__():
            assert cls.code in line.split()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_envelope_is_openais(cls: type[errors.LoragateError]) -> None:
    exc = make(cls)
    error = mapping.envelope(exc)["error"]
    assert set(error) - {"details"} == {"message", "type", "param", "code"}
    assert error["code"] == cls.code
    assert json.loads(mapping.envelope_bytes(exc)) == {"error": error}


def test_a_subclass_made_elsewhere_has_its_parents_status() -> None:
    class Odd(errors.ModelNotFound):
        pass

    assert mapping.status_of(Odd("x")) == 404


def test_rejected_adapter_says_every_fault() -> None:
    faults = [errors.Fault("r", 128, "at most 64"), errors.Fault("use_dora", True, "false")]
    error = mapping.envelope(errors.AdapterRejected(faults))["error"]
    assert error["param"] == "r"
    assert error["details"][1] == {"field": "use_dora", "found": True, "allowed": "false"}


def test_a_lone_surrogate_in_a_name_does_not_break_the_answer() -> None:
    body = mapping.envelope_bytes(errors.ModelNotFound("no model '\ud800'"))
    assert json.loads(body)["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("exc", [RuntimeError("secret detail"), errors.LoragateError("secret")])
def test_the_unplanned_shows_only_the_request_id(exc: Exception) -> None:
    token = telemetry.request_id.set("req-7")
    try:
        error = mapping.envelope(exc)["error"]
    finally:
        telemetry.request_id.reset(token)
    assert mapping.status_of(exc) == 500
    assert "secret" not in error["message"]
    assert "req-7" in error["message"]


def test_headers_tell_a_client_when_to_come_back() -> None:
    assert mapping.headers_of(errors.NoReplicaAvailable("x", retry_after_s=7)) == {
        "Retry-After": "7"
    }
    assert mapping.headers_of(errors.StorageUnavailable("x")) == {"Retry-After": "5"}
    assert mapping.headers_of(errors.Unauthenticated("x")) == {"WWW-Authenticate": "Bearer"}
    assert mapping.headers_of(errors.Conflict("x")) == {"X-Should-Retry": "false"}
    assert mapping.headers_of(errors.NotFound("x")) == {}


class Body(BaseModel):
    number: int


def scripted(raised: Exception) -> FastAPI:
    app = FastAPI()
    mapping.install(app)

    @app.post("/v1/chat/completions")
    async def chat() -> None:
        raise raised

    @app.post("/number")
    async def number(body: Body) -> None:
        return None

    return app


def transport(app: FastAPI) -> httpx.ASGITransport:
    async def with_rooms(scope: Any, receive: Any, send: Any) -> None:
        scope["state"] = {"rooms": SimpleNamespace(settings=Settings())}
        await app(scope, receive, send)

    return httpx.ASGITransport(app=with_rooms)


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (errors.InvalidRequest("x"), openai.BadRequestError),
        (errors.InvalidJson("x"), openai.BadRequestError),
        (errors.Unauthenticated("x"), openai.AuthenticationError),
        (errors.Forbidden("x"), openai.PermissionDeniedError),
        (errors.ModelNotAllowed("x"), openai.PermissionDeniedError),
        (errors.ModelNotFound("x"), openai.NotFoundError),
        (errors.Conflict("x"), openai.ConflictError),
        (make(errors.AdapterRejected), openai.UnprocessableEntityError),
        (HTTPException(429, "slow down"), openai.RateLimitError),
        (errors.NoReplicaAvailable("x"), openai.InternalServerError),
        (errors.UpstreamTimeout("x"), openai.InternalServerError),
        (RuntimeError("x"), openai.InternalServerError),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, Exception) else case.__name__,
)
async def test_the_openai_client_raises(
    raised: Exception, seen: type[openai.APIStatusError]
) -> None:
    http = httpx.AsyncClient(transport=transport(scripted(raised)))
    async with openai.AsyncOpenAI(
        base_url="http://gateway/v1", api_key="k", http_client=http, max_retries=0
    ) as client:
        with pytest.raises(seen) as caught:
            await client.chat.completions.create(model="m", messages=[])
    assert type(caught.value) is seen
    assert caught.value.code == getattr(raised, "code", caught.value.code)
    assert caught.value.message.startswith(f"Error code: {caught.value.status_code}")


async def test_validation_names_the_field_and_hides_the_value() -> None:
    async with httpx.AsyncClient(
        transport=transport(scripted(RuntimeError())), base_url="http://gateway"
    ) as client:
        answer = await client.post("/number", json={"number": "hunter2"})
        broken = await client.post("/number", content=b"{", headers={"content-type": "x/json"})
        not_json = await client.post(
            "/number", content=b"{", headers={"content-type": "application/json"}
        )
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == "number"
    assert error["code"] == "invalid_request"
    assert "hunter2" not in answer.text
    assert broken.status_code == 422
    assert not_json.status_code == 400
    assert not_json.json()["error"]["code"] == "invalid_json"


async def test_unknown_paths_and_methods_are_envelopes() -> None:
    async with httpx.AsyncClient(
        transport=transport(scripted(RuntimeError())), base_url="http://gateway"
    ) as client:
        lost = await client.get("/nowhere")
        wrong = await client.get("/number")
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "not_found")
    assert "/nowhere" in lost.json()["error"]["message"]
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


async def test_a_crash_is_logged_with_its_traceback_and_answered_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with httpx.AsyncClient(
        transport=transport(scripted(ZeroDivisionError("the secret"))), base_url="http://gateway"
    ) as client:
        with caplog.at_level(logging.ERROR):
            answer = await client.post("/v1/chat/completions")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    (record,) = [r for r in caplog.records if r.message == telemetry.Event.REQUEST_CRASHED]
    assert record.exc_info is not None


async def test_request_ids_are_echoed_made_up_and_never_copied_unread() -> None:
    async with httpx.AsyncClient(
        transport=transport(scripted(RuntimeError())), base_url="http://gateway"
    ) as client:
        given = await client.get("/nowhere", headers={"x-request-id": "mine-1"})
        none = await client.get("/nowhere")
        odd = await client.get("/nowhere", headers={"x-request-id": "a b" + "c" * 200})
    assert given.headers["x-request-id"] == "mine-1"
    assert none.headers["x-request-id"].startswith("req_")
    assert odd.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_refused_before_it_is_in_memory(declared: bool) -> None:
    limit = Settings().max_body_bytes
    sent = 0

    async def chunks() -> Any:
        nonlocal sent
        while sent <= 2 * limit:
            sent += 1 << 20
            yield bytes(1 << 20)

    headers = {"content-type": "application/json"}
    if declared:
        headers["content-length"] = str(2 * limit)
    async with httpx.AsyncClient(
        transport=transport(scripted(RuntimeError())), base_url="http://gateway"
    ) as client:
        answer = await client.post("/number", content=chunks(), headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert "LORAGATE_MAX_BODY_BYTES" in answer.json()["error"]["message"]
    assert sent == 0 if declared else sent <= limit + (2 << 20)
