"""The processes that compute one model together, and how they talk.

What comes in: a plan that all of them have. What goes out: Megatron's parallel state, and a
channel for objects beside it. It must not know: who started the processes, what they say.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from app.worker.trainers.megatron_core import parallel_state
from app.worker.trainers.megatron_launch import Plan

T = TypeVar("T")

#: A rank waits this long for another in the middle of a computation, and then ends.
COLLECTIVE_TIMEOUT = timedelta(minutes=5)
#: Between two calls there may be any time.
IDLE_TIMEOUT = timedelta(days=365)


class Ranks:
    """This process's place among the ranks, once the groups are there."""

    def __init__(self, plan: Plan, rank: int, local_rank: int) -> None:
        self.plan, self.rank = plan, rank
        self.device = torch.device(plan.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", (self.device.index or 0) + local_rank)
        # Objects need no GPU; and idling must not count as a rank that hangs.
        self._calls = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
        self._answers = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        self.settle()
        parallel_state.initialize_model_parallel(
            plan.tp,
            plan.pp,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() // 60),
        )

    def settle(self) -> None:
        """Make this thread compute on this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def gather(self) -> None:
        """Wait for every rank, however long it takes to read its part of the model."""
        if self.plan.ranks > 1:
            dist.barrier(group=self._calls)

    def say(self, call: tuple[Any, ...]) -> None:
        """Rank 0: tell the others."""
        if self.plan.ranks > 1:
            dist.broadcast_object_list([call], src=0, group=self._calls)

    def hear(self) -> tuple[Any, ...]:
        """The others: wait for what rank 0 says."""
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self._calls)
        return tuple(heard[0])

    def exchange(self, mine: T) -> list[T]:
        """What every rank has, in the order of ranks."""
        if self.plan.ranks == 1:
            return [mine]
        found: list[Any] = [None] * self.plan.ranks
        dist.all_gather_object(found, mine, group=self._answers)
        return found

    def leave(self) -> None:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
