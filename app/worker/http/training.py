"""What the training routes share: the runs, the tokenizer, and who may ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from app.clock import SystemClock
from app.settings import Settings
from app.worker.samplers.engine import Engine
from app.worker.samplers.tokens import Tokens
from app.worker.trainers.base import Trainer
from app.worker.trainers.messages import Bounds
from app.worker.trainers.perform import Performer
from app.worker.trainers.runs import Runs
from app.worker.trainers.states import States

T = TypeVar("T")


@dataclass(slots=True)
class Training:
    """The runs of one worker. Rendering has a thread of its own, and waits for nobody's disk."""

    runs: Runs
    tokens: Tokens
    renderer: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="render")
    )

    async def aside(self, work: Callable[[], T]) -> T:
        """Do what would keep the event loop too long."""
        return await asyncio.get_running_loop().run_in_executor(self.renderer, work)


@asynccontextmanager
async def training_with(
    trainer: Trainer, sampler: Engine, settings: Settings, base_model: str
) -> AsyncIterator[Training]:
    """The runs of a worker that also samples, as long as it serves."""
    bounds = Bounds(trainer.facts.max_length, sampler.limits.vocab_size)
    states = States(settings.runs_path)
    runs = Runs(
        Performer(trainer, states, bounds, sampler),
        SystemClock(),
        base_model=base_model,
        max_runs=settings.worker_max_runs,
        max_rank=settings.worker_max_lora_rank,
        save_s=settings.drain_timeout_s,
    )
    await runs.start()
    training = Training(runs, sampler.tokens)
    try:
        yield training
    finally:
        await runs.stop()
        training.renderer.shutdown(wait=False, cancel_futures=True)


def training(request: Request) -> Training:
    found: Training = request.state.training
    return found
