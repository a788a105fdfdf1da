"""A training engine without a model: what it was told to do, in order, is all its weights are.

What comes in: what `base.Trainer` takes. What goes out: results that only the same ops in the
same order give. `config` of a pass scripts it: `fail` makes its loss not finite, `crash` raises
what no engine should, `seconds` is how long it takes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from app.domain import LoraSpec, Probe
from app.errors import NonFiniteLoss, OutOfMemory, TrainingFailed
from app.ops import OptimStep
from app.worker.trainers.base import Facts, Pass, PassResult

MODULES = ("q_proj", "v_proj")
MAX_LENGTH = 64


@dataclass
class FakeRun:
    """`done` has one word for each op that changed something."""

    spec: LoraSpec
    done: list[str] = field(default_factory=list)

    @property
    def value(self) -> float:
        """A number in [0, 1) that depends on every op done and their order."""
        digest = hashlib.sha256("|".join(self.done).encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48


class FakeTrainer:
    """`calls` has the runs of each call of `forward_backward`; `disk_full` breaks writing.

    `memory` is how many runs fit.
    """

    def __init__(self, *, memory: int = 1000, pass_s: float = 0.0) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.calls: list[tuple[str, ...]] = []
        self.threads: set[int] = set()
        self.disk_full = False
        self.closed = False
        self.gate = threading.Event()
        self.gate.set()
        self._memory = memory
        self._pass_s = pass_s

    @property
    def facts(self) -> Facts:
        return Facts("hf", "float32", MAX_LENGTH, MODULES, {"tp": 1, "pp": 1, "dp": 1})

    def create(self, run: str, spec: LoraSpec) -> None:
        self.threads.add(threading.get_ident())
        if len(self.runs) >= self._memory:
            raise OutOfMemory(f"no memory for run {run!r}")
        self.runs[run] = FakeRun(spec)

    def drop(self, run: str) -> None:
        self.runs.pop(run, None)

    def forward_backward(self, passes: Sequence[Pass]) -> list[PassResult | TrainingFailed]:
        self.threads.add(threading.get_ident())
        self.calls.append(tuple(each.run for each in passes))
        self.gate.wait(10)
        time.sleep(self._pass_s + sum(each.config.get("seconds", 0.0) for each in passes))
        if any(each.config.get("crash") for each in passes):
            raise ZeroDivisionError("a bug, with /secret/paths in its words")
        return [self._pass(each) for each in passes]

    def optim_step(self, run: str, step: OptimStep) -> Mapping[str, float]:
        self.threads.add(threading.get_ident())
        found = self.runs[run]
        found.done.append(f"optim:{step.learning_rate:g}")
        return {"grad_norm:mean": found.value}

    def save_state(self, run: str, folder: Path) -> None:
        assert not any(folder.iterdir())
        self._check_disk()
        (folder / "weights.json").write_text(json.dumps(self.runs[run].done))

    def load_state(self, run: str, folder: Path, *, optimizer: bool) -> None:
        self.runs[run].done = json.loads((folder / "weights.json").read_text())

    def save_adapter(self, run: str, folder: Path) -> None:
        self._check_disk()
        (folder / "adapter_config.json").write_text(json.dumps({"r": self.runs[run].spec.rank}))
        weights = json.dumps(self.runs[run].done).encode()
        (folder / "adapter_model.safetensors").write_bytes(weights)

    def probe(self, run: str, token_ids: Sequence[Sequence[int]]) -> Probe:
        value = self.runs[run].value
        rows = tuple(tuple(-value - each / 1000 for each in row[1:]) for row in token_ids)
        return Probe(tuple(map(tuple, token_ids)), rows, "float32")

    def close(self) -> None:
        self.closed = True

    def _check_disk(self) -> None:
        if self.disk_full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _pass(self, given: Pass) -> PassResult | TrainingFailed:
        found = self.runs[given.run]
        first = int(given.examples[0].tokens[0])
        if given.config.get("fail"):
            return NonFiniteLoss(f"the loss of run {given.run!r} is not finite")
        if not given.forward_only:
            found.done.append(f"pass:{first}")
        tokens = float(sum(len(each.tokens) for each in given.examples))
        metrics = {"loss:sum": found.value, "tokens:sum": tokens}
        return PassResult(metrics, [-each.targets.to(torch.float32) for each in given.examples])
