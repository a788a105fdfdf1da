"""Opens the rooms in order and closes them in reverse. Read top to bottom, this is startup."""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from typing import TypedDict

from fastapi import FastAPI

from app import demo
from app.api import inference
from app.api.rooms import Rooms
from app.backends.base import Backend
from app.backends.megatron import MegatronBackend
from app.backends.vllm import VllmBackend
from app.backends.wire import Limits
from app.clock import Clock, SystemClock
from app.control import backends, embedded, trainers
from app.control.backends import Embedded
from app.control.declared import sync_declared
from app.control.driver import Driver
from app.control.probes import probe_of
from app.control.tasks import (
    collect_files,
    expire_jobs,
    place,
    sweep,
    tidy_payloads,
    tidy_runs,
)
from app.control.tasks.collect_files import CollectFiles
from app.control.tasks.expire_jobs import ExpireJobs
from app.control.tasks.flush_usage import FlushUsage
from app.control.tasks.place import Place
from app.control.tasks.publish import Publish
from app.control.tasks.reap import Reap
from app.control.tasks.sweep import Sweep
from app.control.tasks.tidy_payloads import TidyPayloads
from app.control.tasks.tidy_runs import TidyRuns
from app.db.blobs import AdapterStore
from app.db.engine import Database, database_url
from app.db.file_store import FileStore
from app.domain import AdapterVersion, Dialect, JobKind, Probe, Replica
from app.handlers.fine_tune import FineTune
from app.handlers.train_op import TrainOp
from app.jobs.runner import Handler, Runner
from app.serving.batches import Batches
from app.serving.coalesce import Coalescer
from app.serving.fleet import Fleet
from app.serving.forward import Forwarder
from app.serving.meter import Meter
from app.serving.request_path import RequestPath
from app.serving.snapshot import Snapshots
from app.settings import BackendSettings, Settings
from app.telemetry import Event, log
from app.training.trainers import TrainerClient

logger = logging.getLogger(__name__)


_FIRST_PROBE_S = 1.0
#: Samples that need no trainer, at once, over all gateways.
_OPS_WITHOUT_TRAINER = 64


class State(TypedDict):
    """What a request finds in its scope."""

    rooms: Rooms


def lifespan(settings: Settings) -> Callable[[FastAPI], AbstractAsyncContextManager[State]]:
    """The lifespan of a gateway with these settings."""

    @asynccontextmanager
    async def opened(_: FastAPI) -> AsyncIterator[State]:
        async with AsyncExitStack() as stack:
            yield {"rooms": await _open(stack, settings)}
            log(logger, logging.INFO, Event.GATEWAY_STOPPING)

    return opened


