"""Passes of the model side by side give each run what one pass gives it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import TrainingFailed
from app.worker.trainers import hf
from app.worker.trainers.base import Pass
from app.worker.trainers.hf import LEAST_TOKENS, HfTrainer
from app.worker.trainers.packing import deal
from app.worker.trainers.passes import Work
from tests.worker.trainees import examples, spec, stir, trained, trainer

TASKS = [
    Pass("a", examples(1, [90, 100])),
    Pass("b", examples(2, [80]), "ppo"),
    Pass("c", examples(3, [60, 60]), "dpo"),
    Pass("d", examples(4, [120]), forward_only=True),
    Pass("a", examples(5, [40])),
]


@pytest.fixture
def side_by_side(tiny: Path) -> Callable[[int], HfTrainer]:
    """A trainer with so many passes at once, and runs a to d."""

    def make(count: int) -> HfTrainer:
        engine, _ = trainer(tiny / "model", side_by_side=count)
        for seed, run in enumerate("abcd"):
            engine.create(run, spec(seed, rank=2 + 2 * (seed % 2)))
            stir(engine, run, seed)
        return engine

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The thread of each pass, and how many works it had."""
    done: list[tuple[int, int]] = []
    compute = hf.compute

    def counted(model: Any, works: Sequence[Work], limit: int) -> None:
        done.append((threading.get_ident(), len(works)))
        compute(model, works, limit)

    monkeypatch.setattr(hf, "compute", counted)
    return done


def test_each_run_gets_what_one_pass_gives(
    side_by_side: Callable[[int], HfTrainer], calls: list[tuple[int, int]]
) -> None:
    one, three = side_by_side(1), side_by_side(3)
    wanted = [trained(result) for result in one.forward_backward(TASKS)]
    assert [works for _, works in calls] == [len(TASKS)]
    calls.clear()
    found = [trained(result) for result in three.forward_backward(TASKS)]
    assert len(calls) == 3
    assert sum(works for _, works in calls) == len(TASKS)
    assert len({thread for thread, _ in calls}) > 1
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.metrics["loss:sum"] == pytest.approx(theirs.metrics["loss:sum"], rel=1e-6)
        for mine, its in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert torch.allclose(mine, its, atol=1e-6)
    for run in "abc":
        gradient = one._runs[run].gradient
        apart = float((three._runs[run].gradient - gradient).abs().max())
        assert apart <= 1e-6 * float(gradient.abs().max())
    three.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("passes")]


def test_few_tokens_are_one_pass(
    side_by_side: Callable[[int], HfTrainer], calls: list[tuple[int, int]]
) -> None:
    engine = side_by_side(3)
    small = [Pass(run, examples(1, [LEAST_TOKENS // 3])) for run in "abcd"]
    assert all(trained(result) for result in engine.forward_backward(small))
    assert [works for _, works in calls] == [len(small)]


def test_a_run_that_fails_beside_others_fails_alone(
    side_by_side: Callable[[int], HfTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, compute = side_by_side(2), hf.compute

    def fail(model: Any, works: Sequence[Work], limit: int) -> None:
        if any(work.task.run == "b" for work in works):
            raise RuntimeError("b is guilty")
        compute(model, works, limit)

    monkeypatch.setattr(hf, "compute", fail)
    results = engine.forward_backward(TASKS)
    assert [isinstance(result, TrainingFailed) for result in results] == [
        task.run == "b" for task in TASKS
    ]
    assert not engine._runs["b"].gradient.any()
    assert engine._runs["a"].gradient.any()


def test_a_defect_is_told_when_no_pass_goes_on(
    side_by_side: Callable[[int], HfTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or one would be in the middle of a model that the next has begun with."""
    engine, here = side_by_side(2), threading.get_ident()
    raised, ended = threading.Event(), threading.Event()

    def crash(model: Any, works: Sequence[Work], limit: int) -> None:
        if threading.get_ident() == here:
            raised.set()
            raise LookupError("a defect")
        assert raised.wait(5)
        ended.set()

    monkeypatch.setattr(hf, "compute", crash)
    with pytest.raises(LookupError):
        engine.forward_backward(TASKS)
    assert ended.is_set()


def test_hands_are_even() -> None:
    assert deal([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]
    assert deal([7], 3) == [[0], [], []]
