"""What one rank does: the same methods, called on every rank at once, in one order.

What comes in: whole runs and passes. What goes out: whole results, on every rank. It must not
know: HTTP, disks, who called.

A rank that fails where the others do not would leave them waiting in a collective. So whatever
may fail for a reason of the run's own is decided from numbers that all ranks have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import torch
import torch.distributed as dist
from torch import Tensor

from app.errors import NonFiniteLoss, OutOfMemory, TrainingFailed
from app.ops import OptimStep
from app.worker import losses
from app.worker.trainers.adamw import Moments, adamw, clip
from app.worker.trainers.base import Example, Pass, PassResult
from app.worker.trainers.lora import Layout
from app.worker.trainers.megatron_base import Base
from app.worker.trainers.megatron_batches import batches, deal
from app.worker.trainers.megatron_core import parallel_state
from app.worker.trainers.megatron_groups import Ranks
from app.worker.trainers.megatron_launch import Plan
from app.worker.trainers.megatron_stage import Stage, Through
from app.worker.trainers.megatron_vectors import Adapters, Local

#: One rank's part of a run: by kind, then by tensor.
Pieces = dict[str, dict[str, Tensor]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Run:
    """One run's part on this rank: vectors of one length, float32."""

    local: Local
    weights: Tensor
    gradient: Tensor
    moments: Moments

    def vectors(self) -> dict[str, Tensor]:
        """All of them, by kind."""
        return {
            "weights": self.weights,
            "gradient": self.gradient,
            "exp_avg": self.moments.exp_avg,
            "exp_avg_sq": self.moments.exp_avg_sq,
        }

    def to(self, device: torch.device) -> None:
        moments = self.moments
        self.weights, self.gradient = self.weights.to(device), self.gradient.to(device)
        moments.exp_avg = moments.exp_avg.to(device)
        moments.exp_avg_sq = moments.exp_avg_sq.to(device)


