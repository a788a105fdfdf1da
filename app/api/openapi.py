"""The document behind /docs: FastAPI's own, the inference paths, and an example of everything.

What comes in: the app's routes and their pydantic models. What goes out: one OpenAPI document in
which each route says what it takes, what it answers and how it fails. Serves nothing itself.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from app import errors
from app.api.admin.shapes import ErrorEnvelope
from app.api.admin.uploads import NewAdapter, NewVersion
from app.api.errors import envelope, headers_of
from app.api.inference_docs import INFERENCE

Document = dict[str, Any]

_ABOUT = """\
An OpenAI-compatible door to LoRA adapters on pools of vLLM servers.

Send a key as `Authorization: Bearer …` or `X-API-Key: …`. While no key was ever created, a
gateway on loopback needs none. Every answer carries `X-Request-Id`, the client's own if it sent
one. Every error is OpenAI's envelope with a stable `code`.
"""
_JSON = "application/json"
_REF = "#/components/schemas/"
#: Bodies that routes read themselves, so that FastAPI does not know of them.
_UNSEEN: tuple[type[BaseModel], ...] = (NewAdapter, NewVersion, ErrorEnvelope)
#: Tags of routes that answer 400 to a body that does not fit.
_ANSWERS_400 = {"Files", "Uploads", "Fine-tuning", "Single ops"}
#: How each status reads, once.
_FAILURES: dict[int, tuple[str, errors.LoragateError]] = {
    400: (
        "The request is not understood.",
        errors.InvalidJson("The body is not JSON: Expecting value"),
    ),
    401: (
        "The key is missing, unknown, expired or revoked.",
        errors.Unauthenticated("The API key is not known, or was revoked."),
    ),
    403: (
        "The key may not do this.",
        errors.Forbidden("The key 'ci' does not have the scope 'admin'. Use a key that has it."),
    ),
    404: (
        "There is no such thing.",
        errors.NotFound("There is no adapter 'support-bot'.", param="name"),
    ),
    409: (
        "The change contradicts what is there.",
        errors.Conflict("Adapter 'support-bot' exists.", param="name"),
    ),
    413: (
        "The body is over the limit.",
        errors.BodyTooLarge("The body is over 33554432 bytes; LORAGATE_MAX_BODY_BYTES is it."),
    ),
    422: (
        "A field is wrong, or the weights cannot be served.",
        errors.AdapterRejected([errors.Fault("r", 128, "at most 64, the pool's max_lora_rank")]),
    ),
    502: (
        "A server or a source of weights broke.",
        errors.UpstreamBroke("Replica llama-5f3c9a11 closed the connection before its answer."),
    ),
    503: (
        "No replica can take the request now; Retry-After says when to ask again.",
        errors.NoReplicaAvailable("No replica of pool 'llama' is healthy."),
    ),
    504: (
        "The replica was silent for too long.",
        errors.UpstreamTimeout("Replica llama-5f3c9a11 did not answer within 600 s."),
    ),
}

#: What a 503 means where no model is asked.
_NO_STORAGE = (
    "The database or the adapter store cannot be used now; Retry-After says when to ask again.",
    errors.StorageUnavailable("The gateway's database is locked by someone else."),
)


def install(app: FastAPI) -> None:
    """Serve the whole document, made when first asked for."""

    def openapi() -> Document:
        if app.openapi_schema is None:
            app.openapi_schema = document(app)
        return app.openapi_schema

    # The way FastAPI documents for replacing it.
    app.openapi = openapi  # type: ignore[method-assign]


def document(app: FastAPI) -> Document:
    """The OpenAPI document of the gateway."""
    found: Document = get_openapi(
        title="loragate", version=app.version, description=_ABOUT, routes=app.routes
    )
    schemas: dict[str, Any] = found["components"]["schemas"]
    for model in _UNSEEN:
        schema = model.model_json_schema(ref_template=_REF + "{model}")
        schemas |= {**schema.pop("$defs", {}), model.__name__: schema}
    schemes = list(found["components"]["securitySchemes"])
    paths = found["paths"]
    found["paths"] = {
        **{path: {"post": _inference(*of, schemes)} for path, of in INFERENCE.items()},
        **paths,
    }
    for path in found["paths"].values():
        for operation in path.values():
            _complete(operation, schemas)
    # FastAPI's own shape of a 422, which no route here answers.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return found


def _inference(
    summary: str, description: str, request: Document, examples: Document, schemes: list[str]
) -> Document:
    failures = (400, 401, 403, 404, 413, 502, 503, 504)
    return {
        "tags": ["Inference"],
        "summary": summary,
        "description": description,
        "operationId": summary.lower().replace(" ", "_"),
        "security": [{scheme: []} for scheme in schemes],
        "requestBody": {"required": True, "content": {_JSON: request}},
        "responses": {
            "200": {"description": "The replica's answer, unchanged.", "content": examples},
            **{str(status): {} for status in failures},
        },
    }


def _complete(operation: Document, schemas: Document) -> None:
    """Give an operation its error answers, and an example wherever it has none yet."""
    for body in operation.get("requestBody", {}).get("content", {}).values():
        _exemplify(body, schemas)
    # FastAPI adds its 422 wherever there are parameters, without knowing our envelope, or that
    # some routes answer 400 instead.
    if not _ANSWERS_400.isdisjoint(operation["tags"]):
        operation["responses"].pop("422", None)
    for status, response in operation["responses"].items():
        if int(status) < 400:
            for body in response.get("content", {}).values():
                _exemplify(body, schemas)
        elif "example" not in response.get("content", {}).get(_JSON, {}):
            response.clear()
            found = _FAILURES[int(status)]
            admins = status == "503" and "Inference" not in operation["tags"]
            response |= _failure(*(_NO_STORAGE if admins else found))


def _failure(meaning: str, sample: errors.LoragateError) -> Document:
    body = {"schema": {"$ref": f"{_REF}ErrorEnvelope"}, "example": envelope(sample)}
    headers = {
        name: {"schema": {"type": "string"}, "example": value}
        for name, value in headers_of(sample).items()
    }
    return {
        "description": meaning,
        "content": {_JSON: body},
        **({"headers": headers} if headers else {}),
    }


def _exemplify(body: Document, schemas: Document) -> None:
    schema = body.get("schema", {})
    if "example" in body or "examples" in body or schema.get("format") == "binary":
        return
    body["example"] = _example(schema, schemas)


def _example(schema: Document, schemas: Document) -> Any:
    """A value that fits: the first example given for each field, its default, or its kind's."""
    if "$ref" in schema:
        return _example(schemas[schema["$ref"].removeprefix(_REF)], schemas)
    for given in ("examples", "enum"):
        if given in schema:
            return schema[given][0]
    for given in ("const", "default"):
        if given in schema:
            return schema[given]
    if "anyOf" in schema:
        # Optional fields: null says more clearly than a made-up value that they may be absent.
        absent = {"type": "null"} in schema["anyOf"]
        return None if absent else _example(schema["anyOf"][0], schemas)
    if schema.get("type") == "array":
        return [_example(schema["items"], schemas)]
    if schema.get("type") == "object":
        fields = schema.get("properties", {})
        return {name: _example(field, schemas) for name, field in fields.items()}
    if schema.get("format") == "date-time":
        return "2026-01-31T12:00:00Z"
    return {"boolean": False, "integer": 1, "number": 1.0}.get(schema.get("type", ""), "text")
