"""Registration as a whole: from a source to a served version, or to nothing at all."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.backends.base import Backend
from app.clock import Clock, SystemClock
from app.control import adapters, intake, pools
from app.control.driver import Activator, Driver
from app.control.intake import ArchiveSource, PathSource, Source
from app.control.registration import Registration, register
from app.control.tasks.publish import Publish
from app.control.tasks.sweep import Sweep
from app.db.blobs import AdapterStore
from app.db.engine import Database
from app.domain import BaseModel, Replica
from app.errors import (
    AdapterRejected,
    BodyTooLarge,
    Conflict,
    InvalidRequest,
    LoragateError,
    NotFound,
)
from app.serving.fleet import Fleet
from app.serving.snapshot import Snapshots
from app.settings import Settings
from tests.contract.conftest import POSTGRES
from tests.contract.registry import FakeFleet
from tests.fakes.adapters import BASE_CONFIG, write_adapter
from tests.waiting import until

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Gateway:
    """What registration needs of a running gateway, and nothing more."""

    settings: Settings
    clock: Clock
    db: Database
    store: AdapterStore
    publish: Activator
    snapshots: Snapshots
    driver: Driver
    fleet: Fleet


async def opened(url: str, folder: Path, **more: object) -> Gateway:
    settings_ = Settings.model_validate(
        {"data_dir": folder / "data", "import_dirs": (folder / "import",), **more}
    )
    db, snapshots, clock = Database(url), Snapshots(), SystemClock()
    driver = Driver(clock)
    publish = driver.add("publish", Publish(db, snapshots, FakeFleet(), settings_).activate, 3600.0)
    store = AdapterStore(settings_.store_path)
    fleet = Fleet(nobody, clock=clock, store_root=store.root, store_path=store.path)
    async with db.begin() as session:
        for name in ("tiny", "large"):
            with suppress(Conflict):
                await pools.create(
                    session, clock, name=name, base=BaseModel(name, BASE_CONFIG), max_lora_rank=8
                )
    return Gateway(settings_, clock, db, store, publish, snapshots, driver, fleet)


def nobody(replica: Replica) -> Backend:
    raise AssertionError(f"no replica was registered, and {replica.id} is one")


@pytest.fixture
async def gateway(db_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    made = await opened(db_url, tmp_path)
    task = asyncio.get_running_loop().create_task(made.driver.run())
    await until(lambda: made.publish.status().runs)
    yield made
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await made.db.close()


def left(gateway: Gateway) -> tuple[list[str], int]:
    """The store's digests, and how much is in staging."""
    tmp = gateway.store.root / "tmp"
    return list(gateway.store.digests()), len(list(tmp.iterdir())) if tmp.is_dir() else 0


def outside(folder: Path) -> list[Path]:
    """Every file that is not the gateway's own."""
    return sorted(path for path in folder.rglob("*") if "data" not in path.parts)


def tar_of(folder: Path, *more: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
        for name in more:
            tar.addfile(tarfile.TarInfo(name))
    return out.getvalue()


def upload(raw: bytes, media_type: str = "application/x-tar", piece: int = 1000) -> ArchiveSource:
    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(raw), piece):
            yield raw[at : at + piece]

    return ArchiveSource(chunks(), media_type)


async def test_a_registered_adapter_is_served_when_the_answer_comes(
    gateway: Gateway, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "import" / "pirate")
    done = await register(gateway, Registration("pirate", PathSource(folder), "tiny"))
    assert (done.created, done.version.model, done.version.rank) == (True, "pirate@1", 4)
    assert done.version.source == f"path:{folder}"
    assert done.version.target_modules == ("q_proj", "v_proj")
    served = gateway.snapshots.current.adapters["pirate"].versions[1]
    assert served.digest == done.version.digest
    kept = gateway.store.path(served.digest)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (kept / name).read_bytes() == (folder / name).read_bytes()
    again = await register(gateway, Registration("pirate", PathSource(folder), create=False))
    assert (again.created, again.version.number) == (False, 1)
    uploaded = await register(gateway, Registration("pirate", upload(tar_of(folder))))
    assert (uploaded.created, uploaded.version.number) == (False, 1)
    assert left(gateway) == ([served.digest], 0)


async def test_the_base_is_the_one_the_config_names(gateway: Gateway, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "import" / "a", base="large")
    done = await register(gateway, Registration("a", PathSource(folder)))
    assert done.version.base_model == "large"
    folder = write_adapter(tmp_path / "import" / "b", base="unheard-of")
    with pytest.raises(InvalidRequest, match="unheard-of"):
        await register(gateway, Registration("b", PathSource(folder)))
    with pytest.raises(AdapterRejected, match="base_model_name_or_path"):
        await register(gateway, Registration("b", PathSource(folder), base_model="tiny"))
    with pytest.raises(NotFound, match="unheard-of"):
        await register(gateway, Registration("b", PathSource(folder), base_model="unheard-of"))


