"""What a fake replica knows and answers: its base, the adapters loaded, whether it still lives.

What comes in: a request. What goes out: a status and a body, or the events of a stream. It knows
nothing of sockets; the words are in `dialect`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fakes import dialect
from tests.fakes.dialect import Refusal, dumps
from tests.fakes.http1 import Request

Answer = tuple[int, bytes] | Iterator[bytes]

ENGINE_DEAD = (
    b'{"error":{"message":"EngineCore encountered an issue. See stack trace (above) for the root '
    b'cause.","type":"InternalServerError","param":null,"code":500}}'
)
LOAD_S = 0.02  # a load takes time: whoever comes meanwhile must wait for it


class FakeEngine:
    """vLLM behind its HTTP server."""

    def __init__(self, served: str, max_lora_rank: int, api_key: str | None) -> None:
        self.served = served
        self.max_lora_rank = max_lora_rank
        self.api_key = api_key
        self.adapters: dict[str, str] = {}
        self.weights: dict[str, str] = {}
        self.dead = False
        self.call_s = 0.0
        #: Computes something else with the same weights.
        self.wrong = False
        #: What /loragate/features says; None is a vLLM without the plugin.
        self.features: dict[str, Any] | None = dict(dialect.FEATURES)
        #: What /metrics says; the part of it that a gateway reads.
        self.metrics = dialect.metrics()
        self._ids = itertools.count(1)

    async def answer(self, request: Request) -> Answer:
        """vLLM's answer; raises `Refusal` for most of those that are not 200."""
        if request.path == "/health":
            return (503 if self.dead else 200), b""
        wanted = f"Bearer {self.api_key}"
        guarded = self.api_key is not None and request.path.startswith("/v1")
        if guarded and request.header("authorization") != wanted:
            return 401, dumps({"error": "Unauthorized"})
        match (request.method, request.path):
            case ("GET", "/loragate/features") if self.features is not None:
                return 200, dumps(self.features)
            case ("GET", "/metrics"):
                return 200, self.metrics.encode()
            case ("GET", "/v1/models"):
                return 200, dumps({"object": "list", "data": self._cards()})
            case ("POST", "/v1/load_lora_adapter"):
                return await self._load(dialect.parse(request.body))
            case ("POST", "/v1/unload_lora_adapter"):
                return self._unload(dialect.parse(request.body))
        if self.call_s:
            await asyncio.sleep(self.call_s)  # as long as a step takes, however many are in it
        return self._inference(request)

    def _inference(self, request: Request) -> Answer:
        say = {
            "/v1/chat/completions": _chat,
            "/v1/completions": _completion,
            "/v1/responses": _response,
            "/tokenize": _tokenize,
            "/detokenize": _detokenize,
        }.get(request.path)
        if say is None:
            return 404, dumps({"detail": "Not Found"})
        if request.method != "POST":
            return 405, dumps({"detail": "Method Not Allowed"})
        if self.dead:
            return 500, ENGINE_DEAD
        payload = dialect.parse(request.body)
        model = payload.get("model", self.served)
        if model != self.served and model not in self.adapters:
            raise dialect.unknown_model(model, self.served)
        rid = request.header("x-request-id") or f"{next(self._ids):016x}"
        try:
            return say(model, payload | {"weights": self._computed_with(model)}, rid)
        except KeyError as exc:
            field = f"body.{exc.args[0]}"
            message = f"1 validation error:\n  Field required: {field}"
            raise Refusal(400, message, "Bad Request", field) from exc

    def _computed_with(self, model: str) -> str | None:
        weights = self.weights.get(model)
        return f"wrongly {weights}" if self.wrong else weights

    async def _load(self, payload: dict[str, Any]) -> tuple[int, bytes]:
        name, path = payload["lora_name"], payload["lora_path"]
        if not name or not path:
            message = "Both 'lora_name' and 'lora_path' must be provided."
            raise Refusal(400, message, "InvalidUserInput")
        if name == self.served:
            message = f"The lora adapter '{name}' conflicts with a served base model."
            raise Refusal(400, message, "InvalidUserInput")
        if name in self.adapters:
            message = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True."
            )
            raise Refusal(400, message, "InvalidUserInput")
        await asyncio.sleep(LOAD_S)
        self._check(name, Path(path, "adapter_config.json"))
        self.adapters[name] = path
        self.weights[name] = _digest(Path(path, "adapter_model.safetensors"))
        return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()

    def _check(self, name: str, config: Path) -> None:
        if not config.is_file():
            message = f"Loading lora {name} failed: No adapter found for <path>"
            raise Refusal(404, message, "NotFoundError")
        rank = json.loads(config.read_bytes())["r"]
        if rank > self.max_lora_rank:
            message = (
                f"Call to add_lora method failed: Worker failed with error 'LoRA rank {rank} is "
                f"greater than max_lora_rank {self.max_lora_rank}.', please check the stack "
                "trace above for the root cause"
            )
            raise Refusal(500, message, "InternalServerError")

    def _unload(self, payload: dict[str, Any]) -> tuple[int, bytes]:
        name = payload["lora_name"]
        if name not in self.adapters:
            message = f"The lora adapter '{name}' cannot be found."
            raise Refusal(404, message, "NotFoundError")
        del self.adapters[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully.".encode()

    def _cards(self) -> list[dict[str, Any]]:
        fields: dict[str, Any] = {"object": "model", "created": dialect.CREATED}
        base = {"id": self.served, "root": "/models/tiny", "parent": None, "max_model_len": 1024}
        cards = [base | fields | {"owned_by": "vllm", "permission": []}]
        for name, path in self.adapters.items():
            card = {"id": name, "root": path, "parent": self.served, "max_model_len": None}
            cards.append(card | fields | {"owned_by": "vllm", "permission": []})
        return cards


def _digest(weights: Path) -> str:
    """What logprobs are made from: the weights themselves, not the name they were loaded under."""
    return hashlib.sha256(weights.read_bytes() if weights.is_file() else b"").hexdigest()


def _chat(model: str, payload: dict[str, Any], rid: str) -> Answer:
    if payload.get("stream"):
        return _primed(dialect.chat_events(model, payload, rid))
    return 200, dialect.chat_body(model, payload, rid)


def _completion(model: str, payload: dict[str, Any], rid: str) -> Answer:
    if payload.get("stream"):
        return _primed(dialect.completion_events(model, payload, rid))
    return 200, dialect.completion_body(model, payload, rid)


def _response(model: str, payload: dict[str, Any], rid: str) -> Answer:
    text = {
        "type": "output_text",
        "text": f"{model} heard: {payload['input']}",
        "annotations": [],
    }
    message = {"id": f"msg_{rid}", "type": "message", "role": "assistant", "content": [text]}
    answer = {"id": f"resp_{rid}", "object": "response", "created_at": dialect.CREATED}
    return 200, dumps(answer | {"model": model, "status": "completed", "output": [message]})


def _tokenize(model: str, payload: dict[str, Any], rid: str) -> Answer:
    tokens = dialect.tokenize(payload["prompt"])
    answer = {"count": len(tokens), "max_model_len": dialect.MAX_MODEL_LEN, "tokens": tokens}
    return 200, dumps(answer | {"token_strs": None})


def _detokenize(model: str, payload: dict[str, Any], rid: str) -> Answer:
    return 200, dumps({"prompt": dialect.detokenize(payload["tokens"])})


def _primed(events: Iterator[bytes]) -> Iterator[bytes]:
    """The same events, with an error in the first raised now, before the head goes out."""
    return itertools.chain([next(events)], events)
