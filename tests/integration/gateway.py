"""A real gateway on a real socket, beside the test: what every integration test talks to.

What comes in: settings. What goes out: its address, the real clients pointed at it, and the few
admin calls that most tests begin with. It runs as users run it, under uvicorn, on a loop of its
own; its rooms are never reached into.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import uvicorn
import uvloop

from app.api.direct import DirectProtocol
from app.main import create_app
from app.settings import PoolSettings, Settings
from tests.fakes.adapters import write_adapter, write_base
from tests.fakes.loops import LoopThread
from tests.fakes.upstream import FakeUpstream
from tests.waiting import until, wait_until

BASE = "tiny"

#: `loragate serve` gives uvicorn a protocol and a loop of its own choice; `uvicorn app.main:app`
#: has what comes with uvicorn. What a client sees must be the same.
Door = Literal["direct", "asgi"]
DOORS: tuple[Door, ...] = ("direct", "asgi")

StartGateway = Callable[..., "Gateway"]
StartUpstream = Callable[..., FakeUpstream]


class Gateway:
    """One running gateway. `client` is an admin's httpx client; `door` is how it listens."""

    def __init__(self, settings: Settings, door: Door = "direct") -> None:
        self.settings = settings
        direct = door == "direct"
        self._thread = LoopThread("gateway", uvloop.new_event_loop if direct else None)
        # Said to be TCP, as the address look-up would: else asyncio leaves Nagle's delay on.
        self._socket = socket.socket(proto=socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=20)
        self._sdks: list[openai.OpenAI] = []
        with _logging_kept():
            config = uvicorn.Config(
                create_app(settings),
                http=DirectProtocol if direct else "httptools",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        self._server = _Server(config)
        self._served: Future[None] = asyncio.run_coroutine_threadsafe(
            self._serve(), self._thread.loop
        )
        wait_until(lambda: self._server.started or self._served.done(), within_s=20)
        if self._served.done():
            self.close()
            raise RuntimeError("the gateway did not start; its log says why")

    def close(self) -> None:
        for client in (self.client, *self._sdks):
            client.close()
        self._server.should_exit = True
        self._served.result(timeout=20)
        self._socket.close()
        self._thread.close()

    async def _serve(self) -> None:
        # uvicorn ends the process when the app does not start; a test has others to run.
        with suppress(SystemExit):
            await self._server.serve(sockets=[self._socket])

    def openai_client(self, key: str = "unused", **options: Any) -> openai.OpenAI:
        """The real client. It repeats nothing, so that what a test sees happened once.

        It is closed with the gateway, if not before.
        """
        options = {"max_retries": 0, "timeout": 20} | options
        self._sdks.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options))
        return self._sdks[-1]

    def async_openai_client(self, key: str = "unused", **options: Any) -> openai.AsyncOpenAI:
        options = {"max_retries": 0, "timeout": 20} | options
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, **options)

    def ready(self) -> bool:
        return self.client.get("/readyz").status_code == 200

    def register(self, name: str, folder: Path, **fields: Any) -> dict[str, Any]:
        """Register an adapter, or the next version of a name that is taken; wait for it."""
        body = {"source": {"path": str(folder)}, **fields}
        answer = self.client.post("/admin/adapters", json={"name": name} | body)
        if answer.status_code == 409:
            answer = self.client.post(f"/admin/adapters/{name}/versions", json=body)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        model = f"/v1/models/{name}@{found['version']['number']}"
        wait_until(lambda: self.client.get(model).status_code == 200)
        return found

    def set_alias(self, name: str, alias: str, **target: Any) -> None:
        """Point an alias at a version, or at weighted targets."""
        answer = self.client.put(f"/admin/adapters/{name}/aliases/{alias}", json=target)
        assert answer.status_code == 200, answer.text

    def create_key(self, *scopes: str, **fields: Any) -> dict[str, Any]:
        """Create an API key and wait until the gateway knows it.

        The first one with the admin scope becomes this object's own: anonymous calls end there.
        """
        body = {"name": "test", "scopes": list(scopes), **fields}
        answer = self.client.post("/admin/keys", json=body)
        assert answer.status_code == 201, answer.text
        key: dict[str, Any] = answer.json()
        headers = {"authorization": f"Bearer {key['secret']}"}
        if "admin" in scopes and "authorization" not in self.client.headers:
            self.client.headers.update(headers)
        path = "/v1/models" if "inference" in scopes else "/admin/keys"
        wait_until(lambda: self.client.get(path, headers=headers).status_code == 200)
        return key


class _Server(uvicorn.Server):
    """uvicorn without its tenths of a second; a gateway that does not end is a failed test."""

    async def main_loop(self) -> None:
        while not self.should_exit:
            await self.on_tick(0)
            await asyncio.sleep(0.005)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        state = self.server_state
        await until(lambda: not (state.connections or state.tasks), within_s=10, every_s=0.005)
        await self.lifespan.shutdown()


class Workbench:
    """A folder for one test: adapters to register, a base to check them against, settings."""

    def __init__(self, root: Path, database: Path | None = None) -> None:
        """`database` is a migrated one to begin with a copy of."""
        self.root = root
        self.base = write_base(root / "base")
        self._written = 0
        self._database = root / "data" / "loragate.db" if database else None
        if database and self._database:
            self._database.parent.mkdir()
            shutil.copy(database, self._database)

    def adapter(self, **fields: Any) -> Path:
        """A new adapter folder; no two have the same weights unless `seed` says so."""
        self._written += 1
        fields = {"seed": self._written} | fields
        return write_adapter(self.root / "adapters" / str(self._written), **fields)

    def settings(self, *replicas: str, **overrides: Any) -> Settings:
        pool = PoolSettings.model_validate(
            {
                "name": "pool",
                "base_model": BASE,
                "base_model_path": self.base,
                "max_lora_rank": overrides.pop("max_lora_rank", 16),
                "replicas": replicas,
                "api_key": overrides.pop("replica_key", None),
            }
        )
        defaults: dict[str, Any] = {
            "data_dir": self.root / "data",
            "import_dirs": (self.root,),
            "pools": (pool,),
            "embedded": "off",
            "health_period_s": 0.1,
            "connect_timeout_s": 1.0,
            "access_log": "all",
        }
        if self._database and "data_dir" not in overrides:
            defaults["database_url"] = f"sqlite:///{self._database}"
        return Settings(**(defaults | overrides))


@contextmanager
def _logging_kept() -> Iterator[None]:
    """The app takes over the root logger, as it should; the tests' own handlers come back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
