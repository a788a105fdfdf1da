"""What came of a job's steps and epochs, put together from the outcomes of their ops.

What comes in: planned ops and their results, in order. What goes out: `StepDone`, `EpochDone`. It
must not know: how results were got, who records what comes of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from app.ops import ProbeResult, Result, SavedFile
from app.training.batches import Batches, adapter_name
from app.training.plan import OpKind, PlannedOp, Saves


@dataclass(frozen=True, slots=True)
class Means:
    """Means over the tokens with a weight (loss: by weight), or over the pairs of `dpo`.

    `reward_margin` is beta times how much more the preferred answer gained than the other one;
    `reward_accuracy` how often it gained more. Both are None for other methods.
    """

    loss: float
    token_accuracy: float
    reward_margin: float | None = None
    reward_accuracy: float | None = None


class Recorder(Protocol):
    """Who keeps what came of a job. If a method raises, nothing was told."""

    @property
    def recorded(self) -> int:
        """The op up to which everything told is safe."""

    async def step(self, done: StepDone) -> None:
        """A step is done."""

    async def epoch(self, done: EpochDone) -> None:
        """An epoch is done, and its weights can be fetched until this returns."""

    async def saves(self, saves: Saves) -> None:
        """Keep this, before returning, for whoever drives the run next."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step is done: `seq` is its last op's number.

    `grad_norm` is that of the mean's gradient, before clipping; `seconds` is how long the worker
    computed, 0 if it did not say.
    """

    seq: int
    step: int
    train: Means
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float

    async def tell(self, recorder: Recorder) -> None:
        await recorder.step(self)


@dataclass(frozen=True, slots=True)
class EpochDone:
    """An epoch is done and its weights can be fetched: the run's saved adapter `name`.

    `valid` is over the whole validation file, None without one.
    """

    seq: int
    step: int
    name: str
    files: tuple[SavedFile, ...]
    probe: ProbeResult | None
    valid: Means | None

    async def tell(self, recorder: Recorder) -> None:
        await recorder.epoch(self)


class Tally:
    """Takes the outcomes of ops in order, from the first op of a step."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._passes: Counter[str] = Counter()
        self._saved = Result()

    def add(self, op: PlannedOp, result: Result) -> StepDone | EpochDone | None:
        """What this outcome completes, if anything."""
        if op.kind is OpKind.FORWARD_BACKWARD:
            self._passes = Counter(result.metrics)
        elif op.kind is OpKind.OPTIM_STEP:
            return self._step(op, result)
        elif op.kind is OpKind.SAVE_FOR_SAMPLING:
            self._saved, self._passes = result, Counter()
            if not self._batches.plan.validation:
                return self._epoch(op)
        elif op.kind is OpKind.VALIDATE:
            self._passes.update(result.metrics)
            if op.part == self._batches.plan.validation_parts - 1:
                return self._epoch(op)
        return None

    def _step(self, op: PlannedOp, result: Result) -> StepDone:
        seconds = self._passes["seconds:max"] + result.metrics.get("seconds:max", 0.0)
        return StepDone(
            seq=op.seq,
            step=op.step,
            train=_means(self._passes),
            learning_rate=self._batches.plan.learning_rate(op.step),
            grad_norm=result.metrics["grad_norm:mean"] / self._batches.pairs(op.step),
            tokens=self._batches.tokens(op.step),
            seconds=seconds,
        )

    def _epoch(self, op: PlannedOp) -> EpochDone:
        return EpochDone(
            seq=op.seq,
            step=op.step,
            name=adapter_name(op.step),
            files=tuple(self._saved.files),
            probe=self._saved.probe,
            valid=_means(self._passes) if self._batches.plan.validation else None,
        )


def _means(sums: Mapping[str, float]) -> Means:
    tokens = sums.get("tokens:sum") or 1.0
    accuracy = sums.get("correct:sum", 0.0) / tokens
    pairs = sums.get("pairs:sum")
    if pairs:
        return Means(
            loss=sums["loss:sum"] / pairs,
            token_accuracy=accuracy,
            reward_margin=sums["reward_margin:sum"] / pairs,
            reward_accuracy=sums["reward_accuracy:sum"] / pairs,
        )
    return Means(sums["loss:sum"] / (sums.get("weight:sum") or 1.0), accuracy)
