"""What the data plane's tests are made of: a registry's picture, a clock, replicas of memory."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from app.backends.base import BufferedBody, EngineStatus, Features, Push, Reply
from app.domain import (
    Adapter,
    AdapterVersion,
    Alias,
    BaseModel,
    Pool,
    Principal,
    Replica,
    ReplicaState,
    Scope,
)
from app.errors import LoragateError, UpstreamBroke
from app.serving.fleet import Fleet
from app.serving.pool import LivePool
from app.serving.replica import SLOW_START_S, LiveReplica
from app.serving.snapshot import Snapshot

AT = datetime(2030, 1, 1, tzinfo=UTC)
STORE = Path("/store")
ANYONE = Principal("key-1", "anyone", frozenset({Scope.INFERENCE}))


def digest(adapter: str, number: int) -> str:
    return f"{adapter}-{number}".encode().hex().ljust(64, "0")


def version(adapter: str = "pirate", number: int = 1) -> AdapterVersion:
    return AdapterVersion(adapter, number, digest(adapter, number), 8, "tiny")


def path_of(version: AdapterVersion) -> str:
    return f"/store/{version.digest[:2]}/{version.digest}"


def adapter(
    name: str, versions: int = 1, aliases: Mapping[str, tuple[tuple[int, int], ...]] | None = None
) -> Adapter:
    targets = {"latest": ((versions, 1),), **(aliases or {})}
    return Adapter(
        name,
        "tiny",
        "pool",
        AT,
        {number: version(name, number) for number in range(1, versions + 1)},
        {alias: Alias(alias, target) for alias, target in targets.items()},
    )


def snapshot(
    *adapters: Adapter,
    replicas: int | Mapping[str, Replica] = 1,
    store_mount: str | None = None,
    **fields: object,
) -> Snapshot:
    if isinstance(replicas, int):
        ids = [f"r{n}" for n in range(replicas)]
        replicas = {name: Replica(name, "pool", f"http://{name}") for name in ids}
    defaults: dict[str, object] = {
        "bases": {"tiny": BaseModel("tiny")},
        "pools": {"pool": Pool("pool", "tiny", "served-tiny", store_mount=store_mount)},
        "base_pools": {"tiny": "pool"},
        "replicas": replicas,
        "adapters": {adapter.name: adapter for adapter in adapters},
    }
    return Snapshot(**(defaults | fields))  # type: ignore[arg-type]


class MovableClock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> datetime:
        return AT + timedelta(seconds=self.at)

    def monotonic(self) -> float:
        return self.at


class FakeBackend:
    """A replica without sockets, which does vLLM's part: it serves what was loaded.

    `answers` are used up one a request: a reply to give, or an error to raise. `loading`, if set,
    is awaited by every load; `load_errors` are raised by them, one each.
    """

    def __init__(self, replica: Replica, served: str = "served-tiny") -> None:
        self.replica = replica
        self.served = served
        self.adapters: dict[str, str] = {}
        self.well = True
        self.gets_right = Features(True, True, True)
        self.closed = False
        self.sent: list[tuple[str, bytes, bytes]] = []
        self.loads: list[tuple[str, str]] = []
        self.unloads: list[str] = []
        self.replies: list[Reply] = []
        self.answers: list[Callable[[], Reply] | LoragateError] = []
        self.load_errors: list[Exception | None] = []
        self.list_error: LoragateError | None = None
        self.engine = EngineStatus(started_at=1.0)
        self.score_error: LoragateError | None = None
        self.scored: list[str] = []
        self.loading: asyncio.Event | None = None
        self.answering: asyncio.Event | None = None

    async def send(self, path: str, body: bytes, headers: bytes) -> Reply:
        self.sent.append((path, body, headers))
        if self.answering is not None:
            await self.answering.wait()
        answer = self.answers.pop(0) if self.answers else self._answer
        if isinstance(answer, LoragateError):
            raise answer
        reply = answer()
        self.replies.append(reply)
        return reply

    def _answer(self) -> Reply:
        body = self.sent[-1][1]
        known = [self.served, *self.adapters]
        if not any(b'"model":"%b"' % name.encode() in body for name in known):
            return whole(404, b'{"error":{"message":"The model `x` does not exist."}}')
        return whole(200, b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}')

    async def load_adapter(self, name: str, path: str) -> None:
        self.loads.append((name, path))
        if self.loading is not None:
            await self.loading.wait()
        error = self.load_errors.pop(0) if self.load_errors else None
        if error is not None:
            raise error
        self.adapters[name] = path

    async def score(self, name: str, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Other weights, which here are another path, say something else of the same tokens."""
        self.scored.append(name)
        if self.score_error is not None:
            raise self.score_error
        whose = self.adapters.get(name, name)

        def logprob(row: Sequence[int], at: int) -> float:
            return -(zlib.crc32(f"{whose} {list(row[: at + 1])}".encode()) % 8192) / 1024

        return [[logprob(row, at) for at in range(1, len(row))] for row in token_ids]

    async def unload_adapter(self, name: str) -> None:
        self.unloads.append(name)
        self.adapters.pop(name, None)

    async def list_adapters(self) -> dict[str, str]:
        if self.list_error is not None:
            raise self.list_error
        return dict(self.adapters)

    async def healthy(self) -> bool:
        return self.well

    async def status(self) -> EngineStatus:
        return self.engine

    async def features(self) -> Features:
        return self.gets_right

    async def close(self) -> None:
        self.closed = True