async def test_what_needs_no_bytes_is_refused_without_reading_any(
    gateway: Gateway, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "import" / "pirate")
    await register(gateway, Registration("pirate", PathSource(folder), "tiny"))

    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    for name, base, create, error in (
        ("pirate", None, True, Conflict),
        ("haiku", "tiny", False, NotFound),
        ("haiku", "missing", True, NotFound),
        ("not a name", "tiny", True, InvalidRequest),
    ):
        source = ArchiveSource(never(), "application/x-tar")
        with pytest.raises(error):
            await register(gateway, Registration(name, source, base, create=create))


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: upload(b"noise"),
        lambda folder: upload(tar_of(folder, "../escape")),
        lambda folder: upload(tar_of(folder, "evil.bin")),
        lambda folder: upload(tar_of(folder)[:-5000]),
        lambda folder: upload(tar_of(folder), "application/zip"),
        lambda folder: PathSource(folder / "missing"),
        lambda folder: PathSource(folder.parent.parent),
        lambda folder: PathSource(write_adapter(folder, rank=16)),
    ],
)
async def test_a_refusal_leaves_nothing(
    gateway: Gateway, tmp_path: Path, make: Callable[[Path], Source]
) -> None:
    folder = write_adapter(tmp_path / "import" / "pirate")
    before = outside(tmp_path)
    with pytest.raises(LoragateError):
        await register(gateway, Registration("pirate", make(folder), "tiny"))
    assert left(gateway) == ([], 0)
    assert outside(tmp_path) == before
    async with gateway.db.read() as session:
        assert (await adapters.list_(session)).data == ()


async def test_an_endless_upload_ends(db_url: str, tmp_path: Path) -> None:
    gateway = await opened(db_url, tmp_path, max_adapter_bytes=1 << 20)

    async def endless() -> AsyncGenerator[bytes, None]:
        while True:
            yield bytes(1 << 20)

    body = endless()
    source = ArchiveSource(body, "application/x-tar")
    with pytest.raises(BodyTooLarge):
        await register(gateway, Registration("pirate", source, "tiny"))
    await body.aclose()
    assert left(gateway) == ([], 0)
    await gateway.db.close()


