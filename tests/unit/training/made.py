"""Jobs to drive: a plan, its examples, and a recorder that outlives whoever drives.

What comes in: sizes. What goes out: what the loop needs, in memory and on virtual time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from app.domain import LoraSpec
from app.training.batches import Batches
from app.training.loop import Loop, Position, Target
from app.training.outcomes import EpochDone, StepDone
from app.training.patience import Patience
from app.training.plan import Hyperparameters, Plan, Saves
from app.training.spec import Method
from app.training.tokens import Examples
from tests.fakes.training_worker import FakeWorker, rendered
from tests.fakes.virtual_time import VirtualClock

LORA = LoraSpec(rank=4, alpha=8, target_modules=("q_proj",), seed=1)


def settings(epochs: int = 2, batch: int = 2, beta: float | None = None) -> Hyperparameters:
    return Hyperparameters(
        n_epochs=epochs,
        batch_size=batch,
        learning_rate_multiplier=1.0,
        learning_rate=1e-3,
        warmup_ratio=0.1,
        weight_decay=0.0,
        lr_schedule="linear",
        grad_clip_norm=1.0,
        beta=beta,
    )


def examples(folder: Path, count: int, sequences: int = 1) -> Examples:
    """Examples that differ in length and text."""
    made = Examples(folder, sequences)
    for number in range(count):
        made.add(
            [
                rendered(
                    [
                        {"role": "user", "content": f"{number} or {which}?"},
                        {"role": "assistant", "content": "yes " * (number % 5 + which + 1)},
                    ]
                )
                for which in range(sequences)
            ]
        )
    made.seal()
    return made


def batches(
    folder: Path, *, count: int = 5, held_out: int = 0, method: Method = "supervised", **more: int
) -> Batches:
    beta = 0.1 if method == "dpo" else None
    plan = Plan(count, held_out, seed=7, settings=settings(beta=beta, **more))
    sequences = 2 if method == "dpo" else 1
    return Batches(
        plan,
        method,
        examples(folder, count, sequences),
        examples(folder, held_out, sequences) if held_out else None,
    )


@dataclass
class Kept:
    """What was recorded, in memory that no crash reaches; `trouble` is called before each change.

    As in the gateway's database, a step may be told and not recorded yet: it is once something
    after it is.
    """

    trouble: Callable[[str], None] = lambda _: None
    every: int = 1
    steps: list[StepDone] = field(default_factory=list)
    epochs: list[EpochDone] = field(default_factory=list)
    changes: tuple[tuple[int, int], ...] = ()
    recorded: int = 0
    buffer: list[StepDone] = field(default_factory=list)

    async def step(self, done: StepDone) -> None:
        self.buffer.append(done)
        if len(self.buffer) >= self.every:
            self.flush("step", done.seq)

    async def epoch(self, done: EpochDone) -> None:
        self.flush("epoch", done.seq)
        self.epochs.append(done)

    async def saves(self, saves: Saves) -> None:
        self.flush("saves", self.buffer[-1].seq if self.buffer else self.recorded)
        self.changes = saves.changes

    def flush(self, what: str, seq: int) -> None:
        self.trouble(what)
        self.steps += self.buffer
        self.buffer = []
        self.recorded = seq


def loop_of(
    worker: FakeWorker,
    made: Batches,
    kept: Kept,
    *,
    fence: int = 1,
    checkpoint_s: float = 1e6,
    patience: Patience | None = None,
) -> Loop:
    kept.buffer = []
    return Loop(
        Target(worker.run("job-1"), "tiny", LORA, fence),
        made,
        kept,
        VirtualClock(),
        patience or Patience(VirtualClock(), 60.0),
        Position(kept.recorded, kept.changes),
        checkpoint_s,
    )