@dataclass
class Share:
    """What a rank adds to the result of a pass: by example, and sums over its examples."""

    logprobs: dict[int, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    out_of_memory: bool = False


class Engine:
    """A model over all ranks and the runs that adapt it, one of them at a time on the device."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self.plan, self.ranks = plan, ranks
        self.device = ranks.device
        if self.device.type == "cuda":
            # cuDNN plans its attention anew for every shape, and every pass has another one.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.base = _base(plan, self.device)
        self.adapters = Adapters(self.base, plan.tp)
        self.stage = Stage(self.base, self.device, DTYPES[plan.dtype])
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self.speaks = self.tensor_rank == 0 and self.base.last
        self._runs: dict[str, Run] = {}
        self._resident: str | None = None

    def create(self, run: str, layout: Layout, seed: int) -> None:
        """Make a run."""
        local = self.adapters.local(layout)
        weights, gradient, mean, square = (torch.zeros(local.size) for _ in range(4))
        self._runs[run] = Run(local, weights, gradient, Moments(mean, square))
        local.fill(weights, layout.first_weights(seed), self.tensor_rank, self.plan.tp)

    def drop(self, run: str) -> None:
        """Forget a run."""
        self._runs.pop(run, None)
        if self._resident == run:
            self._resident = None

    def forward_backward(self, asked: Pass) -> PassResult | TrainingFailed:
        """One pass; on failure the run's gradient is what it was."""
        begun = monotonic()
        # An example at a time if there is no memory for more.
        for limit in (self.plan.train_tokens, 1):
            gradient, share = self._attempt(asked, limit)
            shares = self.ranks.exchange(share)
            if not any(each.out_of_memory for each in shares):
                break
        else:
            return OutOfMemory(
                f"A pass of run {asked.run!r} needs more memory than the ranks have, even an "
                "example at a time."
            )
        metrics: dict[str, float] = {}
        for each in shares:
            for name, value in each.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value
        if not math.isfinite(loss := metrics.get("loss:sum", 0.0)):
            return NonFiniteLoss(f"The loss of run {asked.run!r} is {loss}.")
        if gradient is not None:
            if self.plan.dp > 1:
                dist.all_reduce(gradient, group=parallel_state.get_data_parallel_group())
            self._runs[asked.run].gradient += gradient
        logprobs = {index: row for each in shares for index, row in each.logprobs.items()}
        metrics["seconds:max"] = monotonic() - begun
        return PassResult(metrics, [logprobs[index] for index in range(len(asked.examples))])

    def optim_step(self, run: str, step: OptimStep) -> Mapping[str, float]:
        """AdamW on every rank's part; the norm is that of the whole gradient."""
        taken = self._take(run)
        norm = self._norm(taken)
        if not math.isfinite(norm):
            taken.gradient.zero_()
            raise NonFiniteLoss(f"The gradient of run {run!r} is not finite (its norm is {norm}).")
        clip(taken.gradient, norm, step.grad_clip_norm)
        adamw(taken.weights, taken.gradient, taken.moments, step)
        taken.gradient.zero_()
        return {"grad_norm:mean": norm}

    def score(self, run: str, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """The logprobs of each row's ids after the first."""
        rows = [torch.tensor(list(row), dtype=torch.int64) for row in token_ids]
        examples = [Example(row[:-1], row[1:], torch.ones(len(row) - 1)) for row in rows]
        found = self.forward_backward(Pass(run, examples, forward_only=True))
        if isinstance(found, TrainingFailed):
            raise found
        return list(found.logprobs)

    def pieces(self, run: str, kinds: Sequence[str]) -> list[Pieces]:
        """What each rank has of a run: of each kind (see `Run.vectors`), its part by name.

        Copies of the model but the first have nothing.
        """
        kept = self._runs[run]
        vectors = kept.vectors()
        mine: Pieces = {}
        if parallel_state.get_data_parallel_rank() == 0:
            mine = {kind: kept.local.pieces(vectors[kind]) for kind in kinds}
        return self.ranks.exchange(mine)

    def steps(self, run: str) -> int:
        return self._runs[run].moments.steps

    def restore(self, run: str, vectors: Mapping[str, Tensor], steps: int) -> None:
        """Take this rank's part of whole vectors; kinds that are missing become zeros."""
        kept = self._runs[run]
        kept.moments.steps = steps
        for kind, vector in kept.vectors().items():
            vector.zero_()
            if kind in vectors:
                kept.local.fill(vector, vectors[kind], self.tensor_rank, self.plan.tp)

    def _take(self, run: str) -> Run:
        """The run, on the device; the one that was there goes to the CPU."""
        if self._resident != run:
            if self._resident is not None:
                self._runs[self._resident].to(torch.device("cpu"))
            self._resident = run
            self._runs[run].to(self.device)
        return self._runs[run]

    def _attempt(self, asked: Pass, limit: int) -> tuple[Tensor | None, Share]:
        """This rank's share of a pass, `limit` tokens at a time: its gradient, and its numbers."""
        share = Share()
        gradient = None
        try:
            run = self._take(asked.run)
            gradient = None if asked.forward_only else torch.zeros_like(run.weights)
            self._compute(run, asked, gradient, share, limit)
        except torch.OutOfMemoryError:
            share = Share(out_of_memory=True)
        finally:
            self.base.bare()
        if share.out_of_memory:
            # Not before here: the exception holds on to what the pass had.
            torch.cuda.empty_cache()
        return gradient, share

    def _compute(
        self, run: Run, asked: Pass, gradient: Tensor | None, share: Share, limit: int
    ) -> None:
        """Send this copy's examples through the stages, a round of batches at a time."""
        lengths = [len(example.tokens) for example in asked.examples]
        together = 2 if asked.loss == "dpo" else 1
        mine = deal(lengths, together, self.plan.dp)[parallel_state.get_data_parallel_rank()]
        planned = batches(mine, lengths, limit)
        for at in range(0, len(planned), self.stage.round):
            there = [
                self._there(run, asked, indices, gradient, share)
                for indices in planned[at : at + self.stage.round]
            ]
            self.stage.settle()
            if gradient is not None:
                for through, loss in there:
                    self.stage.backward(through, loss)
                self.stage.settle()

    def _there(
        self,
        run: Run,
        asked: Pass,
        indices: Sequence[int],
        gradient: Tensor | None,
        share: Share,
    ) -> tuple[Through, Tensor | None]:
        """One batch forward, and its loss on the last stage."""
        examples = [asked.examples[index] for index in indices]
        reference = None
        if asked.loss == "dpo":
            self.base.bare()
            with torch.no_grad():
                reference = self.stage.forward(examples).output
        self.base.wear(run.local, run.weights, gradient)
        with torch.set_grad_enabled(gradient is not None):
            through = self.stage.forward(examples)
            if through.correct is None:
                return through, None
            targets = losses.gather(examples, self.device, reference)
            loss, metrics = losses.evaluate(
                asked.loss, asked.config, through.output, through.correct, targets
            )
        if self.speaks:
            self._report(share, indices, through.output, metrics, targets.lengths)
        return through, loss

    def _report(
        self,
        share: Share,
        indices: Sequence[int],
        logprobs: Tensor,
        metrics: Mapping[str, Tensor],
        lengths: Sequence[int],
    ) -> None:
        """Add a batch's numbers to what this rank says of the pass."""
        rows = torch.split(logprobs.detach().float().cpu(), list(lengths))
        share.logprobs.update(zip(indices, rows, strict=True))
        for name, value in metrics.items():
            share.metrics[name] = share.metrics.get(name, 0.0) + float(value)

    def _norm(self, run: Run) -> float:
        """Of the whole gradient: what all tensor-parallel ranks have counts once."""
        mine = run.gradient if self.tensor_rank == 0 else run.gradient[run.local.shared :]
        total = torch.linalg.vector_norm(mine, dtype=torch.float64).square()
        dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
        return math.sqrt(total.item())


def _base(plan: Plan, device: torch.device) -> Base:
    """This rank's part of the plan's model, in the engine it names."""
    folder, dtype = Path(plan.folder), DTYPES[plan.dtype]
    # Either alone: one must be there without what the other needs.
    if plan.engine == "bridge":
        from app.worker.trainers.megatron_bridge_base import BridgeBase

        return BridgeBase(folder, dtype, device, recompute=plan.recompute)
    from app.worker.trainers.megatron_core_base import CoreBase

    return CoreBase(folder, dtype, device, recompute=plan.recompute)
