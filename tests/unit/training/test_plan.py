"""Plans: hyperparameters that were left open, batches, rates, and the numbers of ops."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.training.plan import (
    MAX_AUTO_BATCH,
    MAX_AUTO_EPOCHS,
    OpKind,
    Plan,
    Saves,
    base_learning_rate,
    decide,
)
from app.training.spec import FineTuneSpec
from tests.unit.training.made import settings

plans = st.builds(
    lambda examples, held_out, seed, epochs, batch: Plan(
        examples, held_out, seed, settings(epochs, batch)
    ),
    st.integers(1, 40),
    st.integers(0, 9),
    st.integers(0, 2**32),
    st.integers(1, 4),
    st.integers(1, 9),
)
changes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), max_size=3).map(
    lambda steps: [
        (sum(first for first, _ in steps[: at + 1]), every) for at, (_, every) in enumerate(steps)
    ]
)


def spec(**more: object) -> FineTuneSpec:
    given_ = {"base_model": "tiny", "model": "ft:tiny::abcdefgh", "training_file": "f", "seed": 1}
    return FineTuneSpec.from_json({**given_, **more})


@pytest.mark.parametrize(
    ("examples", "epochs"), [(1, 25), (4, 25), (10, 10), (34, 3), (1000, 3), (9000, 2), (10**6, 1)]
)
def test_small_files_are_seen_more_often(examples: int, epochs: int) -> None:
    assert decide(spec(), examples, 2000).n_epochs == epochs


@pytest.mark.parametrize(("examples", "size"), [(1, 1), (50, 1), (100, 2), (500, 8), (10**5, 32)])
def test_batches_leave_enough_steps(examples: int, size: int) -> None:
    assert decide(spec(), examples, None).batch_size == size


@given(st.integers(1, 10**6))
def test_what_is_decided_is_within_bounds(examples: int) -> None:
    decided = decide(spec(), examples, None)
    assert 1 <= decided.n_epochs <= MAX_AUTO_EPOCHS
    assert 1 <= decided.batch_size <= min(MAX_AUTO_BATCH, examples)
    assert decided.batch_size & (decided.batch_size - 1) == 0


def test_wider_bases_learn_slower_and_pairs_slower_still() -> None:
    assert base_learning_rate("supervised", None) == base_learning_rate("supervised", 2000) == 5e-4
    assert 2.8e-4 < base_learning_rate("supervised", 4096) < 2.9e-4
    assert base_learning_rate("dpo", 2000) == pytest.approx(5e-5)


def test_a_multiplier_and_an_absolute_rate_say_the_same() -> None:
    doubled = decide(spec(learning_rate_multiplier=2.0), 10, 2000)
    assert doubled.learning_rate == pytest.approx(1e-3)
    absolute = decide(spec(learning_rate=1e-3, learning_rate_multiplier=9.0), 10, 2000)
    assert absolute.learning_rate == 1e-3
    assert absolute.learning_rate_multiplier == pytest.approx(2.0)


def test_what_is_asked_for_is_done() -> None:
    asked = {
        "n_epochs": 7,
        "batch_size": 3,
        "warmup_ratio": 0.0,
        "weight_decay": 0.1,
        "lr_schedule": "cosine",
        "grad_clip_norm": 0.0,
        "beta": 0.5,
    }
    decided = decide(spec(method="dpo", **asked), 100, None)
    assert {name: getattr(decided, name) for name in asked} == asked
    assert decide(spec(batch_size=50), 10, None).batch_size == 10
    assert decide(spec(beta=0.5), 10, None).beta is None


@given(plans)
def test_each_epoch_has_every_example_once(plan: Plan) -> None:
    per_epoch = plan.steps_per_epoch
    for epoch in range(plan.settings.n_epochs):
        steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        batches = [plan.batch(step) for step in steps]
        assert all(1 <= len(batch) <= plan.settings.batch_size for batch in batches)
        assert sorted(index for batch in batches for index in batch) == list(range(plan.examples))
    held_out = [i for part in range(plan.validation_parts) for i in plan.validation_part(part)]
    assert held_out == list(range(plan.validation))


def test_the_order_is_known_and_changes_with_seed_and_epoch() -> None:
    plan = Plan(6, 0, seed=1, settings=settings(epochs=2, batch=6))
    assert plan.batch(1) == (2, 1, 0, 4, 3, 5), "a job that is taken over must see the same order"
    assert plan.batch(2) != plan.batch(1)
    assert Plan(6, 0, seed=2, settings=settings(epochs=2, batch=6)).batch(1) != plan.batch(1)


@given(plans, st.sampled_from(["linear", "cosine", "constant"]), st.floats(0, 0.9))
def test_the_rate_rises_then_falls_and_is_never_nothing(
    plan: Plan, schedule: str, warmup: float
) -> None:
    changed = msgspec.structs.replace(plan.settings, lr_schedule=schedule, warmup_ratio=warmup)
    plan = Plan(plan.examples, plan.validation, plan.seed, changed)
    rates = [plan.learning_rate(step) for step in range(1, plan.steps + 1)]
    assert all(0 < rate <= changed.learning_rate for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@given(plans, changes)
def test_ops_are_numbered_without_a_gap_and_say_all(
    plan: Plan, saves: list[tuple[int, int]]
) -> None:
    ops = list(plan.ops(Saves(saves)))
    assert [op.seq for op in ops] == list(range(1, len(ops) + 1))
    counts = Counter(op.kind for op in ops)
    epochs = plan.settings.n_epochs
    assert counts[OpKind.FORWARD_BACKWARD] == counts[OpKind.OPTIM_STEP] == plan.steps
    assert counts[OpKind.SAVE_FOR_SAMPLING] == epochs
    assert counts[OpKind.VALIDATE] == epochs * plan.validation_parts
    assert counts[OpKind.SAVE_STATE] >= epochs - 1
    assert len({(op.step, op.kind, op.part) for op in ops}) == len(ops), "twice the same"
    assert ops[-1].kind in (OpKind.SAVE_FOR_SAMPLING, OpKind.VALIDATE)


@given(plans, changes, st.integers(1, 300))
def test_a_plan_can_be_entered_anywhere(
    plan: Plan, saves: list[tuple[int, int]], first: int
) -> None:
    ops = list(plan.ops(Saves(saves)))
    assert list(plan.ops(Saves(saves), first)) == ops[first - 1 :]


@given(plans, changes, st.integers(1, 20), st.integers(1, 5))
def test_a_change_leaves_the_numbers_before_it(
    plan: Plan, saves: list[tuple[int, int]], later: int, every: int
) -> None:
    first = max([step for step, _ in saves], default=0) + later
    before = [op for op in plan.ops(Saves(saves)) if op.step < first]
    after = [op for op in plan.ops(Saves([*saves, (first, every)])) if op.step < first]
    assert before == after


def test_saves_follow_the_newest_change() -> None:
    saves = Saves([(3, 2), (8, 3)])
    assert [step for step in range(1, 15) if saves.after(step)] == [4, 6, 10, 13]
    assert saves.every == 3
    assert Saves().every is None
