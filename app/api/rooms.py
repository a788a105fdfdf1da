"""What lifespan opened, handed to whoever answers a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from app.clock import Clock
from app.control.driver import Activator, Driver
from app.control.fine_tuning import AskTrainer
from app.control.tasks.expire_jobs import ExpireJobs
from app.db.blobs import AdapterStore
from app.db.engine import Database
from app.db.file_store import FileStore
from app.domain import Trainer
from app.jobs.runner import Runner
from app.serving.fleet import Fleet
from app.serving.meter import Meter
from app.serving.request_path import Serving
from app.serving.snapshot import Snapshots
from app.settings import Settings


@dataclass(frozen=True, slots=True)
class Rooms:
    """The open rooms of a running gateway."""

    settings: Settings
    clock: Clock
    db: Database
    store: AdapterStore
    files: FileStore
    snapshots: Snapshots
    fleet: Fleet
    meter: Meter
    request_path: Serving
    driver: Driver
    publish: Activator
    reap: Activator
    runner: Runner
    trainers: Mapping[str, Trainer]
    ask_trainer: AskTrainer
    expire_jobs: ExpireJobs
