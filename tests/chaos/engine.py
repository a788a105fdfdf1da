"""A model server without sockets or a model, to which anything can happen.

What comes in: what a gateway asks of a `Backend`, and faults. What goes out: vLLM's answers, by the
weights that it holds: another file's answers are other answers, whatever name they are served as.
What the gateway promises a server (one load at a time, so many requests and adapters at once) is
checked here, and what it left behind can be seen in `running`.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from app.backends.base import BufferedBody, EngineStatus, Features, Push, Reply
from app.domain import Pool, Replica
from app.errors import (
    AdapterLoadFailed,
    UpstreamBroke,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
)
from tests.fakes import dialect
from tests.fakes.engine import ENGINE_DEAD

FIRST_BYTE_S = 15.0
IDLE_S = 10.0
LOAD_S = 30.0
PROBE_S = 5.0
_JSON = [(b"content-type", b"application/json")]
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


def weights_of(path: str) -> str:
    """What answers are made from: the file's digest, which is the last part of its path."""
    return path.rpartition("/")[2]


def scored(weights: str, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
    """The logprob of every id but the first of each row."""

    def logprob(ids: Sequence[int]) -> float:
        return -(zlib.crc32(f"{weights} {list(ids)}".encode()) % 8192) / 1024

    return [[logprob(row[: at + 1]) for at in range(1, len(row))] for row in token_ids]


class ChaosEngine:
    """One replica. Faults are attributes: set them, or call what happens once."""

    def __init__(self, replica: Replica, pool: Pool) -> None:
        self.replica = replica
        self.pool = pool
        self.adapters: dict[str, str] = {}
        self.started_at = 1.0
        self.alive = True
        self.dead = False
        self.factor = 1.0
        self.lies = False
        self.lied: list[tuple[float, float]] = []
        self.unavailable = 0
        self.resets_before = 0
        self.resets_after = 0
        self.load_errors = 0
        self.load_refusals = 0
        self.running: Counter[str] = Counter()
        self.replies: list[Reply] = []
        self.problems: list[str] = []
        self.loads = 0
        self._loading = 0
        self._death: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._healed: asyncio.Future[None] | None = None

    # faults

    def kill(self) -> None:
        """The process ends, with everything that runs in it."""
        self.alive = False
        if not self._death.done():
            self._death.set_result(None)

    def restart(self) -> None:
        """Another process, which knows nothing."""
        self.kill()
        self.adapters.clear()
        self.started_at += 1
        self.dead = self.lies = False
        self.alive = True
        self.heal()
        self._death = asyncio.get_running_loop().create_future()

    def hang(self) -> None:
        """It accepts and does nothing."""
        if self._healed is None:
            self._healed = asyncio.get_running_loop().create_future()

    def heal(self) -> None:
        """It goes on, as fast as ever."""
        self.factor = 1.0
        healed, self._healed = self._healed, None
        if healed is not None:
            healed.set_result(None)

    # Backend

    async def send(self, path: str, body: bytes, headers: bytes) -> Reply:
        self._connect()
        payload = json.loads(body)
        name = payload["model"]
        self.running[name] += 1
        self._check()
        try:
            reply = await self._answer(name, payload, headers)
        except BaseException:
            self._ended(name)
            raise
        self.replies.append(reply)
        return reply.on_close(lambda: self._ended(name))

    async def _answer(self, name: str, payload: dict[str, Any], headers: bytes) -> Reply:
        if self.resets_before:
            self.resets_before -= 1
            raise UpstreamBroke("reset before the first byte")
        if self.unavailable:
            self.unavailable -= 1
            return Reply(503, _JSON, BufferedBody(b'{"error":{"message":"overloaded"}}'))
        if self.dead:
            return Reply(500, _JSON, BufferedBody(ENGINE_DEAD))
        await self.work(0.05, FIRST_BYTE_S)
        try:
            return await self._said(name, payload, _rid(headers))
        except dialect.Refusal as refusal:
            return Reply(refusal.status, _JSON, BufferedBody(refusal.body))

    async def _said(self, name: str, payload: dict[str, Any], rid: str) -> Reply:
        speaker = self._speaker(name)
        payload = payload | {"weights": speaker}
        breaks = self.resets_after > 0
        self.resets_after -= breaks
        if payload.get("stream"):
            events = dialect.completion_events(speaker, payload, rid)
            return Reply(200, _EVENTS, EngineBody(self, events, breaks=breaks))
        data = dialect.completion_body(speaker, payload, rid)
        prompts = payload["prompt"]
        await self.work(0.1 + 0.01 * (len(prompts) if isinstance(prompts, list) else 1), IDLE_S)
        if not breaks:
            return Reply(200, _JSON, BufferedBody(data))
        halves = iter([data[: len(data) // 2], data[len(data) // 2 :]])
        return Reply(200, _JSON, EngineBody(self, halves, breaks=True))

    def _speaker(self, name: str) -> str:
        if name == self.pool.served_name:
            return "liar" if self.lies else "base"
        if name not in self.adapters:
            raise dialect.unknown_model(name, self.pool.served_name)
        weights = weights_of(self.adapters[name])
        if not self.lies:
            return weights
        # Another file's weights, if there is another.
        others = sorted({weights_of(path) for path in self.adapters.values()} - {weights})
        return others[0] if others else "liar"

    async def load_adapter(self, name: str, path: str) -> None:
        self._connect()
        self.loads += 1
        self._loading += 1
        if self._loading > 1:
            self.problems.append(f"{self._loading} loads at once")
        try:
            await self.work(0.4, LOAD_S)
        finally:
            self._loading -= 1
        if self.dead:
            raise UpstreamError("the engine is dead")
        if self.load_errors:
            self.load_errors -= 1
            raise UpstreamError("not now")
        if self.load_refusals:
            self.load_refusals -= 1
            raise AdapterLoadFailed("no such file here")
        self.adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        self._connect()
        await self.work(0.01, LOAD_S)
        self.adapters.pop(name, None)

    async def list_adapters(self) -> dict[str, str]:
        self._connect()
        await self.work(0.01, PROBE_S)
        return dict(self.adapters)

    async def score(self, name: str, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        self._connect()
        await self.work(0.05, LOAD_S)
        if self.dead or (name != self.pool.served_name and name not in self.adapters):
            raise UpstreamError("it does not score that")
        return scored(self._speaker(name), token_ids)

    async def healthy(self) -> bool:
        try:
            self._connect()
            await self.work(0.01, PROBE_S)
        except UpstreamError:
            return False
        return not self.dead

    async def status(self) -> EngineStatus:
        self._connect()
        await self.work(0.01, PROBE_S)
        return EngineStatus(running=self.running.total(), started_at=self.started_at)

    async def features(self) -> Features:
        self._connect()
        await self.work(0.01, PROBE_S)
        return Features(True, True, True, "float32")

    async def close(self) -> None:
        """Nothing is kept open."""

    # time

    async def work(self, seconds: float, limit_s: float) -> None:
        """Take so long; or until it dies, or has been silent for longer than a client allows."""
        death = self._death
        loop = asyncio.get_running_loop()
        limit = loop.time() + limit_s
        left = seconds * self.factor
        while left > 0 or self._healed is not None:
            hung = [self._healed] if self._healed is not None else []
            wait_s = limit - loop.time() if hung else min(left, limit - loop.time())
            ended, _ = await asyncio.wait([death, *hung], timeout=wait_s, return_when=_FIRST)
            if death in ended:
                raise UpstreamBroke("the connection was reset")
            if not hung:
                left -= wait_s
            if not ended and loop.time() >= limit:
                raise UpstreamTimeout("silent for too long")

    def _connect(self) -> None:
        if not self.alive:
            raise UpstreamRefused("connection refused")

    def _ended(self, name: str) -> None:
        self.running[name] -= 1
        if not self.running[name]:
            del self.running[name]

    def _check(self) -> None:
        adapters = self.running.keys() - {self.pool.served_name}
        if self.running.total() > self.pool.max_inflight:
            self.problems.append(f"{self.running.total()} requests at once")
        if len(adapters) > self.pool.max_loras:
            self.problems.append(f"{len(adapters)} adapters at once")


_FIRST = asyncio.FIRST_COMPLETED


class EngineBody:
    """Pieces that take their time; one that `breaks` does so after the first."""

    complete = False

    def __init__(self, engine: ChaosEngine, pieces: Iterator[bytes], *, breaks: bool) -> None:
        self._engine = engine
        self._pieces = pieces
        self._breaks = breaks
        self._given = 0
        self._death = engine._death

    async def next(self) -> bytes:
        if self._death.done():
            raise UpstreamBroke("the connection was reset")
        await self._engine.work(0.05, IDLE_S)
        if self._breaks and self._given:
            raise UpstreamBroke("reset after the first byte")
        self._given += 1
        return next(self._pieces, b"")

    async def pipe(self, push: Push, push_chunk: Push | None = None) -> None:
        while data := await self.next():
            room = push(data)
            if room is not None:
                await room

    def take(self) -> bytes:
        raise AssertionError("not complete")

    def close(self) -> None:
        self._pieces = iter(())


def _rid(headers: bytes) -> str:
    return headers.partition(b"x-request-id: ")[2].partition(b"\r\n")[0].decode()
