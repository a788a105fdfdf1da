"""The loop: each step and epoch told once and in order, whatever is lost on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import (
    Conflict,
    Fenced,
    NonFiniteLoss,
    RunLost,
    TrainerBusy,
    TrainerError,
    TrainerUnavailable,
)
from app.training.batches import Batches
from app.training.loop import LOOK_AHEAD, MAX_LOSSES
from app.training.patience import Patience
from app.training.plan import Saves
from tests.fakes.training_worker import FakeRun, FakeWorker, unavailable
from tests.fakes.virtual_time import VirtualClock, run
from tests.unit.training.made import LORA, Kept, batches, loop_of


class GatewayKilled(BaseException):
    """The process of the gateway ends here."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Batches]:
    """5 examples in batches of 2, twice, and 3 held out: 6 steps."""
    whole = batches(tmp_path_factory.mktemp("tokens"), held_out=3)
    yield whole
    assert whole.held_out is not None
    whole.examples.__exit__(None, None, None)
    whole.held_out.__exit__(None, None, None)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Batches]:
    """30 steps in one epoch, so that states are saved in between."""
    whole = batches(tmp_path_factory.mktemp("tokens"), count=30, batch=1, epochs=1)
    yield whole
    whole.examples.__exit__(None, None, None)


def uninterrupted(made: Batches, worker: FakeWorker | None = None) -> Kept:
    kept = Kept()
    assert run(loop_of(worker or FakeWorker(op_s=0.5), made, kept).run())
    return kept


def test_steps_and_epochs_are_told_in_order_with_their_numbers(made: Batches) -> None:
    worker = FakeWorker()
    kept = uninterrupted(made, worker)
    assert [step.step for step in kept.steps] == [1, 2, 3, 4, 5, 6]
    assert [epoch.step for epoch in kept.epochs] == [3, 6]
    # F O, F O, F O A V V S, F O, F O, F O A V V
    assert [step.seq for step in kept.steps] == [2, 4, 6, 12, 14, 16]
    assert [epoch.seq for epoch in kept.epochs] == [9, 19]
    assert [name for _, _, name in worker.done[6:10]] == [
        "SaveForSampling",
        "ForwardBackward",
        "ForwardBackward",
        "SaveState",
    ]
    assert len(worker.done) == 19


def test_a_loss_is_a_mean(made: Batches) -> None:
    for step in uninterrupted(made).steps:
        assert 0 < step.train.loss < 1
        assert 0 <= step.train.token_accuracy <= 1
        assert step.train.reward_margin is None
        assert step.learning_rate == made.plan.learning_rate(step.step)
        assert step.seconds == 0.5


def test_the_mean_of_pairs_is_over_pairs(tmp_path: Path) -> None:
    made = batches(tmp_path, method="dpo")
    with made.examples:
        kept = uninterrupted(made)
    for step in kept.steps:
        assert 0 < step.train.loss == step.train.reward_margin < 1


def test_an_epoch_has_the_loss_of_all_that_was_held_out(made: Batches) -> None:
    first, last = uninterrupted(made).epochs
    assert first.valid is not None
    assert last.valid is not None
    assert 0 < first.valid.loss < 1
    assert last.valid != first.valid
    assert first.probe is not None
    assert [len(row) for row in first.probe.token_ids] == [
        len(row) + 1 for row in first.probe.logprobs
    ]


def test_some_ops_are_handed_over_ahead(made: Batches) -> None:
    worker = FakeWorker()
    submitted: list[int] = []

    def trouble(request: str) -> None:
        if request == "outcome":
            live = worker.live["job-1"]
            submitted.append(len(live.waiting) + len(live.state.outcomes))

    worker.trouble = trouble
    uninterrupted(made, worker)
    assert submitted[0] == LOOK_AHEAD


def test_a_step_is_one_request(long: Batches) -> None:
    worker = FakeWorker()
    asked: list[str] = []
    worker.trouble = asked.append
    uninterrupted(long, worker)
    # Two requests more as it begins, when nothing is to be collected yet; one for the weights.
    assert asked.count("exchange") == 30 + 2 + 1


