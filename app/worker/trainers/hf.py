"""The engine that trains adapters of many runs at once on a transformers model.

What comes in and goes out: see `base.Trainer`. It must not know: HTTP, sequence numbers, who
asks, how the same base serves.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.domain import LoraSpec, Probe
from app.errors import (
    InvalidRequest,
    NonFiniteLoss,
    OutOfMemory,
    RequestError,
    RunLost,
    TrainingFailed,
)
from app.ops import OptimStep
from app.settings import Settings
from app.worker import losses
from app.worker.samplers.model import CausalModel
from app.worker.trainers import heap, runfiles
from app.worker.trainers.adamw import Moments, adamw, clip
from app.worker.trainers.base import Example, Facts, Pass, PassResult
from app.worker.trainers.lora import Group, Layout, lanes
from app.worker.trainers.packing import deal
from app.worker.trainers.passes import Work, compute
from app.worker.trainers.shared import SharedModel

# What torch says in a RuntimeError when the machine, and not a card, has no memory left.
NO_MEMORY = ("can't allocate memory", "not enough memory")
#: What can be done about too little of it: for a run, and for a pass of one.
SMALLER = "Ask for a smaller lora_rank or fewer target_modules, or give the worker more memory."
SHORTER = (
    "Shorten the longest examples, or give the worker more memory or "
    "LORAGATE_WORKER_GRADIENT_CHECKPOINTING=true."
)
#: Passes side by side at most: more have too few runs each.
MOST_SIDE_BY_SIDE = 4
#: Tokens that a pass of its own is worth: with fewer it mostly waits for the interpreter.
LEAST_TOKENS = 128


@dataclass(slots=True)
class Run:
    """An adapter in training: vectors of float32, as long as its layout says."""

    layout: Layout
    weights: Tensor
    gradient: Tensor
    moments: Moments


class HfTrainer:
    """Many adapters on one frozen base; passes of several runs are one pass of the model.

    Or of a few, side by side, where torch leaves cores to spare: one for a small model, whose
    products are too short to be shared.

    `base_model` is the name by which adapters say what they are for; `side_by_side`, how many
    passes of the model there may be at once, is by default what the cores allow.
    """

    def __init__(
        self, model: Any, settings: Settings, *, base_model: str, side_by_side: int | None = None
    ) -> None:
        checkpointing = settings.worker_gradient_checkpointing
        self._model = SharedModel(model, checkpointing=checkpointing)
        if self._model.device.type == "cpu":
            heap.keep()
        count = side_by_side or _side_by_side(self._model.device)
        others = [SharedModel(model, checkpointing=checkpointing) for _ in range(count - 1)]
        self._models = [self._model, *others]
        self._threads = ThreadPoolExecutor(count, "passes")
        self._limit = settings.worker_train_tokens
        self._base = base_model
        self._runs: dict[str, Run] = {}

    @classmethod
    def beside(cls, model: CausalModel, settings: Settings, *, base_model: str) -> HfTrainer:
        """A trainer on the parameters of a sampler's model, before adapters are loaded into it.

        The two may be used from two threads at once: they share tensors that neither changes,
        and no module.
        """
        return cls(model.model, settings, base_model=base_model)

    @property
    def facts(self) -> Facts:
        return Facts(
            kind="hf",
            dtype=_name(self._model.dtype),
            max_length=self._model.max_length,
            target_modules=self._model.sites.kinds,
            parallel={"tp": 1, "pp": 1, "dp": 1},
        )

    def create(self, run: str, spec: LoraSpec) -> None:
        layout = self._model.sites.layout(spec)
        try:
            weights = layout.first_weights(spec.seed).to(self._model.device)
            self._runs[run] = Run(layout, weights, *_nothing(weights))
        except (RuntimeError, MemoryError) as exc:
            raise _failure(exc, f"Making run {run!r}", SMALLER) from exc

    def drop(self, run: str) -> None:
        self._runs.pop(run, None)

    def forward_backward(self, passes: Sequence[Pass]) -> list[PassResult | RequestError]:
        begun = time.perf_counter()
        found: list[Work | RequestError] = [self._work(task) for task in passes]
        works = [work for work in found if isinstance(work, Work)]
        failed = self._compute(works)
        results: list[PassResult | RequestError] = []
        seconds = time.perf_counter() - begun
        for work in found:
            if isinstance(work, Work):
                failure = failed.get(id(work))
                results.append(failure or self._keep(work, seconds))
            else:
                results.append(work)
        return results

    def optim_step(self, run: str, step: OptimStep) -> Mapping[str, float]:
        state = self._run(run)
        norm = float(state.gradient.norm())
        if not math.isfinite(norm):
            state.gradient.zero_()
            raise NonFiniteLoss(f"The gradient of run {run!r} is not finite (its norm is {norm}).")
        clip(state.gradient, norm, step.grad_clip_norm)
        try:
            adamw(state.weights, state.gradient, state.moments, step)
        except (RuntimeError, MemoryError) as exc:
            raise _failure(exc, f"A step of run {run!r}", SMALLER) from exc
        state.gradient.zero_()
        return {"grad_norm:mean": norm}

    def save_state(self, run: str, folder: Path) -> None:
        state = self._run(run)
        vectors = {
            "weights": state.weights,
            "gradient": state.gradient,
            "exp_avg": state.moments.exp_avg,
            "exp_avg_sq": state.moments.exp_avg_sq,
        }
        runfiles.save_state(folder, state.layout, vectors, steps=state.moments.steps)

    def load_state(self, run: str, folder: Path, *, optimizer: bool) -> None:
        state = self._run(run)
        vectors, steps = runfiles.load_state(folder, state.layout)
        at = {name: vector.to(self._model.device) for name, vector in vectors.items()}
        state.weights = at["weights"]
        state.gradient, state.moments = _nothing(state.weights)
        if optimizer:
            state.gradient = at["gradient"]
            state.moments = Moments(at["exp_avg"], at["exp_avg_sq"], steps)

    def save_adapter(self, run: str, folder: Path) -> None:
        state = self._run(run)
        runfiles.save_adapter(folder, state.layout, state.weights, self._base)

    def probe(self, run: str, token_ids: Sequence[Sequence[int]]) -> Probe:
        state = self._run(run)
        group = Group(state.layout, [state.weights], self._model.dtype)
        rows = []
        try:
            with torch.no_grad():
                for row in token_ids:
                    ids = torch.tensor(list(row))
                    size = len(row) - 1
                    self._model.sites.use(lanes([(group, 0, size)]))
                    logprobs, _ = self._model.logprobs(ids[:-1], ids[1:], [size])
                    rows.append(tuple(logprobs.tolist()))
        finally:
            self._model.sites.use(())
        return Probe(tuple(map(tuple, token_ids)), tuple(rows), _name(self._model.dtype))

    def close(self) -> None:
        self._threads.shutdown()
        self._runs.clear()

    def _run(self, run: str) -> Run:
        if run not in self._runs:
            raise RunLost(f"This trainer has no run {run!r}.")
        return self._runs[run]

    def _work(self, task: Pass) -> Work | RequestError:
        state = self._run(task.run)
        try:
            losses.check(task.loss, task.config, task.examples)
            self._check_tokens(task.examples)
        except InvalidRequest as exc:
            return exc
        return Work(task, state.layout, state.weights)

    def _check_tokens(self, examples: Sequence[Example]) -> None:
        """An id outside the vocabulary would take a card down, and everyone with it."""
        vocabulary, longest = self._model.vocabulary, self._model.max_length
        for index, example in enumerate(examples):
            if (length := len(example.tokens)) > longest:
                raise InvalidRequest(
                    f"data[{index}] has {length} tokens; the base model takes {longest}.",
                    param=f"data[{index}].tokens",
                )
            for field, ids in (("tokens", example.tokens), ("targets", example.targets)):
                low, high = (int(value) for value in ids.aminmax())
                if low < 0 or high >= vocabulary:
                    raise InvalidRequest(
                        f"data[{index}].{field} has id {low if low < 0 else high}; the base "
                        f"model's are 0 to {vocabulary - 1}.",
                        param=f"data[{index}].{field}",
                    )

    def _compute(self, works: Sequence[Work]) -> dict[int, TrainingFailed]:
        """Compute them together, or each alone if that fails; the failures by the work's id."""
        if not works:
            return {}
        failed: dict[int, TrainingFailed] = {}
        parts = self._parts(works)
        # A failed pass keeps its memory for as long as its exception is at hand.
        for part, first in zip(parts, self._attempts(parts), strict=True):
            if first is not None:
                known = first if len(works) == 1 else None
                failures = {id(work): self._alone(work, known) for work in part}
                failed |= {work: failure for work, failure in failures.items() if failure}
        for work in works:
            if id(work) not in failed and not work.finite:
                loss = float(work.sums["loss:sum"])
                failed[id(work)] = NonFiniteLoss(f"The loss of run {work.task.run!r} is {loss}.")
        return failed

    def _alone(self, work: Work, known: TrainingFailed | None) -> TrainingFailed | None:
        """A pass without company, and a row at a time if there is no memory for more.

        `known`: how it failed when it was tried so before.
        """
        failure = known or self._attempt([work])
        if isinstance(failure, OutOfMemory):
            failure = self._attempt([work], limit=1)
        return failure

    def _parts(self, works: Sequence[Work]) -> list[list[Work]]:
        """The works, in as many parts as are worth a pass each."""
        sizes = [sum(len(example.tokens) for example in work.task.examples) for work in works]
        count = max(1, min(len(self._models), len(works), sum(sizes) // LEAST_TOKENS))
        return [[works[place] for place in sorted(hand)] for hand in deal(sizes, count)]

    def _attempts(self, parts: Sequence[Sequence[Work]]) -> list[TrainingFailed | None]:
        """A pass for each part at once; together they have no more tokens at work than one has."""
        limit = max(1, self._limit // len(parts))
        others = [
            self._threads.submit(self._attempt, part, limit, model)
            for part, model in zip(parts[1:], self._models[1:], strict=False)
        ]
        try:
            return [self._attempt(parts[0], limit), *(other.result() for other in others)]
        finally:
            wait(others)

    def _attempt(
        self, works: Sequence[Work], limit: int | None = None, model: SharedModel | None = None
    ) -> TrainingFailed | None:
        try:
            compute(model or self._model, works, limit or self._limit)
        except (RuntimeError, MemoryError) as exc:
            return _failure(exc, f"A pass of run {works[0].task.run!r}", SHORTER)
        return None

    def _keep(self, work: Work, seconds: float) -> PassResult:
        """Add a pass's gradient to its run's; now nothing can fail."""
        if work.gradient is not None:
            self._runs[work.task.run].gradient.add_(work.gradient)
        metrics = {name: float(value) for name, value in work.sums.items()}
        metrics["seconds:max"] = seconds
        return PassResult(metrics, [work.logprobs[at] for at in range(len(work.task.examples))])


def _side_by_side(device: torch.device) -> int:
    """How many passes the processor's cores take; a card takes one."""
    if device.type != "cpu":
        return 1
    # Not on every system is it known which cores a process may use.
    ours = getattr(os, "sched_getaffinity", None)
    cores = len(ours(0)) if ours else os.cpu_count() or 1
    return int(max(1, min(MOST_SIDE_BY_SIDE, cores // torch.get_num_threads())))


def _nothing(weights: Tensor) -> tuple[Tensor, Moments]:
    """A gradient and moments before the first pass."""
    gradient = torch.zeros_like(weights)
    return gradient, Moments(torch.zeros_like(weights), torch.zeros_like(weights))


def _failure(exc: Exception, what: str, way_out: str) -> TrainingFailed:
    text = str(exc)
    if isinstance(exc, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in text for sign in NO_MEMORY
    ):
        return OutOfMemory(f"{what} needs more memory than this trainer has, even alone. {way_out}")
    return TrainingFailed(f"{what} failed: {text.splitlines()[0] if text else type(exc).__name__}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
