"""What a fine-tune job does, step by step: a function of its data's size and its settings. Pure.

What comes in: a spec, the number of examples, the base's width. What goes out: hyperparameters
with every "auto" decided, the examples and the learning rate of each step, and the numbered list
of ops. Two gateways that compute it get the same, so whoever takes a job over knows what each op
of the run was. It must not know: tokens, the trainer, time.

The ops of step s are, in this order:

    forward_backward, optim_step
    save_for_sampling, validation…    when s ends an epoch
    save_state                        when s ends an epoch but the last, or `Saves` says so

The last epoch has no state to save: nothing follows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from random import Random
from typing import Any

import msgspec

from app.training.spec import FineTuneSpec, Method, Schedule

#: Learning rate of LoRA on a base with a hidden size of 2000, and how it falls with the size.
#: From "LoRA Without Regret" (Schulman et al. 2025): ten times that of full fine-tuning, 5e-5.
BASE_LEARNING_RATE = 5e-4
BASE_HIDDEN_SIZE = 2000
SIZE_EXPONENT = 0.781
#: DPO moves from a model that answers well already, and diverges at the rate of supervised.
DPO_FACTOR = 0.1

#: Epochs that suit a size of file: those of OpenAI's guide to preparing data.
TARGET_EPOCHS, MAX_AUTO_EPOCHS = 3, 25
MIN_TARGET_EXAMPLES, MAX_TARGET_EXAMPLES = 100, 25_000
#: A job takes about this many steps at least, as far as its batches can be small enough.
TARGET_STEPS, MAX_AUTO_BATCH = 100, 32


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True):
    """What a job trains with; nothing is "auto" any more. `beta` is for `dpo` alone."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    lr_schedule: Schedule
    grad_clip_norm: float
    beta: float | None

    def to_json(self) -> dict[str, Any]:
        """JSON values only, for a job's progress and result."""
        return dict(msgspec.to_builtins(self))


def decide(spec: FineTuneSpec, examples: int, hidden_size: int | None) -> Hyperparameters:
    """Fill in what the spec leaves open.

    n_epochs: 3, but more (up to 25) to see 100 examples in all, fewer for over 25,000.
    batch_size: the largest power of two, up to 32, with which there are 100 steps or more.
    learning_rate: multiplier * 5e-4 * (2000 / hidden size)^0.781, a tenth of it for `dpo`; a
    `hidden_size` of None counts as 2000.
    """
    n_epochs = spec.n_epochs or _epochs(examples)
    dpo = spec.method == "dpo"
    base = base_learning_rate(spec.method, hidden_size)
    if spec.learning_rate is None:
        multiplier = _or(spec.learning_rate_multiplier, 1.0)
    else:
        multiplier = spec.learning_rate / base
    return Hyperparameters(
        n_epochs=n_epochs,
        batch_size=min(spec.batch_size or _batch_size(examples * n_epochs), examples),
        learning_rate_multiplier=multiplier,
        learning_rate=_or(spec.learning_rate, base * multiplier),
        warmup_ratio=_or(spec.warmup_ratio, 0.05),
        weight_decay=_or(spec.weight_decay, 0.0),
        lr_schedule=spec.lr_schedule or "linear",
        grad_clip_norm=_or(spec.grad_clip_norm, 1.0),
        beta=_or(spec.beta, 0.1) if dpo else None,
    )


def base_learning_rate(method: Method, hidden_size: int | None) -> float:
    """What a `learning_rate_multiplier` of 1 stands for."""
    width = math.pow(BASE_HIDDEN_SIZE / (hidden_size or BASE_HIDDEN_SIZE), SIZE_EXPONENT)
    return BASE_LEARNING_RATE * width * (DPO_FACTOR if method == "dpo" else 1.0)


class OpKind(StrEnum):
    """What an op of a job is for."""

    FORWARD_BACKWARD = "forward_backward"
    OPTIM_STEP = "optim_step"
    SAVE_FOR_SAMPLING = "save_for_sampling"
    VALIDATE = "validate"
    SAVE_STATE = "save_state"


