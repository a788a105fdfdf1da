"""Starting the ranks of one trainer, and ending them together.

What comes in: a plan. What goes out: on rank 0 an engine that is called on every rank; the other
ranks' program. It must not know: what is called.

Rank 0 is the worker itself. It starts the others, unless torchrun did: then the other ranks are
workers whose environment says so. Rank 0 ending, however it does, ends the others. The end of
another ends rank 0 at once: what is in flight cannot be finished, nothing of it was promised to
anybody, and a fresh worker can be given it again.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from app.errors import ConfigurationError, LoragateError, TrainerUnavailable
from app.settings import Settings, TorchrunSettings, child_environment
from app.telemetry import Event, configure_logging
from app.worker.trainers.megatron_engine import Engine
from app.worker.trainers.megatron_groups import COLLECTIVE_TIMEOUT, Plan, Ranks

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
JOIN_TIMEOUT_S = 120.0
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


def lead(plan: Plan, settings: Settings) -> Team:
    """Become rank 0 and have the model on all ranks.

    Raises:
        ConfigurationError: torchrun started another number of ranks than the settings say, or the
            model cannot be cut so.
        TrainerUnavailable: a rank that was started ended before it joined.
    """
    given = TorchrunSettings()
    children: list[subprocess.Popen[bytes]] = []
    if given.rank is None:
        children = _start(plan, settings)
    elif given.world_size == plan.ranks:
        dist.init_process_group(_backend(plan.device), timeout=COLLECTIVE_TIMEOUT)
    else:
        raise ConfigurationError(
            f"torchrun started {given.world_size} ranks, but LORAGATE_WORKER_TENSOR_PARALLEL, "
            f"_PIPELINE_PARALLEL and _DATA_PARALLEL ask for {plan.tp} * {plan.pp} * {plan.dp}. "
            "Make them equal."
        )
    dist.broadcast_object_list([plan], src=0)
    ranks = Ranks(plan, 0, given.local_rank)
    team = Team(ranks, Engine(plan, ranks), children)
    team.watch()
    return team


def follow(settings: Settings, device: str) -> bool:
    """Under torchrun, be one of the other ranks until rank 0 ends. False: this is rank 0."""
    given = TorchrunSettings()
    if not given.rank:
        return False
    configure_logging(settings.log_level, settings.log_format)
    dist.init_process_group(_backend(device), timeout=COLLECTIVE_TIMEOUT)
    _serve(given.rank, given.local_rank)
    return True


def _start(plan: Plan, settings: Settings) -> list[subprocess.Popen[bytes]]:
    """Start the other ranks on this host, and join them."""
    # Bound to loopback by us: torch's own store listens on every interface.
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        LOOPBACK,
        port,
        plan.ranks,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    words = ["--ranks", str(plan.ranks), "--port", str(port), "--device", plan.device]
    children = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, "--rank", str(rank), *words],
            stdin=subprocess.PIPE,
            env=child_environment(settings),
        )
        for rank in range(1, plan.ranks)
    ]
    try:
        _await_all(store, children)
    except TrainerUnavailable:
        for child in children:
            child.kill()
        raise
    dist.init_process_group(
        _backend(plan.device),
        store=store,
        rank=0,
        world_size=plan.ranks,
        timeout=COLLECTIVE_TIMEOUT,
    )
    return children


def _await_all(store: TCPStore, children: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    for rank, child in enumerate(children, start=1):
        while not store.check([_joined(rank)]):
            if child.poll() is not None:
                raise TrainerUnavailable(
                    f"Rank {rank} of the Megatron trainer ended with status {child.returncode} "
                    "before it joined; its last lines say why."
                )
            if time.monotonic() > deadline:
                raise TrainerUnavailable(
                    f"Rank {rank} of the Megatron trainer did not join in {JOIN_TIMEOUT_S:.0f} s."
                )
            time.sleep(0.02)


def _join(rank: int, ranks: int, port: int, device: str) -> None:
    store = TCPStore(LOOPBACK, port, ranks, is_master=False)
    store.set(_joined(rank), "1")
    dist.init_process_group(
        _backend(device), store=store, rank=rank, world_size=ranks, timeout=COLLECTIVE_TIMEOUT
    )


def _serve(rank: int, local_rank: int) -> None:
    """Do what rank 0 says until it says to end, or is gone."""
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


def _joined(rank: int) -> str:
    return f"joined/{rank}"


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
    _join(given.rank, given.ranks, given.port, given.device)
    _serve(given.rank, given.rank)


if __name__ == "__main__":
    main()
