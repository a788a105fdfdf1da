"""Every test of the wire runs on asyncio's own loop and on uvloop: their transports differ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvloop

from app.backends.wire import Client, Limits
from tests.unit.backends.peer import Script, Server


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def loop_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def asyncio_runner(loop_kind: str) -> Iterator[asyncio.Runner]:
    """A loop of each kind for a test; fails the test that leaves a task behind."""
    factory = uvloop.new_event_loop if loop_kind == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner
        left = asyncio.all_tasks(runner.get_loop())
    assert not left


@pytest.fixture
async def serve() -> AsyncIterator[Any]:
    """`await serve(script)` starts a server; `serve.client(…)` a client of the last one."""
    started = Serving()
    yield started
    await started.close()


class Serving:
    """The servers and clients of one test."""

    def __init__(self) -> None:
        self.servers: list[Server] = []
        self.clients: list[Client] = []

    async def __call__(self, script: Script) -> Server:
        self.servers.append(Server(script))
        await self.servers[-1].start()
        return self.servers[-1]

    def client(self, server: Server | None = None, **limits: Any) -> Client:
        port = (server or self.servers[-1]).port
        client = Client("127.0.0.1", port, name="replica:1", limits=Limits(**limits))
        self.clients.append(client)
        return client

    async def close(self) -> None:
        for client in self.clients:
            client.close()
        for server in self.servers:
            await server.close()