async def _open(stack: AsyncExitStack, settings: Settings) -> Rooms:
    combination = backends.combine(BackendSettings(), settings)
    clock = SystemClock()
    db = Database(database_url(settings))
    stack.push_async_callback(db.close)
    await db.prepare()
    async with db.read() as session:
        combination = await backends.in_registry(session, combination)
    declared = {"pools": combination.pools, "trainers": combination.trainers}
    settings = settings.model_copy(update=declared)
    store = AdapterStore(settings.store_path, clock)
    files = FileStore(settings.files_path, clock)

    snapshots = Snapshots()
    meter = Meter()
    fleet = Fleet(
        _connect(settings),
        clock=clock,
        store_root=store.root,
        store_path=store.path,
        find_probe=partial(_find_probe, db),
    )
    await stack.enter_async_context(fleet)

    forwarder = Forwarder(fleet, clock)
    batches = Batches(forwarder, fleet, meter)
    coalescer = None
    if settings.coalesce:
        coalescer = await stack.enter_async_context(Coalescer(forwarder, batches, meter))

    driver = Driver(clock)
    publish = Publish(db, snapshots, fleet, settings)
    flush = FlushUsage(db, meter, clock)
    probe = driver.add("probe", fleet.probe, settings.health_period_s)
    fleet.on_change = probe.wake
    placing = Place(fleet, snapshots, clock, grace_s=settings.unload_grace_s)
    driver.add("place", placing.activate, place.PERIOD_S)
    driver.add("flush_usage", flush.activate, settings.flush_usage_period_s)
    driver.add("sweep", Sweep(db, store).activate, sweep.PERIOD_S)
    collect = CollectFiles(db, files, clock)
    driver.add("collect_files", collect.activate, collect_files.PERIOD_S)
    known = trainers.declared(settings)
    worker = await _embedded_worker(combination.embedded, settings, db, clock)
    if worker is not None and worker.trainer is not None:
        known = {**known, worker.trainer.name: worker.trainer}
    handlers: dict[JobKind, Handler] = {}
    runner = Runner(
        db,
        clock,
        handlers,
        {None: _OPS_WITHOUT_TRAINER, **{each.name: each.max_jobs for each in known.values()}},
        token=secrets.token_hex(16),
        lease_s=settings.lease_s,
    )
    expiring = ExpireJobs(db, clock, runner.wake)
    driver.add("expire_jobs", expiring.activate, expire_jobs.PERIOD_S)
    rooms = Rooms(
        settings=settings,
        clock=clock,
        db=db,
        store=store,
        files=files,
        snapshots=snapshots,
        fleet=fleet,
        meter=meter,
        request_path=RequestPath(forwarder, batches, coalescer, meter),
        driver=driver,
        publish=driver.add("publish", publish.activate, settings.publish_period_s),
        reap=driver.add(
            "reap", Reap(db, store, fleet, clock, settings).activate, settings.reap_period_s
        ),
        runner=runner,
        trainers=known,
        ask_trainer=trainers.ask,
        expire_jobs=expiring,
    )
    handlers[JobKind.FINE_TUNE] = FineTune(rooms, TrainerClient)
    handlers[JobKind.TRAIN_OP] = TrainOp(rooms, TrainerClient)
    tidying = TidyRuns(db, known, TrainerClient)
    driver.add("tidy_runs", tidying.activate, tidy_runs.PERIOD_S)
    driver.add("tidy_payloads", TidyPayloads(db).activate, tidy_payloads.PERIOD_S)

    async with db.begin() as session:
        await sync_declared(session, settings, clock)
    first = False
    if worker is not None and combination.embedded is not None and combination.embedded.samples:
        first = await embedded.declare_pool(worker, db, clock)
    else:
        await embedded.retire(db, settings)
    await publish.activate()
    with suppress(TimeoutError):  # a replica that hangs must not hold up the others' gateway
        async with asyncio.timeout(_FIRST_PROBE_S):
            await fleet.probe()

    stack.push_async_callback(flush.activate)  # the last counts, once nothing runs any more
    await _keep_running(stack, driver.run(), "driver")
    if worker is not None:
        if first and combination.base_model == demo.BASE_NAME:
            await embedded.seed(rooms)
        await _keep_running(stack, worker.run(), "embedded worker")
    await _keep_running(stack, runner.run(), "runner")
    gc.collect()
    gc.freeze()  # what is here now stays: keep it out of every later collection
    _announce(rooms)
    return rooms


async def _embedded_worker(
    plan: Embedded | None, settings: Settings, db: Database, clock: Clock
) -> embedded.EmbeddedWorker | None:
    if plan is None or not await embedded.wanted(plan, db):
        return None
    return embedded.EmbeddedWorker(settings, clock, plan)


async def _find_probe(db: Database, version: AdapterVersion) -> Probe | None:
    async with db.read() as session:
        return await probe_of(session, version.adapter, version.number)


def _connect(settings: Settings) -> Callable[[Replica], Backend]:
    limits = Limits(
        connections=settings.max_connections_per_replica,
        connect_s=settings.connect_timeout_s,
        first_byte_s=settings.first_byte_timeout_s,
        idle_s=settings.idle_timeout_s,
    )

    drivers: dict[Dialect, Callable[..., Backend]] = {
        Dialect.VLLM: VllmBackend,
        Dialect.MEGATRON: MegatronBackend,
    }

    def connect(replica: Replica) -> Backend:
        return drivers[replica.dialect](
            replica.url, api_key=replica.api_key, limits=limits, load_s=settings.load_timeout_s
        )

    return connect


async def _keep_running(
    stack: AsyncExitStack, job: Coroutine[object, object, None], name: str
) -> None:
    """Run a job until the stack closes; the stack then cancels it and sees it end."""
    task = asyncio.get_running_loop().create_task(job, name=name)

    async def end() -> None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    stack.push_async_callback(end)


def _announce(rooms: Rooms) -> None:
    snapshot = rooms.snapshots.current
    log(
        logger,
        logging.INFO,
        Event.GATEWAY_STARTED,
        compiled=str(inference.__file__).endswith(tuple(EXTENSION_SUFFIXES)),
        adapters=len(snapshot.adapters),
        pools=sorted(snapshot.pools),
        replicas={replica.url: replica.state.value for replica in rooms.fleet.live()},
    )
    if snapshot.anonymous is not None:
        log(
            logger,
            logging.WARNING,
            Event.GATEWAY_ANONYMOUS,
            hint="no key was created yet: anyone on this machine may do anything; "
            "`loragate keys create` ends that",
        )
