"""Starting the other ranks of a trainer on this host.

What comes in: a plan. What goes out: processes, and the store through which they find each other.
It must not know: Megatron, which takes seconds to import, here as in every rank: they start first.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch._C._distributed_c10d import TCPStore

from app.errors import ConfigurationError, TrainerUnavailable
from app.settings import Settings, child_environment

PROGRAM = "app.worker.trainers.megatron_ranks"
LOOPBACK = "127.0.0.1"
JOIN_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What every rank must agree on."""

    engine: Literal["core", "bridge"]
    folder: str
    device: str
    dtype: str
    tp: int
    pp: int
    dp: int
    train_tokens: int
    recompute: bool
    threads: int | None

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp


@dataclass(frozen=True, slots=True)
class Launched:
    """The other ranks, 1, 2, … in order, and the store of all."""

    store: TCPStore
    children: Sequence[subprocess.Popen[bytes]]

    def join(self) -> None:
        """Wait until every rank is there.

        Raises:
            TrainerUnavailable: one ended, or was not there in time; then the others are ended too.
        """
        try:
            self._await()
        except TrainerUnavailable:
            for child in self.children:
                child.kill()
            raise

    def _await(self) -> None:
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        for rank, child in enumerate(self.children, start=1):
            while not self.store.check([joined(rank)]):
                if child.poll() is not None:
                    raise TrainerUnavailable(
                        f"Rank {rank} of the Megatron trainer ended with status "
                        f"{child.returncode} before it joined; its last lines say why."
                    )
                if time.monotonic() > deadline:
                    raise TrainerUnavailable(
                        f"Rank {rank} of the Megatron trainer did not join in "
                        f"{JOIN_TIMEOUT_S:.0f} s."
                    )
                time.sleep(0.02)


def launch(plan: Plan, settings: Settings) -> Launched:
    """Start every rank but the first, which this process is.

    Raises:
        ConfigurationError: there are fewer GPUs than ranks.
    """
    if plan.device.startswith("cuda") and plan.ranks > torch.cuda.device_count():
        raise ConfigurationError(
            f"LORAGATE_WORKER_TENSOR_PARALLEL, _PIPELINE_PARALLEL and _DATA_PARALLEL ask for "
            f"{plan.tp} * {plan.pp} * {plan.dp} ranks, and this host has "
            f"{torch.cuda.device_count()} GPUs. Ask for fewer, or start the worker on several "
            "hosts with torchrun."
        )
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
            [sys.executable, "-m", PROGRAM, "--rank", str(rank), *words],
            stdin=subprocess.PIPE,
            env=child_environment(settings),
        )
        for rank in range(1, plan.ranks)
    ]
    return Launched(store, children)


def store_of(port: int, rank: int, ranks: int) -> TCPStore:
    """The store, seen from another rank, which says by this that it is there."""
    store = TCPStore(LOOPBACK, port, ranks, is_master=False)
    store.set(joined(rank), "1")
    return store


def joined(rank: int) -> str:
    return f"joined/{rank}"
