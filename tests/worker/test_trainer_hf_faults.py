"""Who pays when a pass goes wrong: the run whose fault it is, and no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import (
    InvalidRequest,
    NonFiniteLoss,
    OutOfMemory,
    RequestError,
    RunLost,
    TrainingFailed,
)
from app.ops import OptimStep
from app.worker.trainers import hf
from app.worker.trainers.base import Example, Pass
from app.worker.trainers.hf import HfTrainer
from app.worker.trainers.passes import Work
from app.worker.trainers.shared import SharedModel
from tests.worker.trainees import examples, passes, spec, stir, trained, trainer

RUNS = ("before", "guilty", "after")
Compute = Callable[[SharedModel, Sequence[Work], int], None]


@pytest.fixture
def engine(tiny: Path) -> HfTrainer:
    """Three runs, each with a gradient already."""
    made, _ = trainer(tiny / "model")
    for seed, run in enumerate(RUNS):
        made.create(run, spec(seed))
        stir(made, run, seed)
    passes(made, *tasks(10))
    return made


def tasks(seed: int, **fields: Any) -> list[Pass]:
    """One of each run; `fields` are the guilty one's."""
    given = {run: {"examples": examples(seed + at, [20, 9])} for at, run in enumerate(RUNS)}
    given["guilty"] |= fields
    return [Pass(run, **given[run]) for run in RUNS]  # type: ignore[arg-type]


def only_the_guilty_fails(engine: HfTrainer, bad: list[Pass]) -> RequestError:
    """The others' results and gradients are those of passes without it."""
    before = {run: engine._runs[run].gradient.clone() for run in RUNS}
    results = engine.forward_backward(bad)
    after = {run: engine._runs[run].gradient.clone() for run in RUNS}
    assert torch.equal(after["guilty"], before["guilty"])
    for at in (0, 2):
        run = RUNS[at]
        engine._runs[run].gradient.copy_(before[run])
        (alone,) = passes(engine, bad[at])
        found = trained(results[at]).metrics["loss:sum"]
        assert found == pytest.approx(alone.metrics["loss:sum"], rel=1e-5)
        assert torch.allclose(after[run], engine._runs[run].gradient, atol=1e-3, rtol=1e-5)
        assert not torch.equal(after[run], before[run])
    failure = results[1]
    assert isinstance(failure, RequestError)
    return failure


def test_a_loss_that_is_not_a_number_harms_its_own_run_only(engine: HfTrainer) -> None:
    given = examples(3, [12, 30])
    given[1].weights[5] = torch.nan
    failure = only_the_guilty_fails(engine, tasks(20, examples=given))
    assert isinstance(failure, NonFiniteLoss)
    assert str(failure) == "The loss of run 'guilty' is nan."


def test_weights_that_are_not_numbers_harm_their_own_run_only(engine: HfTrainer) -> None:
    engine._runs["guilty"].weights[100] = torch.nan
    assert isinstance(only_the_guilty_fails(engine, tasks(20)), NonFiniteLoss)


def test_a_loss_that_overflows_is_infinite(engine: HfTrainer) -> None:
    given = [
        Example(one.tokens, one.targets, one.weights, one.weights - 1e4, -one.weights.abs() - 1)
        for one in examples(3, [12])
    ]
    failure = only_the_guilty_fails(engine, tasks(20, examples=given, loss="importance_sampling"))
    assert str(failure) == "The loss of run 'guilty' is inf."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": {"beta": 1.0}}, "cross_entropy has no config 'beta'"),
        ({"loss": "dpo", "examples": examples(1, [3])}, "in pairs"),
        ({"examples": examples(1, [4, 300])}, r"data\[1\] has 300 tokens; the base .* 256"),
        ({"examples": examples(1, [50], vocabulary=5000)}, r"data\[0\].tokens has id \d+; .* 0 to"),
        (
            {"examples": [Example(torch.tensor([1]), torch.tensor([-100]), torch.ones(1))]},
            r"data\[0\].targets has id -100; the base model's are 0 to 371",
        ),
    ],
)
def test_data_that_cannot_be_computed_is_its_own_runs_affair(
    engine: HfTrainer, fields: dict[str, Any], message: str
) -> None:
    failure = only_the_guilty_fails(engine, tasks(20, **fields))
    assert isinstance(failure, InvalidRequest)
    with pytest.raises(InvalidRequest, match=message):
        raise failure


