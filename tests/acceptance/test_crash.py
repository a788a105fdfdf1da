"""kill -9 of the gateway: what it said was registered is there and whole; nothing is half there."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import httpx
import pytest

from tests.acceptance.conftest import Serve, Served
from tests.fakes.adapters import write_adapter
from tests.fakes.upstream import FakeUpstream
from tests.waiting import wait_until

FILES = ("adapter_config.json", "adapter_model.safetensors")


class Registrations:
    """Registers adapters, and versions of one, from several threads until the gateway is gone."""

    def __init__(self, served: Served, folder: Path, numbers: count[int]) -> None:
        self.acknowledged: dict[str, Path] = {}
        self.unexpected: list[str] = []
        self._served = served
        self._folder = folder
        self._numbers = numbers
        self._lock = threading.Lock()

    def run(self) -> None:
        with self._served.client() as client:
            while self._one(client):
                pass

    def _one(self, client: httpx.Client) -> bool:
        with self._lock:
            number = next(self._numbers)
        source = write_adapter(self._folder / str(number), seed=number)
        body = {"source": {"path": str(source)}}
        try:
            if number % 3:
                answer = client.post("/admin/adapters", json=body | {"name": f"a{number}"})
            else:
                answer = client.post("/admin/adapters/line/versions", json=body)
        except httpx.TransportError:
            return False
        if answer.status_code != 201:
            self.unexpected.append(answer.text)
            return False
        version = answer.json()["version"]
        with self._lock:
            self.acknowledged[f"{version['adapter']}@{version['number']}"] = source
        return True


def test_kill_9_during_registrations_and_under_load(
    serve: Serve, upstream: FakeUpstream, pool: dict[str, object], tmp_path: Path
) -> None:
    served = serve(**pool)
    served.start()
    numbers = count(1)
    acknowledged: dict[str, Path] = {}
    first = write_adapter(tmp_path / "sources" / "first", seed=-1)
    served.register("line", first)
    acknowledged["line@1"] = first
    for wanted in (4, 9, 17):
        registrations = Registrations(served, tmp_path / "sources", numbers)
        with ThreadPoolExecutor(5) as pool_of_threads:
            for _ in range(3):
                pool_of_threads.submit(registrations.run)
            for _ in range(2):
                pool_of_threads.submit(_load, served)
            wait_until(lambda r=registrations, n=wanted: len(r.acknowledged) >= n, within_s=60)  # type: ignore[misc]
            served.process.kill()
        assert registrations.unexpected == []
        acknowledged |= registrations.acknowledged
        _age(served.data_dir / "store")
        served.start()
        _check(served, upstream, acknowledged)


def test_kill_9_during_an_upload_leaves_nothing(
    serve: Serve, pool: dict[str, object], upstream: FakeUpstream
) -> None:
    served = serve(**pool)
    served.start()
    started = threading.Event()

    def endless() -> object:
        while True:
            started.set()
            yield b"\0" * 65536

    def upload() -> None:
        headers = {"content-type": "application/x-tar"}
        path = f"{served.url}/admin/adapters?name=upload"
        with pytest.raises(httpx.TransportError):
            httpx.post(path, content=endless(), headers=headers, timeout=30)  # type: ignore[arg-type]

    with ThreadPoolExecutor(1) as pool_of_threads:
        uploading = pool_of_threads.submit(upload)
        assert started.wait(10)
        store = served.data_dir / "store"
        wait_until(lambda: any(path.is_file() for path in store.rglob("*")) or uploading.done())
        served.process.kill()
        uploading.result()
    served.start()
    assert httpx.get(f"{served.url}/admin/adapters").json()["data"] == []
    assert not list(store.glob("??/*"))


def test_kill_9_of_the_gateway_does_not_lose_keys(
    serve: Serve, pool: dict[str, object], upstream: FakeUpstream
) -> None:
    served = serve(**pool)
    served.start()
    body = {"name": "first", "scopes": ["admin", "inference"]}
    secret = httpx.post(f"{served.url}/admin/keys", json=body).json()["secret"]
    served.process.kill()
    served.start()
    headers = {"authorization": f"Bearer {secret}"}
    assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{served.url}/v1/models").status_code == 401


def _load(served: Served) -> None:
    """Inference beside the registrations, until the gateway is gone."""
    payload = {"model": "line", "prompt": "hi"}
    with served.client() as client:
        while True:
            try:
                client.post("/v1/completions", json=payload)
            except httpx.TransportError:
                return


def _check(served: Served, upstream: FakeUpstream, acknowledged: dict[str, Path]) -> None:
    """Every acknowledged version is listed and served from the bytes that were given.

    Others may be there too, whose answer was lost on the way, but whole as well.
    """
    with served.client() as client:
        listed: dict[str, str] = {}
        after = ""
        while True:
            page = client.get(f"/admin/adapters?limit=100{after}").json()
            for adapter in page["data"]:
                listed |= {v["model"]: v["digest"] for v in adapter["versions"]}
            if not page["has_more"]:
                break
            after = f"&after={page['next_after']}"
        assert acknowledged.keys() <= listed.keys()
        store = served.data_dir / "store"
        for model, digest in listed.items():
            kept = store / digest[:2] / digest
            assert sorted(path.name for path in kept.iterdir()) == list(FILES), model
            if model in acknowledged:
                assert _hashes(kept) == _hashes(acknowledged[model]), model
        # What the crash left beside them is collected, once it is too old to be wanted.
        wait_until(lambda: {path.name for path in store.glob("??/*")} == set(listed.values()))
        wait_until(lambda: list((store / "tmp").iterdir()) == [])
        for model in sorted(listed)[:: max(1, len(listed) // 10)]:
            answer = client.post("/v1/completions", json={"model": model, "prompt": "hi"})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == model
            loaded = Path(upstream.engine.adapters[model])
            assert loaded.name == listed[model]


def _age(store: Path) -> None:
    """Let time pass for everything in the store: nobody is registering it any more."""
    two_hours_ago = time.time() - 7200
    for path in (store, *store.rglob("*")):
        os.utime(path, (two_hours_ago, two_hours_ago))


def _hashes(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES]
