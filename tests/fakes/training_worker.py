"""A training worker in memory: the `TrainerHost` and `Run` of app/training/run.py, and faults.

What comes in: ops, kills, and what a test wants to go wrong. What goes out: results that depend on
every op before them and on nothing else, so that an op done twice, left out or done in another
order is seen in all that follows. Its states outlive a kill, like those on a disk.

"Training" is a hash: a gradient is the hash of what was added to it, an optimizer step the hash
of the weights before it and of the gradient. Losses are numbers made of the weights' hash.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from app.domain import LoraSpec
from app.errors import (
    Conflict,
    Fenced,
    LoragateError,
    NonFiniteLoss,
    RequestError,
    RunLost,
    TrainerUnavailable,
)
from app.ops import (
    ForwardBackward,
    Message,
    Op,
    OptimStep,
    ProbeResult,
    Rendered,
    Result,
    RunStatus,
    RunSummary,
    SavedFile,
    SaveForSampling,
    SaveState,
    Tensor,
    TrainerInfo,
)

#: Called before every request with its name; raises what shall go wrong.
Trouble = Callable[[str], None]


def no_trouble(request: str) -> None:
    """Everything goes well."""


@dataclass
class State:
    """What `save_state` writes: a run but for the ops that wait."""

    base_model: str
    lora: LoraSpec
    weights: str = "new"
    gradient: str = ""
    next_seq: int = 1
    optim_steps: int = 0
    outcomes: dict[int, Result] = field(default_factory=dict)


@dataclass
class Live:
    """A run in memory."""

    state: State
    waiting: dict[int, Op] = field(default_factory=dict)
    known: dict[int, Op] = field(default_factory=dict)
    failed: LoragateError | None = None


class FakeWorker:
    """`eager`: ops done, of those that wait, beside the one whose outcome is asked for."""

    def __init__(self, *, eager: int = 0, op_s: float = 0.0, trouble: Trouble = no_trouble) -> None:
        self.eager = eager
        self.op_s = op_s
        self.trouble = trouble
        self.live: dict[str, Live] = {}
        self.states: dict[str, State] = {}
        self.fences: dict[str, int] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.done: list[tuple[str, int, str]] = []
        self.poison: set[int] = set()  # ops whose loss is not finite
        self.max_length = 1024
        self.make_files: Callable[[str], dict[str, bytes]] = _no_weights

    def kill(self) -> None:
        """End the process: what is in memory is gone."""
        self.live.clear()

    # TrainerHost

    async def info(self) -> TrainerInfo:
        self.trouble("info")
        return TrainerInfo(
            kind="hf",
            base_model="tiny",
            dtype="float32",
            max_runs=8,
            max_rank=64,
            max_length=self.max_length,
            target_modules=["q_proj", "v_proj", "lm_head"],
            parallel={},
            runs=[RunSummary(run, run in self.live, 1) for run in {*self.live, *self.states}],
        )

    async def render(self, conversations: Sequence[Message], *, complete: bool) -> list[Rendered]:
        """A token for each character; those of the assistant's messages have a weight."""
        self.trouble("render")
        return [rendered(json.loads(one.messages)) for one in conversations]

    def run(self, run_id: str) -> FakeRun:
        return FakeRun(self, run_id)

    # what runs do

    def opened(self, run_id: str, base_model: str, lora: LoraSpec, fence: int) -> RunStatus:
        self.fences[run_id] = max(fence, self.fences.get(run_id, 0))
        if fence < self.fences[run_id]:
            raise Fenced(f"run {run_id!r} has a newer attempt")
        origin = "live"
        if run_id not in self.live:
            origin = "restored" if run_id in self.states else "created"
            state = self.states.get(run_id) or State(base_model, lora)
            self.live[run_id] = Live(copy.deepcopy(state))
        state = self.live[run_id].state
        if (state.base_model, state.lora) != (base_model, lora):
            raise Conflict(f"run {run_id!r} is another")
        return replace_origin(self.status(run_id), origin)

    def status(self, run_id: str) -> RunStatus:
        state = self.found(run_id).state
        first = min(state.outcomes, default=state.next_seq)
        return RunStatus(run_id, state.next_seq, first, "live", state.optim_steps)

    def found(self, run_id: str) -> Live:
        if run_id not in self.live:
            raise RunLost(f"run {run_id!r} is not in memory")
        return self.live[run_id]

    def perform(self, run_id: str, live: Live) -> bool:
        """Do the next op, if it is here."""
        state = live.state
        op = live.waiting.get(state.next_seq)
        if op is None or live.failed:
            return False
        seq = state.next_seq
        if seq in self.poison:
            live.failed = NonFiniteLoss("The loss is nan.")
            return False
        del live.waiting[seq]
        self.done.append((run_id, seq, type(op).__name__))
        state.outcomes[seq] = self.result(run_id, state, op)
        state.next_seq = seq + 1
        if isinstance(op, SaveState):
            self.states[run_id] = copy.deepcopy(state)
        return True

    def result(self, run_id: str, state: State, op: Op) -> Result:
        if isinstance(op, ForwardBackward):
            if not op.forward_only:
                state.gradient = digest(state.gradient, msgspec.msgpack.encode(op.data).hex())
            return Result(metrics=metrics(state.weights, op))
        if isinstance(op, OptimStep):
            step = msgspec.msgpack.encode(op).hex()
            state.weights = digest(state.weights, state.gradient, step)
            state.gradient, state.optim_steps = "", state.optim_steps + 1
            return Result(metrics={"grad_norm:mean": number(state.weights, "norm")})
        if isinstance(op, SaveForSampling):
            files = self.make_files(state.weights)
            self.files[run_id, op.name] = files
            saved = [
                SavedFile(name, len(data), hashlib.sha256(data).hexdigest())
                for name, data in files.items()
            ]
            logprobs = [[-number(state.weights, "p")] * (len(row) - 1) for row in op.probe_tokens]
            probe = ProbeResult(op.probe_tokens, logprobs, "float32") if logprobs else None
            return Result(files=saved, probe=probe)
        return Result()


