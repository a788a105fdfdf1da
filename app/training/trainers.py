"""A worker's training routes, asked: docs/training-protocol.md from the gateway's side.

What comes in: ops. What goes out: results, files, or errors of app/errors, by their codes. It
repeats nothing by itself, but for asking again whether an outcome is there yet. It must not
know: SQL, jobs, what ops are for.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from app import errors
from app.backends.base import Reply
from app.backends.trainer import TrainerServer
from app.domain import LoraSpec, Trainer
from app.errors import LoragateError, TrainerError, TrainerUnavailable, UpstreamError
from app.ops import (
    MAX_WAIT_S,
    MEDIA_TYPE,
    PREFIX,
    Exchange,
    ForwardBackward,
    Lora,
    Message,
    Numbered,
    Op,
    OpenRun,
    Outcome,
    Outcomes,
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
CHUNK = 1 << 20
#: Largest answer that is no file; and what is packed and unpacked at once, more beside the loop.
ANSWER_BYTES = 1 << 30
INLINE_BYTES = 64 << 10

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


class _Complaint(msgspec.Struct):
    code: str
    message: str


class _Envelope(msgspec.Struct):
    error: _Complaint


class TrainerClient:
    """One worker. Close it, or use it as a context, when done with it and its runs."""

    def __init__(self, trainer: Trainer, *, connect_s: float = 2.0) -> None:
        self._trainer = trainer
        self._name = trainer.name
        self._connect_s = connect_s
        self._server: TrainerServer | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def info(self) -> TrainerInfo:
        """What the worker can do and which runs it knows."""
        return await self.answer("GET", "/info", TrainerInfo)

    async def render(self, conversations: Sequence[Message], *, complete: bool) -> list[Rendered]:
        """Conversations through the model's chat template, in their order.

        What is wrong with one is in its `problem`.
        """
        asked = RenderRequest(list(conversations), complete)
        body = await asyncio.to_thread(_encode, asked)
        return (await self.answer("POST", "/render", RenderReply, body)).conversations

    def run(self, run_id: str) -> RunClient:
        """The run of that name, whether it exists yet or not."""
        return RunClient(self, run_id)

    async def answer(self, method: str, path: str, kind: type[T], body: bytes | None = None) -> T:
        """One request; the msgpack map it is answered with."""
        return await self.unpacked(path, await self.ask(method, path, body), kind)

    async def unpacked(self, path: str, data: bytes, kind: type[T]) -> T:
        """An answer's msgpack map; what is large is read beside the loop."""
        try:
            if len(data) <= INLINE_BYTES:
                return msgspec.msgpack.decode(data, type=kind)
            return await asyncio.to_thread(msgspec.msgpack.decode, data, type=kind)
        except msgspec.DecodeError as exc:
            raise TrainerError(
                f"trainer {self._name!r} answered {path} with something that is not a "
                f"{kind.__name__}: {exc}"
            ) from exc

    async def ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """One request; the body of its answer, if that is not an error."""
        async with self.answering(method, path, body) as reply:
            return await self._read(reply)

    @asynccontextmanager
    async def answering(
        self, method: str, path: str, body: bytes | None = None
    ) -> AsyncIterator[Reply]:
        """The same, with the answer's body still to be read."""
        try:
            reply = await self._reached().send(method, PREFIX + path, body)
        except UpstreamError as exc:
            raise self._unavailable(exc) from exc
        try:
            if reply.status >= 300:
                raise await self._refusal(reply)
            yield reply
        finally:
            reply.close()

    async def chunks(self, reply: Reply) -> AsyncIterator[bytes]:
        """The body of an answer, in pieces of about CHUNK bytes."""
        more = True
        while more:
            parts: list[bytes] = []
            size = 0
            while size < CHUNK and (more := bool(data := await self._next(reply))):
                parts.append(data)
                size += len(data)
            yield b"".join(parts)

    def _reached(self) -> TrainerServer:
        if self._server is None:
            self._server = TrainerServer(
                self._trainer.url,
                api_key=self._trainer.api_key,
                media_type=MEDIA_TYPE,
                connect_s=self._connect_s,
                silence_s=SILENCE_S + MAX_WAIT_S,
            )
        return self._server

    async def _next(self, reply: Reply) -> bytes:
        try:
            return await reply.next()
        except UpstreamError as exc:
            raise self._unavailable(exc) from exc

    async def _read(self, reply: Reply) -> bytes:
        try:
            return reply.take() if reply.complete else await reply.read(ANSWER_BYTES)
        except UpstreamError as exc:
            raise self._unavailable(exc) from exc

    def _unavailable(self, exc: UpstreamError) -> TrainerUnavailable:
        return TrainerUnavailable(f"trainer {self._name!r} cannot be reached: {exc}")

    async def _refusal(self, reply: Reply) -> LoragateError:
        try:
            said = msgspec.json.decode(await self._read(reply), type=_Envelope).error
        except TrainerUnavailable as exc:
            return exc
        except msgspec.DecodeError:
            said = _Complaint("", f"it answered {reply.status}")
        if said.code in _CODES:
            return _CODES[said.code](said.message)
        kind = TrainerUnavailable if reply.status >= 500 else TrainerError
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
        status = await self._trainer.answer("PUT", self._path, RunStatus, body)
        self._fence = fence
        return status

    async def submit(self, seq: int, op: Op, acked: int = 0) -> None:
        body = await _packed(Submit(op, self._fence or 0, acked), _bytes(op))
        await self._trainer.ask("PUT", f"{self._path}/ops/{seq}", body)

    async def outcome(self, seq: int) -> Result:
        path = f"{self._path}/ops/{seq}"
        query = self._query(wait_s=MAX_WAIT_S)
        while not (data := await self._trainer.ask("GET", path + query)):
            pass  # it is not there yet
        return _result(await self._trainer.unpacked(path, data, Outcome))

    async def exchange(
        self, ops: Sequence[tuple[int, Op]], acked: int, wanted: tuple[int, int] | None
    ) -> list[Result]:
        path = f"{self._path}/ops"
        numbered = [Numbered(seq, op) for seq, op in ops]
        asked = Exchange(numbered, self._fence or 0, acked, wanted, MAX_WAIT_S)
        body = await _packed(asked, sum(_bytes(op) for _, op in ops))
        found = await self._trainer.answer("POST", path, Outcomes, body)
        while wanted is not None and not found.outcomes:
            again = _encode(msgspec.structs.replace(asked, ops=[]))
            found = await self._trainer.answer("POST", path, Outcomes, again)
        return [_result(outcome) for outcome in found.outcomes]

    async def cancel_ops(self) -> RunStatus:
        path = f"{self._path}/ops{self._query()}"
        return await self._trainer.answer("DELETE", path, RunStatus)

    async def unload(self) -> None:
        await self._trainer.ask("POST", f"{self._path}/unload{self._query()}")

    async def delete(self) -> None:
        await self._trainer.ask("DELETE", self._path + self._query())

    async def download(self, name: str, files: Sequence[SavedFile], folder: Path) -> None:
        for file in files:
            if file.name in ("", ".", "..") or "/" in file.name or "\0" in file.name:
                raise TrainerError(f"adapter {name!r} of run {self._run_id!r}: file {file.name!r}")
            await self._fetch(name, file, folder / file.name)

    async def _fetch(self, name: str, file: SavedFile, target: Path) -> None:
        path = f"{self._path}/files/{quote(name, safe='')}/{quote(file.name, safe='')}"
        digest = hashlib.sha256()
        async with self._trainer.answering("GET", path) as reply:
            with target.open("wb") as out:
                async for chunk in self._trainer.chunks(reply):
                    digest.update(chunk)
                    await asyncio.to_thread(out.write, chunk)
        if digest.hexdigest() != file.sha256:
            await asyncio.to_thread(target.unlink)
            raise TrainerError(
                f"{file.name} of adapter {name!r} of run {self._run_id!r} is not the file that "
                "was written: its digest differs"
            )

    def _query(self, **params: float) -> str:
        fence = {} if self._fence is None else {"fence": self._fence}
        query = urlencode(params | fence)
        return f"?{query}" if query else ""


def _result(outcome: Outcome) -> Result:
    failure = outcome.failure
    if failure is not None:
        raise _CODES.get(failure.code, errors.TrainingFailed)(failure.message)
    return outcome.result or Result()


def _bytes(op: Op) -> int:
    """About how large an op is as a message; all but passes are small."""
    if not isinstance(op, ForwardBackward):
        return 0
    fields = 5  # of a datum, each as long as its tokens
    return fields * sum(len(datum.tokens.data) for datum in op.data)


async def _packed(message: msgspec.Struct, size: int) -> bytes:
    """As msgpack; a batch of many megabytes keeps nobody else waiting."""
    if size <= INLINE_BYTES:
        return _encode(message)
    return await asyncio.to_thread(_encode, message)
