"""Whatever answers at a Megatron address: our worker, or one of Megatron's own servers.

What comes in: finished requests. What goes out: replies in OpenAI's form. Which server it is, is
asked with every health probe, so another may be started in its place. A worker speaks vLLM's
dialect and serves adapters. Megatron's own servers serve the weights they were started with and
nothing else: what they cannot do is refused (`InvalidRequest`) and never left out in silence.

How they are told apart: the dynamic server's /health names its service; the static one has no
/health, and asks for prompts when PUT /api has none.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from functools import partial
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

from app.backends.base import Backend, EngineStatus, Features, Reply
from app.backends.megatron_replies import Generated, answer
from app.backends.megatron_requests import Ask, read
from app.backends.megatron_servers import Call, DynamicServer, StaticServer
from app.backends.vllm import VllmBackend
from app.backends.wire import Client, Limits
from app.clock import SystemClock
from app.errors import AdapterLoadFailed, UpstreamError, UpstreamRefused

SERVICE = "Megatron Inference Server"
_ANSWER_BYTES = 64 << 20


class _Health(msgspec.Struct):
    service: str = ""
    ready: bool = True


class _Server(Protocol):
    """One of Megatron's two."""

    async def generate(self, ask: Ask, call: Call) -> list[Generated]: ...

    def limited(self, ask: Ask) -> Ask: ...


class MegatronBackend:
    """One replica of a pool whose dialect is `megatron`. Arguments as `VllmBackend`'s."""

    def __init__(self, url: str, *, api_key: str | None, limits: Limits, load_s: float) -> None:
        self._worker = VllmBackend(url, api_key=api_key, limits=limits, load_s=load_s)
        self._wire = _Wire(url, api_key, limits)
        self._found: Backend | None = None

    async def send(self, path: str, body: bytes, headers: bytes) -> Reply:
        """As `Backend.send`; raises InvalidRequest for what Megatron's own servers cannot do."""
        return await (await self._server()).send(path, body, headers)

    async def load_adapter(self, name: str, path: str) -> None:
        await (await self._server()).load_adapter(name, path)

    async def unload_adapter(self, name: str) -> None:
        await (await self._server()).unload_adapter(name)

    async def list_adapters(self) -> dict[str, str]:
        return await (await self._server()).list_adapters()

    async def score(self, name: str, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        return await (await self._server()).score(name, token_ids)

    async def healthy(self) -> bool:
        try:
            self._found = await self._look()
        except UpstreamError:
            return False
        return self._found is not None

    async def status(self) -> EngineStatus:
        return await (await self._server()).status()

    async def features(self) -> Features:
        return await (await self._server()).features()

    async def close(self) -> None:
        await self._worker.close()
        self._wire.close()

    async def _server(self) -> Backend:
        if self._found is None:
            self._found = await self._look()
        if self._found is None:
            raise UpstreamRefused("no worker and no Megatron server answers at this address yet")
        return self._found

    async def _look(self) -> Backend | None:
        """Which server it is; None while it is not ready, or is none of them."""
        status, data = await self._wire.probe("GET", "/health")
        if status == 404:
            status, data = await self._wire.probe("PUT", "/api", b"{}")
            static = status == 400 and b"prompts argument" in data
            return _OneModel(StaticServer(), self._wire) if static else None
        if status != 200:
            return None
        try:
            health = msgspec.json.decode(data, type=_Health)
        except msgspec.DecodeError:
            return self._worker
        if health.service != SERVICE:
            return self._worker
        return _OneModel(DynamicServer(), self._wire) if health.ready else None


class _OneModel:
    """A server of Megatron's own, as a `Backend` that has no adapters."""

    def __init__(self, server: _Server, wire: _Wire) -> None:
        self._server = server
        self._wire = wire

    async def send(self, path: str, body: bytes, headers: bytes) -> Reply:
        ask = self._server.limited(read(path, body))
        generated = await self._server.generate(ask, partial(self._wire.call, headers))
        return answer(ask, generated, int(SystemClock().now().timestamp()))

    async def load_adapter(self, name: str, path: str) -> None:
        raise AdapterLoadFailed(
            f"{name} cannot be served here: Megatron's own server has one set of weights. Start "
            "`loragate worker` at this address, which serves adapters, or set USE_VLLM=true."
        )

    async def unload_adapter(self, name: str) -> None:
        """There is none."""

    async def list_adapters(self) -> dict[str, str]:
        return {}

    async def score(self, name: str, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        raise UpstreamError(f"Megatron's own server does not score {name}")

    async def healthy(self) -> bool:
        return True  # it is asked with every look

    async def status(self) -> EngineStatus:
        return EngineStatus()  # it has no metrics

    async def features(self) -> Features:
        # Both tell the logprobs of an echoed prompt; neither has vLLM's `prompt_logprobs`.
        return Features(True, False, False)

    async def close(self) -> None:
        """The wire is the backend's."""


class _Wire:
    """JSON requests, each with its whole answer, over connections of this replica's own."""

    def __init__(self, url: str, api_key: str | None, limits: Limits) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None  # VllmBackend has looked
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        tls = ssl.create_default_context() if secure else None
        name = parts.netloc.rpartition("@")[2]
        probing = Limits(connections=2, connect_s=limits.connect_s, first_byte_s=5.0)
        said = f"replica {name}"
        self._inference = Client(parts.hostname, port, name=said, limits=limits, tls=tls)
        self._probes = Client(parts.hostname, port, name=said, limits=probing, tls=tls)
        credentials = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._common = f"host: {name}\r\naccept-encoding: identity\r\n{credentials}".encode()

    async def call(
        self, headers: bytes, method: str, path: str, payload: object
    ) -> tuple[int, bytes]:
        message = self._message(method, path, headers, msgspec.json.encode(payload))
        return await _whole(self._inference, message)

    async def probe(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        return await _whole(self._probes, self._message(method, path, b"", body))

    def _message(self, method: str, path: str, headers: bytes, body: bytes) -> bytes:
        line = f"{method} {path} HTTP/1.1\r\n".encode()
        kind = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        return b"%b%b%b%b\r\n%b" % (line, self._common, headers, kind, body)

    def close(self) -> None:
        self._inference.close()
        self._probes.close()


async def _whole(client: Client, message: bytes) -> tuple[int, bytes]:
    response = await client.request(message)
    reply = Reply(response.status, response.headers, response)
    try:
        return reply.status, await reply.read(_ANSWER_BYTES)
    finally:
        reply.close()
