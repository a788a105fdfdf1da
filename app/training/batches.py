"""Turns the ops of a plan into what the worker is sent.

What comes in: a plan and its examples. What goes out: ops, the same for the same number whenever
they are asked for. It must not know: the worker, what came of the ops.

The worker adds up losses over tokens (supervised) or pairs (dpo); a job trains on means. For
supervised the weights of a batch are scaled to sum up to 1. A pair's weights may not be scaled,
which would change `beta`; but AdamW does not see the scale of a gradient, so there it is enough
to clip at a norm as many times larger.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.ops import Datum, ForwardBackward, Op, OptimStep, SaveForSampling, SaveState
from app.training.plan import OpKind, Plan, PlannedOp
from app.training.spec import Method
from app.training.tokens import Examples

#: A probe's rows, and the most tokens of each.
PROBE_ROWS, PROBE_TOKENS = 4, 64


def adapter_name(step: int) -> str:
    """What the run's adapter is saved as after a step."""
    return f"step-{step}"


@dataclass(frozen=True, slots=True)
class Batches:
    """The examples of a plan, as ops. `held_out` is there if the plan has validation."""

    plan: Plan
    method: Method
    examples: Examples
    held_out: Examples | None = None

    def request(self, op: PlannedOp) -> Op:
        """What op `op.seq` asks of the worker. Reads from disk."""
        return _REQUESTS[op.kind](self, op)

    def pairs(self, step: int) -> int:
        """By how much the gradient of a step is larger than its mean."""
        return len(self.plan.batch(step)) if self.method == "dpo" else 1

    def tokens(self, step: int) -> int:
        """Tokens that a step computes."""
        return sum(self.examples.tokens(example) for example in self.plan.batch(step))

    def _train(self, op: PlannedOp) -> Op:
        batch = self.plan.batch(op.step)
        scale = 1.0
        if self.method == "supervised":
            scale = 1.0 / sum(self.examples.weight(example) for example in batch)
        data = [datum for example in batch for datum in self.examples.data(example, scale)]
        return self._pass(data)

    def _optimize(self, op: PlannedOp) -> Op:
        settings = self.plan.settings
        return OptimStep(
            learning_rate=self.plan.learning_rate(op.step),
            weight_decay=settings.weight_decay,
            grad_clip_norm=settings.grad_clip_norm * self.pairs(op.step),
        )

    def _validate(self, op: PlannedOp) -> Op:
        held_out = self.held_out
        assert held_out is not None, "a plan with validation has examples for it"
        part = self.plan.validation_part(op.part)
        return self._pass([d for e in part for d in held_out.data(e)], forward_only=True)

    def _save_for_sampling(self, op: PlannedOp) -> Op:
        rows = range(min(PROBE_ROWS, self.plan.examples))
        probe = [self.examples.start(row, PROBE_TOKENS) for row in rows]
        return SaveForSampling(adapter_name(op.step), probe)

    def _save_state(self, op: PlannedOp) -> Op:
        return SaveState()

    def _pass(self, data: list[Datum], *, forward_only: bool = False) -> ForwardBackward:
        if self.method == "dpo":
            beta = self.plan.settings.beta
            config = {} if beta is None else {"beta": beta}
            return ForwardBackward(data, "dpo", config, forward_only)
        return ForwardBackward(data, "cross_entropy", {}, forward_only)


_REQUESTS = {
    OpKind.FORWARD_BACKWARD: Batches._train,
    OpKind.OPTIM_STEP: Batches._optimize,
    OpKind.SAVE_FOR_SAMPLING: Batches._save_for_sampling,
    OpKind.VALIDATE: Batches._validate,
    OpKind.SAVE_STATE: Batches._save_state,
}
