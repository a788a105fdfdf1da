"""The training workers of this gateway: who they are, and what they say of themselves.

What comes in: settings, or a trainer. What goes out: `domain.Trainer`s by name, and what a worker
answers about itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from app.control.backends import HF_JOBS
from app.domain import Trainer, TrainerKind
from app.errors import ConfigurationError, TrainerError
from app.ops import TrainerInfo
from app.settings import Settings, TrainerSettings
from app.training.trainers import TrainerClient

#: A client that submits a job waits no longer for what only makes its errors come sooner.
PATIENCE_S = 2.0


def declared(settings: Settings) -> Mapping[str, Trainer]:
    """The trainers that the settings name.

    Raises:
        ConfigurationError: two have one name, or Megatron is to do several jobs at once.
    """
    found: dict[str, Trainer] = {}
    for wanted in settings.trainers:
        if wanted.name in found:
            raise ConfigurationError(f"LORAGATE_TRAINERS names {wanted.name!r} twice.")
        found[wanted.name] = _trainer(wanted)
    return found


async def ask(trainer: Trainer) -> TrainerInfo | None:
    """What the worker can do; None if it does not say so soon."""
    try:
        async with asyncio.timeout(PATIENCE_S), TrainerClient(trainer) as client:
            return await client.info()
    except (TrainerError, TimeoutError):
        return None


def _trainer(wanted: TrainerSettings) -> Trainer:
    kind = TrainerKind(wanted.kind)
    at_once = wanted.max_jobs or (1 if kind is TrainerKind.MEGATRON else HF_JOBS)
    if kind is TrainerKind.MEGATRON and at_once > 1:
        raise ConfigurationError(
            f"Trainer {wanted.name!r} in LORAGATE_TRAINERS: Megatron does one job at a time; "
            "leave max_jobs out."
        )
    return Trainer(
        name=wanted.name,
        kind=kind,
        base_model=wanted.base_model,
        url=wanted.url,
        max_jobs=at_once,
        api_key=None if wanted.api_key is None else wanted.api_key.get_secret_value(),
    )