@given(st.data(), st.integers(0, 4), st.integers(1, 3))
def test_killed_at_any_moment_it_comes_to_the_same(
    made: Batches, data: st.DataObject, eager: int, every: int
) -> None:
    plain_worker = FakeWorker()
    expected = uninterrupted(made, plain_worker)
    ways = ["gateway", "worker", "both", "connection", "pause"]
    faults = data.draw(st.dictionaries(st.integers(1, 150), st.sampled_from(ways), max_size=6))
    calls = 0

    def trouble(request: str) -> None:
        nonlocal calls
        calls += 1
        way = faults.pop(calls, None)
        if way in ("worker", "both"):
            worker.kill()
        if way in ("gateway", "both"):
            raise GatewayKilled
        if way == "pause":
            patience.stop()
        elif way is not None and request not in ("step", "epoch", "saves"):
            raise unavailable()

    worker = FakeWorker(eager=eager, trouble=trouble, op_s=0.5)
    kept = Kept(trouble=trouble, every=every)

    async def drive() -> None:
        nonlocal patience
        for attempt in range(1, 10):
            patience = Patience(VirtualClock(), 60.0)
            with suppress(GatewayKilled, TrainerError):  # given back
                if await loop_of(worker, made, kept, fence=attempt, patience=patience).run():
                    return
                with suppress(RunLost, Conflict):
                    await FakeRun(worker, "job-1", fence=attempt).unload()
        raise AssertionError("too many attempts")

    patience = Patience(VirtualClock(), 60.0)
    run(drive())
    assert kept.steps == expected.steps
    assert kept.epochs == expected.epochs
    assert worker.files == plain_worker.files