@dataclass
class FakeRun:
    """One run of a `FakeWorker`."""

    worker: FakeWorker
    run_id: str
    fence: int = 0

    async def open(self, base_model: str, spec: LoraSpec, fence: int) -> RunStatus:
        self.worker.trouble("open")
        self.fence = fence
        return self.worker.opened(self.run_id, base_model, spec, fence)

    async def submit(self, seq: int, op: Op, acked: int = 0) -> None:
        self.worker.trouble("submit")
        live = self._found()
        if seq < live.state.next_seq or live.known.setdefault(seq, op) != op:
            raise Conflict(f"op {seq} is another")
        live.waiting[seq] = op
        outcomes = live.state.outcomes
        for done in [done for done in outcomes if done <= acked]:
            del outcomes[done]
        self.worker.trouble("submitted")

    async def outcome(self, seq: int) -> Result:
        self.worker.trouble("outcome")
        await asyncio.sleep(self.worker.op_s)
        live = self._found()
        for _ in range(self.worker.eager + seq + 1 - live.state.next_seq):
            self.worker.perform(self.run_id, live)
            self.worker.trouble("performed")
        live = self._found()
        if seq in live.state.outcomes:
            return live.state.outcomes[seq]
        if live.failed is not None:
            raise live.failed
        raise AssertionError(f"nobody handed over op {seq}, or its outcome was given up")

    async def exchange(
        self, ops: Sequence[tuple[int, Op]], acked: int, wanted: tuple[int, int] | None
    ) -> list[Result]:
        self.worker.trouble("exchange")
        for seq, op in ops:
            await self.submit(seq, op, acked)
        found: list[Result] = []
        first, last = wanted or (1, 0)
        for seq in range(first, last + 1):
            try:
                found.append(await self.outcome(seq))
            except RequestError:
                if not found:
                    raise
                break
        return found

    async def cancel_ops(self) -> RunStatus:
        self.worker.trouble("cancel_ops")
        live = self._found()
        for seq in live.waiting:
            del live.known[seq]
        live.waiting.clear()
        live.failed = None
        return self.worker.status(self.run_id)

    async def unload(self) -> None:
        self.worker.trouble("unload")
        live = self._found()
        if live.waiting:
            raise Conflict("ops are waiting")
        self.worker.states[self.run_id] = copy.deepcopy(live.state)
        del self.worker.live[self.run_id]

    async def delete(self) -> None:
        self.worker.trouble("delete")
        self.worker.live.pop(self.run_id, None)
        self.worker.states.pop(self.run_id, None)
        for key in [key for key in self.worker.files if key[0] == self.run_id]:
            del self.worker.files[key]

    async def download(self, name: str, files: Sequence[SavedFile], folder: Path) -> None:
        self.worker.trouble("download")
        found = self.worker.files.get((self.run_id, name))
        if found is None:
            raise RunLost(f"run {self.run_id!r} has no files {name!r}")
        for file in files:
            assert hashlib.sha256(found[file.name]).hexdigest() == file.sha256
            (folder / file.name).write_bytes(found[file.name])

    def _found(self) -> Live:
        live = self.worker.found(self.run_id)
        if self.fence < self.worker.fences[self.run_id]:
            raise Fenced(f"run {self.run_id!r} has a newer attempt")
        return live


def unavailable() -> TrainerUnavailable:
    return TrainerUnavailable("The worker does not answer.")


def rendered(messages: Sequence[Mapping[str, object]]) -> Rendered:
    tokens: list[int] = []
    weights: list[float] = []
    for message in messages:
        text = str(message["content"])
        if text == "unspeakable":
            return Rendered(problem="the chat template refuses this")
        learned = message["role"] == "assistant" and message.get("weight", 1) == 1
        tokens += [ord(character) % 256 for character in text] + [1]
        weights += [float(learned)] * (len(text) + 1)
    shape = (len(tokens),)
    return Rendered(
        Tensor("int32", shape, array("i", tokens).tobytes()),
        Tensor("float32", shape, array("f", weights).tobytes()),
    )


def metrics(weights: str, op: ForwardBackward) -> dict[str, float]:
    """Sums that depend on the weights and the data."""
    masks = [memoryview(d.weights.data).cast("f") for d in op.data if d.weights is not None]
    total = float(sum(sum(mask) for mask in masks))
    tokens = float(sum(1 for mask in masks for weight in mask if weight))
    each = number(weights, msgspec.msgpack.encode(op.data).hex())
    found = {
        "loss:sum": each * total,
        "weight:sum": total,
        "tokens:sum": tokens,
        "correct:sum": float(int(tokens * each)),
        "seconds:max": 0.5,
    }
    if op.loss == "dpo":
        pairs = len(op.data) / 2
        found |= {
            "loss:sum": each * pairs,
            "pairs:sum": pairs,
            "reward_margin:sum": each * pairs,
            "reward_accuracy:sum": float(int(pairs * each)),
        }
    return found


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def number(*parts: str) -> float:
    """Between 0 and 1."""
    return int(digest(*parts)[:8], 16) / 0xFFFFFFFF


def replace_origin(status: RunStatus, origin: str) -> RunStatus:
    return msgspec.structs.replace(status, origin=origin)


def _no_weights(weights: str) -> dict[str, bytes]:
    return {"adapter_model.safetensors": weights.encode()}
