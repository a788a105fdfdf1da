"""Gateways as users run them: `loragate serve` in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.fakes.upstream import FakeUpstream
from tests.processes import LORAGATE, Process, free_port
from tests.waiting import wait_until


@dataclass
class Served:
    """One `loragate serve`, which can be killed and started again with what it kept."""

    process: Process
    url: str
    data_dir: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def start(self, within_s: float = 60) -> None:
        self.process.start()
        self.wait_ready(within_s)

    def wait_ready(self, within_s: float = 60) -> None:
        self.process.wait_http(f"{self.url}/readyz", within_s)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30)

    def openai_client(self, **options: Any) -> openai.OpenAI:
        options = {"max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", **options)

    def register(self, name: str, folder: Path, **fields: Any) -> dict[str, Any]:
        body = {"name": name, "source": {"path": str(folder)}, **fields}
        answer = httpx.post(f"{self.url}/admin/adapters", json=body, timeout=30)
        assert answer.status_code == 201, answer.text
        model = f"{self.url}/v1/models/{name}"
        wait_until(lambda: httpx.get(model).status_code == 200)
        found: dict[str, Any] = answer.json()
        return found


Serve = Callable[..., Served]


def served_by(log: Path, *options: str, data_dir: Path, **settings: Any) -> Served:
    """A gateway that is not started yet, on a port of its own."""
    settings = {"port": free_port(), "data_dir": data_dir} | settings
    env = {f"LORAGATE_{name.upper()}": _text(value) for name, value in settings.items()}
    process = Process([LORAGATE, "serve", *options], log=log, env=env)
    return Served(process, f"http://127.0.0.1:{settings['port']}", data_dir)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Prepare gateways: `serve(**settings)`; nothing runs before `start`."""
    prepared: list[Served] = []

    def prepare(**settings: Any) -> Served:
        settings = {"data_dir": tmp_path / "data", "import_dirs": tmp_path} | settings
        prepared.append(served_by(tmp_path / f"gateway-{len(prepared)}.log", **settings))
        return prepared[-1]

    yield prepare
    for served in prepared:
        served.process.kill()


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    upstream = FakeUpstream()
    yield upstream
    upstream.close()
    # A gateway killed inside a request leaves half of one; nothing else may be wrong.
    cut = ("connection closed inside", "IncompleteReadError")
    assert [p for p in upstream.problems if not any(words in p for words in cut)] == []


@pytest.fixture
def pool(upstream: FakeUpstream) -> dict[str, Any]:
    """Settings of a gateway in front of `upstream`."""
    declared = {"name": "pool", "base_model": "tiny", "max_lora_rank": 16}
    return {"pools": [declared | {"replicas": [upstream.url]}], "embedded": "off"}


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else str(value)
