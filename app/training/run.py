"""One run on a training worker, as the code that drives it sees it.

What comes in: ops with their numbers. What goes out: results, files, or an error of app/errors.
It must not know: HTTP, SQL. docs/training-protocol.md says what each request means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from app.domain import LoraSpec, Trainer
from app.ops import Message, Op, Rendered, Result, RunStatus, SavedFile, TrainerInfo


class Run(Protocol):
    """A run of one trainer. Nothing here asks twice by itself; whoever drives it does.

    Every method may raise TrainerUnavailable (the worker cannot be reached, or broke off), RunLost
    (it is not in the worker's memory: open it again), Fenced (a newer attempt has it) and
    StorageUnavailable (the worker's disk is full).
    """

    @property
    def run_id(self) -> str: ...

    async def open(self, base_model: str, spec: LoraSpec, fence: int) -> RunStatus:
        """Make the run, or take it up where it is; later calls are made as attempt `fence`.

        Raises:
            Conflict: it exists with another base or adapter.
            InvalidRequest: the worker cannot train such an adapter.
            TrainerBusy: the worker has no room for it now.
        """

    async def submit(self, seq: int, op: Op, acked: int = 0) -> None:
        """Hand over op `seq`; outcomes up to `acked` need not be kept any longer.

        Raises:
            Conflict: another op has this number.
            TrainerBusy: too many ops wait.
        """

    async def outcome(self, seq: int) -> Result:
        """What op `seq` answered, as soon as it has.

        Raises:
            TrainingFailed: it or an op before it failed, and would fail again.
            InvalidRequest: the op asks for what cannot be.
        """

    async def exchange(
        self, ops: Sequence[tuple[int, Op]], acked: int, wanted: tuple[int, int] | None
    ) -> list[Result]:
        """Hand over ops, each with its number, and wait for those that are `wanted`: the answers
        of the first to the last of them, once the last has one.

        Fewer come when the worker lets go of who waits, or one of them failed that is not the
        first; none without `wanted`.

        Raises:
            Conflict, TrainerBusy: as `submit` does.
            TrainingFailed, InvalidRequest: as `outcome` does, of the first one.
        """

    async def cancel_ops(self) -> RunStatus:
        """Cancel every op that has not begun; the answer comes once none is being done."""

    async def unload(self) -> None:
        """Let the worker write a state and forget the run; `open` brings it back.

        Raises:
            Conflict: ops are waiting.
        """

    async def delete(self) -> None:
        """Cancel everything and remove every trace; harmless when there is none."""

    async def download(self, name: str, files: Sequence[SavedFile], folder: Path) -> None:
        """Fetch what `save_for_sampling` wrote as `name` into `folder`, each file checked by its
        digest.

        Raises:
            TrainerError: a file is not what the worker said it is.
        """


class TrainerHost(Protocol):
    """A worker that trains: what it is, its tokenizer, and the runs on it."""

    async def info(self) -> TrainerInfo:
        """What the worker can do and which runs it knows."""

    async def render(self, conversations: Sequence[Message], *, complete: bool) -> list[Rendered]:
        """Conversations through the model's chat template; what is wrong with one is in its
        `problem`.
        """

    def run(self, run_id: str) -> Run:
        """The run of that name, whether it exists yet or not."""


#: Opens a connection to a worker, for as long as the context lasts.
ConnectTrainer = Callable[[Trainer], AbstractAsyncContextManager[TrainerHost]]