def whole(status: int, data: bytes = b"{}") -> Reply:
    return Reply(status, [(b"content-type", b"application/json")], BufferedBody(data))


class StreamedBody:
    """Pieces one after the other; then the end, or an error."""

    def __init__(self, *pieces: bytes, error: LoragateError | None = None) -> None:
        self.pieces = list(pieces)
        self.error = error
        self.closed = 0

    @property
    def complete(self) -> bool:
        return False

    async def next(self) -> bytes:
        await asyncio.sleep(0)
        if self.pieces:
            return self.pieces.pop(0)
        if self.error is not None:
            raise self.error
        return b""

    async def pipe(self, push: Push, push_chunk: Push | None = None) -> None:
        while data := await self.next():
            push(data)

    def take(self) -> bytes:
        raise AssertionError("not complete")

    def close(self) -> None:
        self.closed += 1


def stream(*pieces: bytes, broken: bool = False) -> Reply:
    error = UpstreamBroke("it died") if broken else None
    return Reply(200, [(b"content-type", b"text/event-stream")], StreamedBody(*pieces, error=error))


def replicas(count: int = 1, **config: Any) -> list[LiveReplica]:
    """Healthy replicas of one pool, with a clock of their own: `replica.clock`."""
    clock = MovableClock()
    pool = LivePool(Pool("pool", "tiny", "served-tiny", **config), clock.monotonic())
    made = []
    for number in range(count):
        row = Replica(f"r{number}", "pool", f"http://r{number}")
        made.append(LiveReplica(row, FakeBackend(row), pool, clock))
    pool.consists_of(made)
    for replica in made:
        replica.turned(ReplicaState.HEALTHY, "made so")
    clock.at = SLOW_START_S
    return made


class FleetOfMemory:
    """A fleet whose replicas are `FakeBackend`s, in the order they were connected."""

    def __init__(self) -> None:
        self.clock = MovableClock()
        self.connected: list[FakeBackend] = []
        self.fleet = Fleet(
            self._connect,
            clock=self.clock,
            store_root=STORE,
            store_path=lambda digest: STORE / digest[:2] / digest,
        )

    def _connect(self, replica: Replica) -> FakeBackend:
        self.connected.append(FakeBackend(replica))
        return self.connected[-1]

    async def sync(self, snapshot: Snapshot) -> list[LiveReplica]:
        """Follow the snapshot and find every replica well."""
        await self.fleet.sync(snapshot)
        await self.fleet.probe()
        live = self.fleet.live()
        assert all(r.state is ReplicaState.HEALTHY for r in live if r.backend.well)  # type: ignore[attr-defined]
        return live
