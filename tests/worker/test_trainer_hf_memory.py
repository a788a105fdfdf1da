"""Passes on a machine that really has no memory for them: the process may map so much and no more.

What fails is torch's own allocator, in the middle of a pass, on the way there or back.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import OutOfMemory
from app.ops import OptimStep
from app.worker.trainers import hf
from app.worker.trainers.base import Pass
from app.worker.trainers.hf import HfTrainer
from app.worker.trainers.shared import SharedModel
from tests.worker.trainees import examples, passes, spec, stir, trained, trainer

RUNS = ("before", "guilty", "after")
#: Room for the passes of a few short examples, and not for the logits of a long one, 256 MB.
SPARE = 128 << 20
LONG = 1000
WAYS = {"there": (SharedModel, "logprobs"), "back": (torch.Tensor, "backward")}


@pytest.fixture(scope="module")
def engine(wide: Path) -> HfTrainer:
    made, _ = trainer(wide, side_by_side=1)
    for seed, run in enumerate(RUNS):
        made.create(run, spec(seed))
        stir(made, run, seed)
    return made


@pytest.fixture(autouse=True)
def no_gradients(engine: HfTrainer) -> None:
    for run in RUNS:
        engine._runs[run].gradient.zero_()


@pytest.fixture(params=WAYS)
def short_of_memory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """Let memory be short on one way through the model, and plenty on the other."""
    owner, name = WAYS[request.param]
    real = getattr(owner, name)

    def strapped(*arguments: Any) -> Any:
        with only(SPARE):
            return real(*arguments)

    return lambda: monkeypatch.setattr(owner, name, strapped)


@contextmanager
def only(spare: int) -> Iterator[None]:
    """This process may map `spare` bytes more than now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    # What goes while the limit holds would be room, and so is what the allocator keeps.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], bool]]:
    """Whose passes were computed together, and whether there was room."""
    seen: list[tuple[list[str], bool]] = []
    real = hf.compute

    def compute(model: SharedModel, works: Any, limit: int) -> None:
        seen.append(([work.task.run for work in works], False))
        real(model, works, limit)
        seen[-1] = (seen[-1][0], True)

    monkeypatch.setattr(hf, "compute", compute)
    return seen


def tasks(guilty: list[int]) -> list[Pass]:
    """One of each run, on examples so long."""
    return [
        Pass(run, examples(seed, guilty if run == "guilty" else [30, 9]))
        for seed, run in enumerate(RUNS)
    ]


def gradients(engine: HfTrainer) -> dict[str, torch.Tensor]:
    return {run: engine._runs[run].gradient.clone() for run in RUNS}


def test_who_has_no_room_in_a_shared_pass_fails_alone(
    engine: HfTrainer,
    short_of_memory: Callable[[], None],
    attempts: list[tuple[list[str], bool]],
) -> None:
    innocent = [task for task in tasks([LONG]) if task.run != "guilty"]
    expected = [passes(engine, task)[0].metrics["loss:sum"] for task in innocent]
    alone = gradients(engine)
    for run in RUNS:
        engine._runs[run].gradient.zero_()
    attempts.clear()
    short_of_memory()
    before, failure, after = engine.forward_backward(tasks([LONG]))

    assert isinstance(failure, OutOfMemory)
    assert "run 'guilty' needs more memory" in str(failure)
    assert [trained(each).metrics["loss:sum"] for each in (before, after)] == expected
    found = gradients(engine)
    assert not found["guilty"].any()
    assert all(torch.equal(found[run], alone[run]) for run in ("before", "after"))
    assert attempts == [
        (list(RUNS), False),
        (["before"], True),
        (["guilty"], False),
        (["guilty"], False),  # an example at a time
        (["after"], True),
    ]


def test_a_batch_that_has_no_room_is_computed_by_the_example(
    engine: HfTrainer,
    short_of_memory: Callable[[], None],
    attempts: list[tuple[list[str], bool]],
) -> None:
    many = Pass("guilty", examples(5, [40] * 25))
    (whole,) = passes(engine, many)
    expected = gradients(engine)["guilty"]
    engine._runs["guilty"].gradient.zero_()
    attempts.clear()
    short_of_memory()
    (found,) = passes(engine, many)

    assert attempts == [(["guilty"], False), (["guilty"], True)]
    assert found.metrics["loss:sum"] == pytest.approx(whole.metrics["loss:sum"], rel=1e-5)
    assert torch.allclose(gradients(engine)["guilty"], expected, rtol=1e-4, atol=1e-3)


def test_what_had_no_room_once_has_it_when_there_is_more(engine: HfTrainer) -> None:
    (task,) = (task for task in tasks([LONG]) if task.run == "guilty")
    with only(SPARE):
        (failure,) = engine.forward_backward([task])
    assert isinstance(failure, OutOfMemory)
    (found,) = passes(engine, task)
    assert found.metrics["tokens:sum"] > 0


def test_a_step_that_has_no_room_changes_nothing(engine: HfTrainer) -> None:
    engine.create("large", spec(rank=512, modules=["lm_head"]))  # 128 MB a vector
    state = engine._runs["large"]
    state.gradient.fill_(1e-6)
    before = state.weights.clone()
    with only(SPARE // 4), pytest.raises(OutOfMemory, match="A step of run 'large' needs"):
        engine.optim_step("large", OptimStep(1e-3))
    assert torch.equal(state.weights, before)
    assert not state.moments.exp_avg.any()
    assert state.moments.steps == 0
    engine.optim_step("large", OptimStep(1e-3))
    assert state.moments.steps == 1
    assert not torch.equal(state.weights, before)
    engine.drop("large")