def short_of_memory(fits: Callable[[Sequence[Work], int], bool], error: Exception) -> Compute:
    """What computing is on a machine where some passes do not fit."""
    real = hf.compute

    def compute(model: SharedModel, works: Sequence[Work], limit: int) -> None:
        real(model, works, limit)
        if not fits(works, limit):
            raise error

    return compute


def test_what_has_no_room_together_is_computed_apart(
    engine: HfTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [result.metrics["loss:sum"] for result in passes(engine, *tasks(20))]
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(hf, "compute", short_of_memory(lambda works, _: len(works) == 1, error))
    found = [result.metrics["loss:sum"] for result in passes(engine, *tasks(20))]
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_has_no_room_alone_is_computed_bit_by_bit(
    engine: HfTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = passes(engine, *tasks(20))[1].metrics["loss:sum"]
    error = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:98] . DefaultCPUAllocator: "
        "can't allocate memory: you tried to allocate 9 bytes."
    )
    monkeypatch.setattr(hf, "compute", short_of_memory(lambda _, limit: limit == 1, error))
    found = passes(engine, tasks(20)[1])[0].metrics["loss:sum"]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("not enough memory: 8 GB")])
def test_what_never_has_room_fails_by_itself(
    engine: HfTrainer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fits = short_of_memory(lambda works, _: all(work.task.run != "guilty" for work in works), error)
    monkeypatch.setattr(hf, "compute", fits)
    failure = only_the_guilty_fails(engine, tasks(20))
    assert isinstance(failure, OutOfMemory)
    assert str(failure) == (
        "A pass of run 'guilty' needs more memory than this trainer has, even alone. Shorten the "
        "longest examples, or give the worker more memory or "
        "LORAGATE_WORKER_GRADIENT_CHECKPOINTING=true."
    )


def test_any_other_failure_is_said_in_one_line(
    engine: HfTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("CUDA error: no kernel image\nCompile with TORCH_USE_CUDA_DSA")
    fits = short_of_memory(lambda works, _: all(work.task.run != "guilty" for work in works), error)
    monkeypatch.setattr(hf, "compute", fits)
    failure = only_the_guilty_fails(engine, tasks(20))
    assert type(failure) is TrainingFailed
    assert str(failure) == "A pass of run 'guilty' failed: CUDA error: no kernel image"


def test_a_run_too_large_to_make_is_refused(
    engine: HfTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(layout: object, seed: int) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr("app.worker.trainers.lora.Layout.first_weights", full)
    with pytest.raises(OutOfMemory, match=r"Making run 'large' needs .* a smaller lora_rank"):
        engine.create("large", spec())
    with pytest.raises(RunLost, match="no run 'large'"):
        engine.optim_step("large", OptimStep(1e-3))


def test_a_gradient_that_is_not_finite_is_no_step(engine: HfTrainer) -> None:
    state = engine._runs["guilty"]
    engine.optim_step("guilty", OptimStep(1e-3))
    weights, moments = state.weights.clone(), state.moments.exp_avg.clone()
    state.gradient[7] = torch.inf
    with pytest.raises(NonFiniteLoss, match="gradient of run 'guilty' is not finite"):
        engine.optim_step("guilty", OptimStep(1e-3))
    assert torch.equal(state.weights, weights)
    assert torch.equal(state.moments.exp_avg, moments)
    assert state.moments.steps == 1
    assert not state.gradient.any()
