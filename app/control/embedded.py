"""The embedded default: with no pool at all, a worker with the demo model as a supervised child.

What comes in: the settings and an empty registry. What goes out: a pool of one replica, and a
process that is started again, with back-off, whenever it ends. The gateway never imports torch:
the child is another program.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from importlib.util import find_spec

from app import demo
from app.clock import Clock
from app.control import declared, pools
from app.control.backends import Embedded
from app.control.intake import PathSource
from app.control.registration import Registration, Rooms, register
from app.db.engine import Database
from app.domain import Trainer
from app.settings import PoolSettings, Settings, child_environment
from app.telemetry import Event, log

logger = logging.getLogger(__name__)

POOL = "embedded"
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 30.0
#: A child that ran this long was well; the next failure starts from the shortest back-off.
_WELL_S = 60.0
#: What a worker may need to end beyond the time in which it saves what it trains.
_STOP_S = 10.0


class EmbeddedWorker:
    """A worker process on a socket that outlives it.

    The parent listens and hands the socket down, so the replica's address never changes, and a
    request that meets a restart waits in the socket's queue instead of being refused.
    """

    def __init__(self, settings: Settings, clock: Clock, plan: Embedded) -> None:
        self._settings = settings
        self._plan = plan
        self._clock = clock
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    @property
    def pool(self) -> PoolSettings:
        """The pool this worker is the one replica of."""
        return PoolSettings(
            name=POOL,
            base_model=self._plan.base_model,
            base_model_path=self._settings.worker_model or demo.MODEL_DIR,
            served_name=self._plan.base_model,
            max_lora_rank=self._settings.worker_max_lora_rank,
            max_loras=self._settings.worker_max_loras,
            replicas=(self.url,),
        )

    @property
    def trainer(self) -> Trainer | None:
        """This worker as a trainer, if it is one."""
        plan = self._plan
        if plan.trains is None:
            return None
        return Trainer(POOL, plan.trains, plan.base_model, self.url, plan.max_jobs)

    async def run(self) -> None:
        """Keep a child running until cancelled; then end it and wait for it."""
        backoff_s = _FIRST_BACKOFF_S
        try:
            while True:
                started = self._clock.monotonic()
                code = await self._run_child()
                lived_s = self._clock.monotonic() - started
                if lived_s > _WELL_S:
                    backoff_s = _FIRST_BACKOFF_S
                log(
                    logger,
                    logging.ERROR,
                    Event.WORKER_EXITED,
                    code=code,
                    lived_s=round(lived_s, 1),
                    restart_in_s=backoff_s,
                )
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, _MAX_BACKOFF_S)
        finally:
            await self._stop()
            self._socket.close()

    async def _run_child(self) -> int:
        fd = self._socket.fileno()
        # The pipe on its standard input is how the child learns that this process is gone,
        # even by SIGKILL; it then ends itself.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "app.worker.main",
            "--fd",
            str(fd),
            "--exit-with-stdin",
            env=child_environment(self._settings),
            pass_fds=(fd,),
            stdin=asyncio.subprocess.PIPE,
        )
        log(logger, logging.INFO, Event.WORKER_STARTED, pid=self._process.pid, url=self.url)
        return await self._process.wait()

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s + _STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def wanted(plan: Embedded | None, db: Database) -> bool:
    """Whether to run the embedded worker: nobody set up a pool, and its parts are installed."""
    if plan is None:
        return False
    if plan.samples:
        async with db.read() as session:
            if any(view.pool.name != POOL for view in await pools.list_(session)):
                return False
    if find_spec("torch") is None or find_spec("peft") is None:
        log(
            logger,
            logging.WARNING,
            Event.GATEWAY_NO_POOL,
            hint="no pool is set up: `loragate pools add` adds one, and "
            "`pip install 'loragate[worker]'` brings the demo worker",
        )
        return False
    return True


async def declare_pool(worker: EmbeddedWorker, db: Database, clock: Clock) -> bool:
    """Make the registry's embedded pool the one of this worker; True the first time."""
    async with db.begin() as session:
        first = all(view.pool.name != POOL for view in await pools.list_(session))
        await declared.declare(session, clock, worker.pool)
    return first


async def retire(db: Database, settings: Settings) -> None:
    """Forget the worker of an earlier start: its address may be anybody's by now.

    A pool of this name in the settings has taken the base over, and other replicas.
    """
    if any(pool.name == POOL for pool in settings.pools):
        return
    async with db.begin() as session:
        if any(view.pool.name == POOL for view in await pools.list_(session)):
            for view in await pools.list_replicas(session, POOL):
                await pools.remove_replica(session, view.replica.id, force=True)


async def seed(rooms: Rooms) -> None:
    """Register the demo adapters."""
    for name, folder in demo.ADAPTERS.items():
        source = PathSource(folder, roots=(folder,))
        await register(rooms, Registration(name, source, base_model=demo.BASE_NAME))