@dataclass(frozen=True, slots=True)
class PlannedOp:
    """Op `seq` of a job: the `kind`, of step `step`; `part` counts the parts of a validation."""

    seq: int
    step: int
    kind: OpKind
    part: int = 0


class Saves:
    """After which steps, beside epochs' ends, the state is saved.

    `changes` are (first step, every) in order of steps: from that step on, after each `every`-th.
    They are decided while the job runs, from how long steps take, so whoever adds one keeps it
    where the next runner finds it before an op of that step is handed over.
    """

    def __init__(self, changes: Iterable[tuple[int, int]] = ()) -> None:
        self.changes = tuple(changes)

    @property
    def every(self) -> int | None:
        """Steps from save to save, as decided last."""
        return self.changes[-1][1] if self.changes else None

    def after(self, step: int) -> bool:
        """Whether the state is saved after this step."""
        for first, every in reversed(self.changes):
            if step >= first:
                return (step - first + 1) % every == 0
        return False


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a job: 1 to `steps`, over `examples`, `validation` of them held out."""

    examples: int
    validation: int
    seed: int
    settings: Hyperparameters

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.examples / self.settings.batch_size)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.settings.n_epochs

    @property
    def validation_parts(self) -> int:
        return math.ceil(self.validation / self.settings.batch_size)

    def ends_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0

    def batch(self, step: int) -> tuple[int, ...]:
        """Indices of the examples of a step; an epoch has each once, and its last batch the rest.

        The order depends on the seed and the epoch, and on nothing else.
        """
        epoch, at = divmod(step - 1, self.steps_per_epoch)
        size = self.settings.batch_size
        return _order(self.examples, self.seed, epoch)[at * size : (at + 1) * size]

    def validation_part(self, part: int) -> range:
        """Indices of the held-out examples of a part; parts count from 0."""
        size = self.settings.batch_size
        return range(part * size, min((part + 1) * size, self.validation))

    def learning_rate(self, step: int) -> float:
        """Up in a line over the warm-up's steps, then down to nearly nothing, or level."""
        warmup = math.ceil(self.settings.warmup_ratio * self.steps)
        peak = self.settings.learning_rate
        if step <= warmup:
            return peak * step / warmup
        gone = (step - warmup - 1) / (self.steps - warmup)
        if self.settings.lr_schedule == "linear":
            return peak * (1 - gone)
        if self.settings.lr_schedule == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * gone))
        return peak

    def ops(self, saves: Saves, first: int = 1) -> Iterator[PlannedOp]:
        """The ops from number `first` on. `saves` may get changes for steps not reached yet."""
        seq = 0
        for step in range(1, self.steps + 1):
            for op in self._ops_of(step, saves):
                seq += 1
                if seq >= first:
                    yield replace(op, seq=seq)

    def _ops_of(self, step: int, saves: Saves) -> Iterator[PlannedOp]:
        yield PlannedOp(0, step, OpKind.FORWARD_BACKWARD)
        yield PlannedOp(0, step, OpKind.OPTIM_STEP)
        if self.ends_epoch(step):
            yield PlannedOp(0, step, OpKind.SAVE_FOR_SAMPLING)
            for part in range(self.validation_parts):
                yield PlannedOp(0, step, OpKind.VALIDATE, part)
        if step < self.steps and (self.ends_epoch(step) or saves.after(step)):
            yield PlannedOp(0, step, OpKind.SAVE_STATE)


@lru_cache(maxsize=16)
def _order(examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(examples))
    Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def _epochs(examples: int) -> int:
    seen = examples * TARGET_EPOCHS
    if seen < MIN_TARGET_EXAMPLES:
        return min(MAX_AUTO_EPOCHS, MIN_TARGET_EXAMPLES // examples)
    if seen > MAX_TARGET_EXAMPLES:
        return max(1, MAX_TARGET_EXAMPLES // examples)
    return TARGET_EPOCHS


def _batch_size(seen: int) -> int:
    """The largest power of two with which `seen` examples make enough steps."""
    return min(MAX_AUTO_BATCH, 1 << max(0, (seen // TARGET_STEPS).bit_length() - 1))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
