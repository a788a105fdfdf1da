"""A gateway, the fake replica behind it and the clients in front, fresh for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import Door, Gateway, StartGateway, StartUpstream, Workbench
from tests.waiting import wait_until


@pytest.fixture
def workbench(tmp_path: Path, sqlite_template: Path) -> Workbench:
    return Workbench(tmp_path, sqlite_template)


@pytest.fixture
def start_upstream() -> Iterator[StartUpstream]:
    """Start fake replicas; afterwards, whatever the gateway sent them was proper HTTP."""
    started: list[FakeUpstream] = []

    def start(*args: Any, **kwargs: Any) -> FakeUpstream:
        started.append(FakeUpstream(*args, **kwargs))
        return started[-1]

    yield start
    for upstream in started:
        upstream.close()
    assert [problem for upstream in started for problem in upstream.problems] == []


@pytest.fixture
def upstream(start_upstream: StartUpstream) -> FakeUpstream:
    return start_upstream()


@pytest.fixture
def door() -> Door:
    """As `loragate serve` listens; modules that look at the wire ask for the others too."""
    return "direct"


@pytest.fixture
def start_gateway(
    workbench: Workbench, start_upstream: StartUpstream, door: Door
) -> Iterator[StartGateway]:
    """Start gateways: `start_gateway(*replica_urls, **settings)`; `ready=False` does not wait.

    They end before the replicas do.
    """
    started: list[Gateway] = []

    def start(*replicas: str, ready: bool = True, **overrides: Any) -> Gateway:
        gateway = Gateway(workbench.settings(*replicas, **overrides), door)
        started.append(gateway)
        if ready:
            wait_until(gateway.ready)
        return gateway

    yield start
    for gateway in started:
        gateway.close()


@pytest.fixture
def gateway(start_gateway: StartGateway, upstream: FakeUpstream) -> Gateway:
    """A gateway with one pool of one replica, `upstream`."""
    return start_gateway(upstream.url)


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with gateway.openai_client() as client:
        yield client


@pytest.fixture
async def async_client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with gateway.async_openai_client() as client:
        yield client


@pytest.fixture
def pirate(gateway: Gateway, workbench: Workbench) -> str:
    """An adapter, registered and served, loaded nowhere yet."""
    gateway.register("pirate", workbench.adapter())
    return "pirate"