async def test_a_client_that_leaves_leaves_nothing(gateway: Gateway, tmp_path: Path) -> None:
    raw = tar_of(write_adapter(tmp_path / "import" / "pirate"))
    waiting = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield raw[:2000]
        waiting.set()
        await asyncio.Event().wait()

    source = ArchiveSource(half(), "application/x-tar")
    task = asyncio.get_running_loop().create_task(
        register(gateway, Registration("pirate", source, "tiny"))
    )
    await waiting.wait()
    assert left(gateway) == ([], 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left(gateway) == ([], 0)


async def test_a_registration_cancelled_anywhere_is_whole_or_not_there(
    gateway: Gateway, tmp_path: Path
) -> None:
    raw = tar_of(write_adapter(tmp_path / "import" / "pirate"))
    loop = asyncio.get_running_loop()
    for turns in range(0, 60, 3):
        task = loop.create_task(register(gateway, Registration("pirate", upload(raw), "tiny")))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        digests, staged = left(gateway)
        assert staged == 0
        async with gateway.db.read() as session:
            for view in (await adapters.list_(session)).data:
                assert {version.digest for version in view.versions} <= set(digests)


async def test_a_crash_between_files_and_row_leaves_an_orphan_that_is_swept(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "import" / "pirate")

    async def crash(*_: object, **__: object) -> None:
        raise RuntimeError("the database is gone")

    with monkeypatch.context() as patched:
        patched.setattr(adapters, "register", crash)
        with pytest.raises(RuntimeError):
            await register(gateway, Registration("pirate", PathSource(folder), "tiny"))
    assert len(left(gateway)[0]) == 1
    sweep = Sweep(gateway.db, gateway.store, older_than_s=0)
    assert (await sweep.activate())["orphans"] == 1
    assert left(gateway) == ([], 0)
    done = await register(gateway, Registration("pirate", PathSource(folder), "tiny"))
    assert (await sweep.activate())["orphans"] == 0
    assert left(gateway)[0] == [done.version.digest]


@pytest.mark.parametrize("dialect", ["sqlite", POSTGRES])
async def test_two_gateways_registering_at_once_get_numbers_of_their_own(
    dialect: str, new_database: Callable[[str], str], tmp_path: Path
) -> None:
    url = new_database(dialect)
    gateways = [await opened(url, tmp_path) for _ in range(3)]
    folders = [write_adapter(tmp_path / "import" / f"{n}", seed=n) for n in range(12)]

    async def one(n: int) -> int:
        request = Registration("pirate", PathSource(folders[n]), "tiny")
        return (await register(gateways[n % 3], request)).version.number

    numbers = await asyncio.gather(*(one(n) for n in range(12)))
    assert sorted(numbers) == list(range(1, 13))
    async with gateways[0].db.read() as session:
        view = await adapters.show(session, "pirate")
    assert view.latest == 12
    assert left(gateways[0])[1] == 0
    for gateway in gateways:
        await gateway.db.close()


@pytest.mark.parametrize("dialect", ["sqlite", POSTGRES])
async def test_only_one_of_many_creates(
    dialect: str, new_database: Callable[[str], str], tmp_path: Path
) -> None:
    url = new_database(dialect)
    gateways = [await opened(url, tmp_path) for _ in range(2)]
    folder = write_adapter(tmp_path / "import" / "pirate")
    requests = [Registration("pirate", PathSource(folder), "tiny", create=True)] * 6
    outcomes = await asyncio.gather(
        *(register(gateways[n % 2], request) for n, request in enumerate(requests)),
        return_exceptions=True,
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert len(refused) == 5
    assert all(isinstance(error, Conflict) for error in refused)
    for gateway in gateways:
        await gateway.db.close()


REGISTER_FOREVER = """
import asyncio, itertools, sys
from pathlib import Path
from tests.contract.test_registry_intake import opened
from tests.fakes.adapters import write_adapter
from app.control.intake import PathSource
from app.control.registration import Registration, register

async def main(url, folder):
    gateway = await opened(url, folder)
    for n in itertools.count():
        source = PathSource(write_adapter(folder / "import" / f"{n}", seed=n))
        done = await register(gateway, Registration(f"a{n % 3}", source, "tiny"))
        print(done.version.model, done.version.digest, flush=True)

asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
"""


def killed_after(count: int, url: str, folder: Path) -> list[list[str]]:
    """The registrations a process acknowledged before it was killed in the middle of another."""
    process = subprocess.Popen(
        [sys.executable, "-c", REGISTER_FOREVER, url, str(folder)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as lines:
        acknowledged = [lines.readline() for _ in range(count)]
        process.send_signal(signal.SIGKILL)
        acknowledged += lines.readlines()
    process.wait()
    return [line.split() for line in acknowledged if line.endswith("\n")]


@pytest.mark.parametrize("dialect", ["sqlite", POSTGRES])
@pytest.mark.parametrize("after", [1, 7, 20])
async def test_kill_9_leaves_every_acknowledged_registration_whole(
    dialect: str, after: int, new_database: Callable[[str], str], tmp_path: Path
) -> None:
    url = new_database(dialect)
    acknowledged = killed_after(after, url, tmp_path)
    gateway = await opened(url, tmp_path)
    digests = set(gateway.store.digests())
    async with gateway.db.read() as session:
        views = (await adapters.list_(session)).data
    found = {version.model: version.digest for view in views for version in view.versions}
    assert all(found.get(model) == digest for model, digest in acknowledged)
    assert set(found.values()) <= digests
    for digest in digests:  # whole, the orphan too, if there is one
        with gateway.store.staging() as folder:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (folder / name).write_bytes((gateway.store.path(digest) / name).read_bytes())
            assert gateway.store.commit(folder) == digest
    await Sweep(gateway.db, gateway.store, older_than_s=0).activate()
    assert left(gateway) == (sorted(found.values()), 0)
    await gateway.db.close()


@given(raw=st.binary(max_size=3000), media_type=st.sampled_from(["x-tar", "gzip", "zip"]))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_no_upload_does_anything_but_fail(
    gateway: Gateway, raw: bytes, media_type: str
) -> None:
    source = upload(raw, f"application/{media_type}")
    with pytest.raises(LoragateError) as caught:
        await register(gateway, Registration("pirate", source, "tiny"))
    json.dumps(str(caught.value))
    assert left(gateway) == ([], 0)


def test_the_largest_config_is_bounded(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    (folder / "adapter_config.json").write_bytes(b" " * (intake.MAX_CONFIG_BYTES + 1))
    with pytest.raises(AdapterRejected, match=str(intake.MAX_CONFIG_BYTES)):
        intake._inspect(folder, [], lambda: None)
