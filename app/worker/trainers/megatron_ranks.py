"""The ranks of one trainer, which do the same and end together.

What comes in: a plan, and processes that were started. What goes out: on rank 0 an engine that is
called on every rank; the other ranks' program. It must not know: what is called.

Rank 0 is the worker itself. It starts the others, unless torchrun did: then the other ranks are
workers whose environment says so. Rank 0 ending, however it does, ends the others. The end of
another ends rank 0 at once: what is in flight cannot be finished, nothing of it was promised to
anybody, and a fresh worker can be given it again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from app.errors import ConfigurationError, LoragateError
from app.settings import Settings, TorchrunSettings
from app.telemetry import Event, configure_logging
from app.worker.trainers.megatron_engine import Engine
from app.worker.trainers.megatron_groups import COLLECTIVE_TIMEOUT, Ranks
from app.worker.trainers.megatron_launch import Launched, Plan, store_of

logger = logging.getLogger(__name__)

STDIN = 0
#: Exit status of a process that lost its ranks (EX_SOFTWARE of sysexits.h).
LOST = 70
END = "end"


@dataclass
class Team:
    """All ranks, seen from rank 0: what is called here happens on each."""

    ranks: Ranks
    engine: Engine
    children: Sequence[subprocess.Popen[bytes]]
    closing: threading.Event = field(default_factory=threading.Event)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of every rank's engine, and answer what this rank's said.

        An error of ours is one that every rank has. Any other may be this rank's alone, and the
        others may be waiting for it, so the process ends.
        """
        self.ranks.settle()
        try:
            self.ranks.say((method, *args))
            return getattr(self.engine, method)(*args)
        except LoragateError:
            raise
        except Exception as exc:
            if self.ranks.plan.ranks == 1:
                raise
            _end(f"{method} failed on rank 0", exc)

    def close(self) -> None:
        """End the other ranks, in order."""
        self.closing.set()
        self.ranks.say((END,))
        self.ranks.leave()
        for child in self.children:
            child.wait()

    def watch(self) -> None:
        """From now on, end with the first of the others that ends."""
        for rank, child in enumerate(self.children, start=1):
            threading.Thread(
                target=self._watch, args=(rank, child), name=f"rank-{rank}", daemon=True
            ).start()

    def _watch(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        status = child.wait()
        if not self.closing.is_set():
            _end(f"rank {rank} ended with status {status}")


def lead(plan: Plan, launched: Launched | None) -> Team:
    """Become rank 0 and have the model on all ranks: those that were launched, or torchrun's.

    Raises:
        ConfigurationError: a model that the engine cannot have; the groups are gone again.
        TrainerUnavailable: a rank that was launched ended before it joined.
    """
    given = TorchrunSettings()
    if launched is not None:
        launched.join()
        dist.init_process_group(
            _backend(plan.device),
            store=launched.store,
            rank=0,
            world_size=plan.ranks,
            timeout=COLLECTIVE_TIMEOUT,
        )
    else:
        dist.init_process_group(_backend(plan.device), timeout=COLLECTIVE_TIMEOUT)
    dist.broadcast_object_list([plan], src=0)
    ranks = Ranks(plan, 0, given.local_rank)
    try:
        engine = Engine(plan, ranks)
    except ConfigurationError:
        # The others have the same error, and leave.
        ranks.leave()
        raise
    team = Team(ranks, engine, launched.children if launched else ())
    team.watch()
    ranks.gather()
    return team


def follow(device: str) -> bool:
    """Under torchrun, be one of the other ranks until rank 0 ends. False: this is rank 0."""
    given = TorchrunSettings()
    if not given.rank:
        return False
    dist.init_process_group(_backend(device), timeout=COLLECTIVE_TIMEOUT)
    _serve(given.rank, given.local_rank)
    return True


def _serve(rank: int, local_rank: int) -> None:
    """Do what rank 0 says until it says to end, or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # They may be sent to the whole group; rank 0 then ends the others when it is ready.
        signal.signal(number, signal.SIG_IGN)
    heard: list[Any] = [None]
    dist.broadcast_object_list(heard, src=0)
    plan: Plan = heard[0]
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    ranks = Ranks(plan, rank, local_rank)
    ranks.settle()
    try:
        engine = Engine(plan, ranks)
    except ConfigurationError:
        # Rank 0 has the same error, and says it.
        ranks.leave()
        return
    ranks.gather()
    while True:
        try:
            method, *args = ranks.hear()
        except RuntimeError:
            sys.exit("rank 0 is gone")
        if method == END:
            break
        try:
            getattr(engine, method)(*args)
        except LoragateError:
            # Every rank has it; rank 0 answers it.
            continue
        except Exception as exc:  # noqa: BLE001 - logged, and the end of the process
            _end(f"{method} failed on rank {rank}", exc)
    ranks.leave()


def _end(why: str, exc: Exception | None = None) -> NoReturn:
    """Leave the process as it stands: its other threads may never wake again."""
    logger.error(Event.TRAINER_RANK_LOST.value, exc_info=exc, extra={"fields": {"reason": why}})
    logging.shutdown()
    os._exit(LOST)


def _end_with_parent() -> None:
    """End when standard input closes: rank 0 holds its other end for as long as it lives."""

    def wait() -> None:
        # The bare descriptor: the lock of sys.stdin would be held when the interpreter ends.
        with suppress(OSError):
            while os.read(STDIN, 4096):
                pass
        os._exit(0)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _backend(device: str) -> str:
    return "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"


def main() -> None:
    """One of the other ranks, started by rank 0."""
    parser = argparse.ArgumentParser(description="A rank of a Megatron trainer.")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", required=True)
    given = parser.parse_args()
    settings = Settings()
    configure_logging(settings.log_level, settings.log_format)
    _end_with_parent()
    dist.init_process_group(
        _backend(given.device),
        store=store_of(given.port, given.rank, given.ranks),
        rank=given.rank,
        world_size=given.ranks,
        timeout=COLLECTIVE_TIMEOUT,
    )
    _serve(given.rank, given.rank)


if __name__ == "__main__":
    main()
