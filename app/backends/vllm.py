"""vLLM's dialect, spoken by vLLM servers and by our own worker.

What comes in: finished requests and adapter names with their paths. What goes out: replies.
The texts and statuses of adapter loading are vLLM's (`entrypoints/openai/models/serving.py`);
unloading only makes it forget the name, and any load failure that is not the caller's is a 500.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Sequence
from math import isfinite
from urllib.parse import urlsplit

import msgspec

from app.backends.base import EngineStatus, Features, Reply
from app.backends.plain_vllm import plain_features
from app.backends.wire import Client, Limits
from app.errors import AdapterLoadFailed, ConfigurationError, UpstreamBroke, UpstreamError

_ANSWER_BYTES = 16 << 20
#: A sample of one of the metrics read here: its name, labels if any, and its value.
_SAMPLE = re.compile(
    rb"^(vllm:num_requests_running|vllm:num_requests_waiting|vllm:kv_cache_usage_perc"
    rb"|process_start_time_seconds)(?:\{[^}\n]*\})? (\S+)",
    re.MULTILINE,
)


class _Card(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Card]


class _Ranked(msgspec.Struct):
    logprob: float


class _ScoredChoice(msgspec.Struct):
    prompt_logprobs: list[dict[str, _Ranked] | None]


class _Scored(msgspec.Struct):
    choices: list[_ScoredChoice]


class _Features(msgspec.Struct):
    """What loragate-vllm, and our own worker, answer to /loragate/features."""

    prompt_logprobs: bool
    prompt_logprobs_with_lora: bool
    prompt_logprobs_with_lm_head_lora: bool
    dtype: str | None = None


class _Complaint(msgspec.Struct):
    message: str = ""


class _Envelope(msgspec.Struct):
    error: _Complaint


class VllmBackend:
    """One replica, reached at `url`.

    Args:
        url: base URL, `http://host:port` or `https://…`, without a path.
        api_key: sent as a bearer token, if the replica wants one.
        limits: bounds of its connections.
        load_s: deadline of one adapter load, in seconds.
    """

    def __init__(self, url: str, *, api_key: str | None, limits: Limits, load_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"replica URL {url!r} is not http://host:port or https://host")
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        tls = ssl.create_default_context() if secure else None
        name = parts.netloc.rpartition("@")[2]

        def client(limits: Limits) -> Client:
            assert parts.hostname is not None
            return Client(parts.hostname, port, name=f"replica {name}", limits=limits, tls=tls)

        self._inference = client(limits)
        # Loads and probes have their own connections and deadlines: a pool full of requests
        # must not make a replica look dead, nor the other way round.
        self._loads = client(
            Limits(connections=8, connect_s=limits.connect_s, first_byte_s=load_s, idle_s=load_s)
        )
        self._probes = client(Limits(connections=2, connect_s=limits.connect_s, first_byte_s=5.0))
        credentials = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        common = f"host: {name}\r\naccept-encoding: identity\r\n{credentials}".encode()
        self._common = common
        self._post_heads: dict[str, bytes] = {}

    async def send(self, path: str, body: bytes, headers: bytes) -> Reply:
        head = self._post_heads.get(path) or self._post_head(path)
        message = b"%b%d\r\n%b\r\n%b" % (head, len(body), headers, body)
        response = await self._inference.request(message)
        return Reply(response.status, response.headers, response)

    async def load_adapter(self, name: str, path: str) -> None:
        reply = await self._ask_load(name, path)
        if reply[0] == 400 and "already been loaded" in reply[1]:
            # Under this name it may hold other files: those of an earlier registry, say.
            if (await self.list_adapters()).get(name) == path:
                return
            await self.unload_adapter(name)
            reply = await self._ask_load(name, path)
        status, message = reply
        if status == 200:
            return
        if status == 503:
            raise UpstreamError(f"the replica could not load {name} now: {message}")
        # The path says where our files lie, which is nobody's business outside.
        told = message.replace(path, "its files")
        raise AdapterLoadFailed(f"the replica refused to load {name}: {told}")

    async def unload_adapter(self, name: str) -> None:
        body = msgspec.json.encode({"lora_name": name})
        status, message = await self._text(self._loads, "/v1/unload_lora_adapter", body)
        if status not in (200, 404):
            raise UpstreamError(f"the replica did not unload {name}: {message}")

    async def list_adapters(self) -> dict[str, str]:
        status, data = await self._get("/v1/models")
        if status != 200:
            raise UpstreamError(f"the replica answered {status} to /v1/models")
        try:
            cards = msgspec.json.decode(data, type=_Models).data
        except msgspec.DecodeError as exc:
            raise UpstreamBroke(f"the replica's /v1/models is not a model list: {exc}") from exc
        return {card.id: card.root or "" for card in cards if card.parent is not None}

    async def score(self, name: str, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        return [await self._score(name, row) for row in token_ids]

    async def healthy(self) -> bool:
        try:
            status, _ = await self._get("/health")
        except UpstreamError:
            return False
        return status == 200

    async def status(self) -> EngineStatus:
        status, data = await self._get("/metrics")
        if status != 200:
            return EngineStatus()  # a server that speaks the dialect and has no metrics
        samples: dict[bytes, list[float]] = {}
        for name, value in _SAMPLE.findall(data):
            try:
                samples.setdefault(name, []).append(float(value))
            except ValueError as exc:
                raise UpstreamBroke(f"the replica's {name.decode()} is {value!r}") from exc
        # One sample for each engine behind the server: their requests add up.
        started = samples.get(b"process_start_time_seconds")
        return EngineStatus(
            running=_total(samples.get(b"vllm:num_requests_running")),
            waiting=_total(samples.get(b"vllm:num_requests_waiting")),
            kv_cache_usage=max(samples.get(b"vllm:kv_cache_usage_perc", [0.0])),
            started_at=started[0] if started else None,
        )

    async def features(self) -> Features:
        status, data = await self._get("/loragate/features")
        if status >= 500:
            raise UpstreamError(f"the replica answered {status} to /loragate/features")
        try:
            found = msgspec.json.decode(data if status == 200 else b"", type=_Features)
        except msgspec.DecodeError:  # it does not know that path, and says so in its own way
            status, data = await self._get("/metrics")
            return plain_features(data.decode(errors="replace") if status == 200 else "")
        return Features(
            prompt_logprobs=found.prompt_logprobs,
            lora_prompt_logprobs=found.prompt_logprobs_with_lora,
            lm_head_prompt_logprobs=found.prompt_logprobs_with_lm_head_lora,
            dtype=found.dtype,
        )

    async def close(self) -> None:
        for client in (self._inference, self._loads, self._probes):
            client.close()

    async def _score(self, name: str, row: Sequence[int]) -> list[float]:
        # A step must sample something; 0 is the fewest alternatives: the prompt's own tokens.
        asked = {"model": name, "prompt": row, "max_tokens": 1, "prompt_logprobs": 0}
        body = msgspec.json.encode(asked | {"temperature": 0.0})
        path = "/v1/completions"
        message = b"%b%d\r\n\r\n%b" % (self._post_head(path), len(body), body)
        status, data = await _read(self._loads, message)
        if status != 200:
            raise UpstreamError(f"the replica did not score {name}: {complaint(data)}")
        try:
            (choice,) = msgspec.json.decode(data, type=_Scored).choices
            pairs = zip(row[1:], choice.prompt_logprobs[1:], strict=True)
            return [(ranked or {})[str(token)].logprob for token, ranked in pairs]
        except (msgspec.DecodeError, ValueError, KeyError) as exc:
            raise UpstreamBroke(f"the replica's logprobs of {name} are not of its prompt") from exc

    async def _ask_load(self, name: str, path: str) -> tuple[int, str]:
        body = msgspec.json.encode({"lora_name": name, "lora_path": path})
        return await self._text(self._loads, "/v1/load_lora_adapter", body)

    async def _text(self, client: Client, path: str, body: bytes) -> tuple[int, str]:
        message = b"%b%d\r\n\r\n%b" % (self._post_head(path), len(body), body)
        status, data = await _read(client, message)
        return status, complaint(data)

    def _post_head(self, path: str) -> bytes:
        """A POST's first lines, up to the length of its body."""
        self._post_heads[path] = head = (
            b"POST %b HTTP/1.1\r\n%bcontent-type: application/json\r\ncontent-length: "
            % (path.encode(), self._common)
        )
        return head

    async def _get(self, path: str) -> tuple[int, bytes]:
        message = b"GET %b HTTP/1.1\r\n%b\r\n" % (path.encode(), self._common)
        return await _read(self._probes, message)


def _total(samples: list[float] | None) -> int:
    return int(sum(sample for sample in samples or () if isfinite(sample)))


async def _read(client: Client, message: bytes) -> tuple[int, bytes]:
    """Send a request and read its whole answer."""
    response = await client.request(message)
    reply = Reply(response.status, response.headers, response)
    try:
        return reply.status, await reply.read(_ANSWER_BYTES)
    finally:
        reply.close()


def complaint(data: bytes) -> str:
    """What an answer says went wrong: vLLM's error message, or its text."""
    try:
        return msgspec.json.decode(data, type=_Envelope).error.message
    except msgspec.DecodeError:
        return data[:500].decode(errors="replace").strip()
