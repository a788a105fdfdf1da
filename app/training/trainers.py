"""A worker's training routes, asked: docs/training-protocol.md from the gateway's side.

What comes in: ops. What goes out: results, files, or errors of app/errors, by their codes. It
repeats nothing by itself, but for asking again whether an outcome is there yet. It must not
know: SQL, jobs, what ops are for.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from app import errors
from app.domain import LoraSpec, Trainer
from app.errors import LoragateError, TrainerError, TrainerUnavailable
from app.ops import (
    MAX_WAIT_S,
    MEDIA_TYPE,
    PREFIX,
    Lora,
    Message,
    Op,
    OpenRun,
    Outcome,
    Rendered,
    RenderReply,
    RenderRequest,
    Result,
    RunStatus,
    SavedFile,
    Submit,
    TrainerInfo,
)

T = TypeVar("T")

#: Longest that a worker may be silent, beside what it was asked to wait. Opening a run or
#: cancelling its ops waits for the op that is being done.
SILENCE_S = 120.0
CONNECTIONS = 128
CHUNK = 1 << 20

#: What a worker may say went wrong, of an op or of a request. Anything else is its own fault.
_CODES: dict[str, Callable[[str], LoragateError]] = {
    each.code: each
    for each in (
        errors.InvalidRequest,
        errors.BodyTooLarge,
        errors.Conflict,
        errors.TrainingFailed,
        errors.NonFiniteLoss,
        errors.OutOfMemory,
        errors.RunLost,
        errors.TrainerBusy,
        errors.Fenced,
        errors.StorageUnavailable,
    )
}

_encode = msgspec.msgpack.Encoder().encode


@cache
def _authorities() -> ssl.SSLContext:
    """What vouches for https workers, read once: it takes longer than most requests."""
    return httpx.create_ssl_context(trust_env=False)


class _Complaint(msgspec.Struct):
    code: str
    message: str


class _Envelope(msgspec.Struct):
    error: _Complaint


class TrainerClient:
    """One worker. Close it, or use it as a context, when done with it and its runs."""

    def __init__(self, trainer: Trainer, *, connect_s: float = 2.0) -> None:
        key = trainer.api_key
        self._name = trainer.name
        self._http = httpx.AsyncClient(
            base_url=trainer.url.rstrip("/") + PREFIX,
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(SILENCE_S, connect=connect_s),
            limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            trust_env=False,
            verify=_authorities() if trainer.url.startswith("https:") else False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def info(self) -> TrainerInfo:
        """What the worker can do and which runs it knows."""
        return self.decoded(await self.ask("GET", "/info"), TrainerInfo)

    async def render(self, conversations: Sequence[Message], *, complete: bool) -> list[Rendered]:
        """Conversations through the model's chat template, in their order.

        What is wrong with one is in its `problem`.
        """
        asked = RenderRequest(list(conversations), complete)
        response = await self.ask("POST", "/render", await _packed(asked))
        return (await self.decoded_aside(response, RenderReply)).conversations

    def run(self, run_id: str) -> RunClient:
        """The run of that name, whether it exists yet or not."""
        return RunClient(self, run_id)

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        params: dict[str, Any] | None = None,
    ) -> httpx.Response:
        """One request; its answer, if that is not an error."""
        async with self.answering(method, path, body, params=params) as response:
            try:
                await response.aread()
            except httpx.HTTPError as exc:
                raise self._unavailable(exc) from exc
            return response

    @asynccontextmanager
    async def answering(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        params: dict[str, Any] | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """The same, with the answer's body still to be read."""
        headers = {} if body is None else {"content-type": MEDIA_TYPE}
        request = self._http.build_request(
            method, path, content=body, headers=headers, params=params
        )
        try:
            response = await self._http.send(request, stream=True)
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise self._unavailable(exc) from exc
        try:
            if response.is_error:
                raise await self._refusal(response)
            yield response
        finally:
            await response.aclose()

    def decoded(self, response: httpx.Response, kind: type[T]) -> T:
        """The answer's msgpack map."""
        try:
            return msgspec.msgpack.decode(response.content, type=kind)
        except msgspec.DecodeError as exc:
            raise TrainerError(
                f"trainer {self._name!r} answered {response.request.url.path} with something that "
                f"is not a {kind.__name__}: {exc}"
            ) from exc

    async def decoded_aside(self, response: httpx.Response, kind: type[T]) -> T:
        """The same, where it may be large."""
        return await asyncio.to_thread(self.decoded, response, kind)

    async def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The body of an answer, piece by piece."""
        try:
            async for chunk in response.aiter_bytes(CHUNK):
                yield chunk
        except httpx.HTTPError as exc:
            raise self._unavailable(exc) from exc

    def _unavailable(self, exc: Exception) -> TrainerUnavailable:
        detail = str(exc) or type(exc).__name__
        return TrainerUnavailable(f"trainer {self._name!r} cannot be reached: {detail}")

    async def _refusal(self, response: httpx.Response) -> LoragateError:
        try:
            said = msgspec.json.decode(await response.aread(), type=_Envelope).error
        except httpx.HTTPError as exc:
            return self._unavailable(exc)
        except msgspec.DecodeError:
            said = _Complaint("", f"it answered {response.status_code}")
        if said.code in _CODES:
            return _CODES[said.code](said.message)
        kind = TrainerUnavailable if response.is_server_error else TrainerError
        return kind(f"trainer {self._name!r}: {said.message}")


class RunClient:
    """One run of one worker; `training.run.Run` says what each method is for."""

    def __init__(self, trainer: TrainerClient, run_id: str) -> None:
        self._trainer = trainer
        self._run_id = run_id
        self._path = f"/runs/{quote(run_id, safe='')}"
        self._fence: int | None = None

    @property
    def run_id(self) -> str:
        return self._run_id

    async def open(self, base_model: str, spec: LoraSpec, fence: int) -> RunStatus:
        lora = Lora(spec.rank, spec.alpha, list(spec.target_modules), spec.seed)
        body = _encode(OpenRun(base_model, lora, fence))
        response = await self._trainer.ask("PUT", self._path, body)
        self._fence = fence
        return self._trainer.decoded(response, RunStatus)

    async def submit(self, seq: int, op: Op, acked: int = 0) -> None:
        body = await _packed(Submit(op, self._fence or 0, acked))
        await self._trainer.ask("PUT", f"{self._path}/ops/{seq}", body)

    async def outcome(self, seq: int) -> Result:
        path = f"{self._path}/ops/{seq}"
        while True:
            response = await self._trainer.ask("GET", path, params=self._params(wait_s=MAX_WAIT_S))
            if response.status_code != httpx.codes.NO_CONTENT:
                return self._result(await self._trainer.decoded_aside(response, Outcome))

    async def cancel_ops(self) -> RunStatus:
        response = await self._trainer.ask("DELETE", f"{self._path}/ops", params=self._params())
        return self._trainer.decoded(response, RunStatus)

    async def unload(self) -> None:
        await self._trainer.ask("POST", f"{self._path}/unload", params=self._params())

    async def delete(self) -> None:
        await self._trainer.ask("DELETE", self._path, params=self._params())

    async def download(self, name: str, files: Sequence[SavedFile], folder: Path) -> None:
        for file in files:
            if file.name in ("", ".", "..") or "/" in file.name or "\0" in file.name:
                raise TrainerError(f"adapter {name!r} of run {self._run_id!r}: file {file.name!r}")
            await self._fetch(name, file, folder / file.name)

    async def _fetch(self, name: str, file: SavedFile, target: Path) -> None:
        path = f"{self._path}/files/{quote(name, safe='')}/{quote(file.name, safe='')}"
        digest = hashlib.sha256()
        async with self._trainer.answering("GET", path) as response:
            with target.open("wb") as out:
                async for chunk in self._trainer.chunks(response):
                    digest.update(chunk)
                    await asyncio.to_thread(out.write, chunk)
        if digest.hexdigest() != file.sha256:
            await asyncio.to_thread(target.unlink)
            raise TrainerError(
                f"{file.name} of adapter {name!r} of run {self._run_id!r} is not the file that "
                "was written: its digest differs"
            )

    def _params(self, **params: Any) -> dict[str, Any]:
        return params if self._fence is None else {**params, "fence": self._fence}

    def _result(self, outcome: Outcome) -> Result:
        failure = outcome.failure
        if failure is not None:
            raise _CODES.get(failure.code, errors.TrainingFailed)(failure.message)
        return outcome.result or Result()


async def _packed(message: msgspec.Struct) -> bytes:
    """As msgpack; a batch of many megabytes keeps nobody else waiting."""
    return await asyncio.to_thread(_encode, message)
