"""One forward and backward over the examples of many runs.

What comes in: passes, and the weights of the run each is for. What goes out: for each its sums,
its logprobs, its gradient. It must not know: what a failure means to a run, optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.worker import losses
from app.worker.trainers.base import Pass
from app.worker.trainers.lora import Group, Layout, lanes
from app.worker.trainers.packing import Share, Unit, batches
from app.worker.trainers.shared import SharedModel


@dataclass(slots=True)
class Work:
    """A pass, the weights it is for, and what has come of it so far.

    `gradient` has the size of the weights; None where none was wanted.
    """

    task: Pass
    layout: Layout
    weights: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    logprobs: dict[int, Tensor] = field(default_factory=dict)
    gradient: Tensor | None = None

    @property
    def finite(self) -> bool:
        return math.isfinite(float(self.sums["loss:sum"]))

    def begin(self) -> None:
        self.sums, self.logprobs, self.gradient = {}, {}, None

    def add(self, sums: dict[str, Tensor]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value


@dataclass(frozen=True, slots=True)
class Seat:
    """A work and where its weights and gradient are: run `run` of a group."""

    work: Work
    group: Group
    run: int


def compute(model: SharedModel, works: Sequence[Work], limit: int) -> None:
    """Fill in what comes of each, `limit` tokens at a time; what learns apart from what looks."""
    for learns in (True, False):
        chosen = [work for work in works if work.task.forward_only is not learns]
        for work in chosen:
            work.begin()
        if chosen:
            with torch.set_grad_enabled(learns):
                _together(model, chosen, limit, learns)


def _together(model: SharedModel, works: Sequence[Work], limit: int, learns: bool) -> None:
    seats = _seats(works, model.dtype)
    units = [unit for owner, seat in enumerate(seats) for unit in _units(owner, seat.work.task)]
    try:
        for shares in batches(units, limit):
            value = _batch(model, seats, shares)
            if learns:
                value.backward()  # type: ignore[no-untyped-call]
    finally:
        model.sites.use(())
    if learns:
        for seat in seats:
            seat.work.gradient = seat.group.gradient[seat.run]


def _batch(model: SharedModel, seats: Sequence[Seat], shares: Sequence[Share]) -> Tensor:
    """The losses of a batch added up; sums and logprobs go to their works."""
    examples = [
        seats[share.owner].work.task.examples[index] for share in shares for index in share.examples
    ]
    ids = torch.cat([example.tokens for example in examples])
    wanted = torch.cat([example.targets for example in examples])
    lengths = [len(example.tokens) for example in examples]
    reference = None
    if any(seats[share.owner].work.task.loss == "dpo" for share in shares):
        model.sites.use(())
        with torch.no_grad():
            reference, _ = model.logprobs(ids, wanted, lengths)
    places = [(seats[share.owner], share.tokens) for share in shares]
    model.sites.use(lanes((seat.group, seat.run, tokens) for seat, tokens in places))
    logprobs, correct = model.logprobs(ids, wanted, lengths)
    total = logprobs.new_zeros(())
    for share in shares:
        span = slice(share.start, share.start + share.tokens)
        told = None if reference is None else reference[span]
        work = seats[share.owner].work
        total = total + _evaluate(work, share, logprobs[span], correct[span], told)
    return total


def _evaluate(
    work: Work, share: Share, logprobs: Tensor, correct: Tensor, reference: Tensor | None
) -> Tensor:
    task = work.task
    examples = [task.examples[index] for index in share.examples]
    targets = losses.gather(examples, logprobs.device, reference)
    value, sums = losses.evaluate(task.loss, task.config, logprobs, correct, targets)
    work.add(sums)
    pieces = torch.split(logprobs.detach().cpu(), list(share.lengths))
    work.logprobs.update(zip(share.examples, pieces, strict=True))
    return value


def _seats(works: Sequence[Work], dtype: torch.dtype) -> list[Seat]:
    """Stack the weights of works of one layout; those of one group are beside each other."""
    by_layout: dict[Layout, list[Work]] = {}
    for work in works:
        by_layout.setdefault(work.layout, []).append(work)
    seats = []
    for layout, members in by_layout.items():
        group = Group(layout, [work.weights for work in members], dtype)
        seats += [Seat(work, group, run) for run, work in enumerate(members)]
    return seats


def _units(owner: int, task: Pass) -> list[Unit]:
    """Its examples, or the pairs of them that its loss compares."""
    lengths = [len(example.tokens) for example in task.examples]
    size = 2 if task.loss == "dpo" else 1
    return [
        Unit(owner, tuple(range(at, at + size)), tuple(lengths[at : at + size]))
        for at in range(0, len(lengths), size)
    ]