@given(st.data(), st.lists(st.sampled_from([0.2, 1.0, 5.0]), min_size=1, max_size=4))
def test_states_saved_by_the_clock_change_nothing(
    long: Batches, data: st.DataObject, paces: list[float]
) -> None:
    expected = uninterrupted(long, FakeWorker())
    assert expected.changes == ()
    faults = data.draw(st.dictionaries(st.integers(1, 400), st.booleans(), max_size=5))
    calls = 0

    def trouble(request: str) -> None:
        nonlocal calls
        calls += 1
        worker.op_s = paces[calls * len(paces) // 400 % len(paces)]
        if (gateway := faults.pop(calls, None)) is None:
            return
        worker.kill()
        raise GatewayKilled if gateway or request in ("step", "epoch", "saves") else unavailable()

    worker = FakeWorker(trouble=trouble, op_s=paces[0])
    kept = Kept(trouble=trouble, every=2)

    async def drive() -> None:
        for attempt in range(1, 10):
            try:
                loop = loop_of(worker, long, kept, fence=attempt, checkpoint_s=3.0)
                assert await loop.run()
            except (GatewayKilled, TrainerError):  # given back
                continue
            return
        raise AssertionError("too many attempts")

    run(drive())
    told = [(s.step, s.train, s.grad_norm) for s in kept.steps]
    assert told == [(s.step, s.train, s.grad_norm) for s in expected.steps]
    assert [e.files for e in kept.epochs] == [e.files for e in expected.epochs]


def test_a_state_is_saved_about_as_often_as_asked(long: Batches) -> None:
    worker, kept = FakeWorker(op_s=0.5), Kept()  # a step takes a second
    assert run(loop_of(worker, long, kept, checkpoint_s=3.0).run())
    [(first, every)] = kept.changes
    assert every == 3
    assert [name for _, _, name in worker.done].count("SaveState") == (30 - first + 1) // every


def test_a_slow_step_is_enough_to_decide(long: Batches) -> None:
    worker, kept = FakeWorker(op_s=20.0), Kept()
    assert run(loop_of(worker, long, kept, checkpoint_s=30.0).run())
    assert kept.changes[0] == (4, 1)


def test_saves_are_decided_anew_when_steps_become_slower(long: Batches) -> None:
    worker, kept = FakeWorker(op_s=0.1), Kept()

    def trouble(request: str) -> None:
        if len(kept.steps) >= 10:
            worker.op_s = 1.0

    worker.trouble = trouble
    assert run(loop_of(worker, long, kept, checkpoint_s=2.0).run())
    assert [every for _, every in kept.changes] == [10, 1]


def test_the_worker_is_told_of_what_is_recorded_and_no_more(long: Batches) -> None:
    worker, kept = FakeWorker(), Kept(every=7)
    lowest: list[tuple[int, int]] = []

    def trouble(request: str) -> None:
        if request == "submitted":
            lowest.append((min(worker.live["job-1"].state.outcomes, default=1), kept.recorded))

    worker.trouble = trouble
    assert run(loop_of(worker, long, kept).run())
    assert all(first <= recorded + 1 for first, recorded in lowest)
    assert max(first for first, _ in lowest) == 43, "the last that 28 recorded steps leave"


@pytest.mark.parametrize("after", range(0, 25, 3))
def test_stopped_and_taken_up_again_it_goes_on_exactly(made: Batches, after: int) -> None:
    expected = uninterrupted(made)
    worker, kept = FakeWorker(op_s=1.0), Kept()

    async def drive() -> bool:
        patience = Patience(VirtualClock(), 60.0)
        asyncio.get_running_loop().call_later(after + 0.5, patience.stop)
        finished = await loop_of(worker, made, kept, patience=patience).run()
        assert not worker.live["job-1"].waiting
        await FakeRun(worker, "job-1", fence=1).unload()
        return finished

    finished = run(drive())
    before = len(worker.done)
    assert finished == (after > 19)
    assert before <= after + 1
    assert [step.seq for step in kept.steps] == [s.seq for s in expected.steps if s.seq <= before]
    assert run(loop_of(worker, made, kept, fence=2).run())
    assert kept.steps == expected.steps
    assert kept.epochs == expected.epochs
    assert len(worker.done) == 19, "something was done twice"


def test_stopped_while_the_worker_is_away_it_ends_at_once(made: Batches) -> None:
    def away(request: str) -> None:
        raise unavailable()

    async def drive() -> tuple[bool, float]:
        patience = Patience(VirtualClock(), 60.0)
        asyncio.get_running_loop().call_later(12.0, patience.stop)
        loop = loop_of(FakeWorker(trouble=away), made, Kept(), patience=patience)
        return await loop.run(), VirtualClock().monotonic()

    assert run(drive()) == (False, 12.0)


def test_stopped_before_it_began_it_begins_nothing(made: Batches) -> None:
    worker = FakeWorker()
    patience = Patience(VirtualClock(), 60.0)
    patience.stop()
    assert not run(loop_of(worker, made, Kept(), patience=patience).run())
    assert not worker.done


def test_a_step_that_is_not_finite_is_named(made: Batches) -> None:
    worker, kept = FakeWorker(), Kept()
    worker.poison.add(3)
    with pytest.raises(NonFiniteLoss, match=r"Step 2 of 6 failed: The loss is nan\."):
        run(loop_of(worker, made, kept).run())
    assert [step.step for step in kept.steps] == [1]


def test_a_worker_that_stays_away_is_given_up_after_patience(made: Batches) -> None:
    def away(request: str) -> None:
        raise unavailable()

    async def drive() -> float:
        with pytest.raises(TrainerUnavailable):
            await loop_of(FakeWorker(trouble=away), made, Kept()).run()
        return VirtualClock().monotonic()

    assert 60 <= run(drive()) < 66


def test_a_worker_without_room_is_waited_for(made: Batches) -> None:
    worker = FakeWorker()
    left = 3

    def full(request: str) -> None:
        nonlocal left
        left -= 1
        if left > 0:
            raise TrainerBusy("no room")

    worker.trouble = full
    assert len(uninterrupted(made, worker).steps) == 6


def test_a_worker_that_is_lost_at_one_place_again_and_again_is_given_up(made: Batches) -> None:
    worker = FakeWorker()
    opened = 0

    def trouble(request: str) -> None:
        nonlocal opened
        opened += request == "open"
        if request == "performed" and worker.live["job-1"].state.next_seq == 6:
            worker.kill()
            raise unavailable()

    worker.trouble = trouble
    kept = Kept()
    with pytest.raises(TrainerError, match="lost 4 times") as lost:
        run(loop_of(worker, made, kept).run())
    assert type(lost.value) is TrainerError  # and not that it is away: this is the job's doing
    assert opened == MAX_LOSSES + 1
    assert [step.step for step in kept.steps] == [1, 2]


def test_a_worker_that_is_lost_at_every_op_is_waited_for_each_time(made: Batches) -> None:
    expected = uninterrupted(made)
    worker, kept = FakeWorker(), Kept()
    furthest = 0

    def trouble(request: str) -> None:
        nonlocal furthest
        if request == "performed" and worker.live["job-1"].state.next_seq > furthest:
            furthest = worker.live["job-1"].state.next_seq
            worker.kill()
            raise unavailable()

    worker.trouble = trouble
    assert run(loop_of(worker, made, kept).run())
    assert furthest == 20
    assert kept.steps == expected.steps


def test_an_attempt_that_was_overtaken_stops(made: Batches) -> None:
    worker = FakeWorker()
    kept = Kept()

    def overtake(request: str) -> None:
        if request == "step" and len(kept.steps) == 2:
            worker.fences["job-1"] = 2

    kept.trouble = overtake
    with pytest.raises(Fenced):
        run(loop_of(worker, made, kept, fence=1).run())


def test_outcomes_that_are_gone_are_made_again(made: Batches) -> None:
    expected = uninterrupted(made)
    worker, kept = FakeWorker(), Kept()

    async def drive() -> None:
        other = worker.run("job-1")
        await other.open("tiny", LORA, 1)
        for op in list(made.plan.ops(Saves()))[:6]:
            await other.submit(op.seq, made.request(op), acked=op.seq - 1)
            await other.outcome(op.seq)

    run(drive())
    assert run(loop_of(worker, made, kept, fence=2).run())
    assert kept.steps == expected.steps


def test_weights_that_cannot_be_fetched_are_asked_for_again(made: Batches) -> None:
    expected = uninterrupted(made)
    kept = Kept()
    left = 2

    def trouble(request: str) -> None:
        nonlocal left
        if request == "epoch" and left:
            left -= 1
            raise RunLost("gone")

    kept.trouble = trouble
    assert run(loop_of(FakeWorker(), made, kept).run())
    assert kept.steps == expected.steps
    assert kept.epochs == expected.epochs
