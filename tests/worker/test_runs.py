"""Runs: order, idempotency, fences, failures, turns; on an engine whose weights are its history."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.errors import (
    Conflict,
    Fenced,
    InvalidRequest,
    LoragateError,
    OutOfMemory,
    RunLost,
    StorageUnavailable,
    TrainerBusy,
)
from app.ops import (
    Datum,
    ForwardBackward,
    LoadState,
    Op,
    OpenRun,
    OptimStep,
    Outcome,
    Sample,
    SaveForSampling,
    SaveState,
    Tensor,
)
from app.worker.trainers.oplog import MAX_WAITING
from app.worker.trainers.runs import IDLE_S
from tests.fakes.trainer import FakeTrainer
from tests.waiting import until
from tests.worker.made_runs import LORA, VOCAB, Worker, ids, passing


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncGenerator[Worker]:
    made = Worker(tmp_path / "runs")
    await made.start()
    yield made
    made.trainer.gate.set()
    await made.runs.stop()


async def test_ops_are_done_in_the_order_of_their_numbers(worker: Worker) -> None:
    status = await worker.open()
    assert (status.origin, status.next_seq, status.first_outcome) == ("created", 1, 1)
    for seq in (3, 2, 4, 1):
        worker.submit(seq, passing(seq))
    await worker.outcome(4)
    assert worker.done() == ["pass:1", "pass:2", "pass:3", "pass:4"]
    assert len(worker.trainer.threads) == 1


async def test_the_same_op_again_changes_nothing(worker: Worker) -> None:
    await worker.open()
    first = await worker.did(1, passing(7))
    worker.submit(1, passing(7))
    worker.submit(3, passing(9))
    worker.submit(3, passing(9))
    assert await worker.result(1) == first
    await worker.did(2, passing(8))
    await worker.outcome(3)
    assert worker.done() == ["pass:7", "pass:8", "pass:9"]


async def test_another_op_under_a_known_number_is_refused(worker: Worker) -> None:
    await worker.open()
    await worker.did(1, passing(7))
    worker.submit(5, passing(7))
    for seq in (1, 5):
        with pytest.raises(Conflict, match=f"op {seq} of run 'a'"):
            worker.submit(seq, passing(8))


async def test_an_outcome_is_kept_until_it_is_acknowledged(worker: Worker) -> None:
    await worker.open()
    for seq in (1, 2, 3):
        await worker.did(seq, passing(seq))
    worker.submit(4, passing(4), acked=2)
    assert (await worker.open()).first_outcome == 3
    with pytest.raises(RunLost, match="acknowledged"):
        await worker.outcome(2)
    await worker.outcome(3)


async def test_an_op_cannot_acknowledge_itself(worker: Worker) -> None:
    await worker.open()
    worker.submit(1, passing(1), acked=9)
    assert (await worker.outcome(1)).result is not None


async def test_who_waits_is_woken_by_its_own_op(worker: Worker) -> None:
    await worker.open()
    worker.trainer.gate.clear()
    for seq in (1, 2):
        worker.submit(seq, passing(seq, seconds=0.05))
    async with asyncio.TaskGroup() as tasks:
        first, second = (tasks.create_task(worker.outcome(seq)) for seq in (1, 2))
        await until(lambda: worker.trainer.calls)
        worker.trainer.gate.set()
        await asyncio.wait([first])
        assert not second.done()
    assert [first.result().seq, second.result().seq] == [1, 2]


async def test_a_wait_ends_with_nothing(worker: Worker) -> None:
    await worker.open()
    worker.submit(2, passing(2))
    assert await worker.runs.outcome("a", 2, fence=1, wait_s=0.01) is None
    assert await worker.runs.outcome("a", 2, fence=1, wait_s=0) is None
    with pytest.raises(RunLost, match="no outcome of op 3"):
        await worker.outcome(3)


async def test_several_outcomes_come_once_the_last_one_is_there(worker: Worker) -> None:
    await worker.open()
    worker.trainer.gate.clear()
    for seq in (1, 2, 3):
        worker.submit(seq, passing(seq))
    assert await worker.runs.outcomes("a", 1, 2, fence=1, wait_s=0.01) == []
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(worker.runs.outcomes("a", 1, 2, fence=1, wait_s=10))
        await until(lambda: worker.trainer.calls)
        assert not waiting.done()
        worker.trainer.gate.set()
    assert [sequence_of(each) for each in waiting.result()] == [1, 2]
    await worker.outcome(3)
    worker.submit(9, passing(9))  # for which somebody would wait
    found = await worker.runs.outcomes("a", 2, 9, fence=1, wait_s=0.01)
    assert [sequence_of(each) for each in found] == [2, 3]
    with pytest.raises(RunLost, match="no outcome of op 4"):
        await worker.runs.outcomes("a", 4, 9, fence=1, wait_s=0)


async def test_a_failure_among_several_outcomes_is_told_when_it_is_the_first(
    worker: Worker,
) -> None:
    await worker.open()
    worker.submit(3, OptimStep(0.1))
    worker.submit(2, passing(2, fail=1))
    worker.submit(1, passing(1))
    (done,) = await worker.runs.outcomes("a", 1, 3, fence=1, wait_s=10)
    assert sequence_of(done) == 1
    (failed,) = await worker.runs.outcomes("a", 2, 3, fence=1, wait_s=10)
    outcome = msgspec.msgpack.decode(failed, type=Outcome)
    assert outcome.failure is not None
    assert outcome.failure.code == "non_finite_loss"


def sequence_of(outcome: bytes) -> int:
    return msgspec.msgpack.decode(outcome, type=Outcome).seq


async def test_a_failed_op_fails_what_follows_until_it_is_cancelled(worker: Worker) -> None:
    await worker.open()
    await worker.did(1, passing(1))
    worker.submit(2, passing(2, fail=1))
    worker.submit(3, OptimStep(0.1))
    for seq in (2, 3):
        failure = (await worker.outcome(seq)).failure
        assert failure is not None
        assert failure.code == "non_finite_loss"
    worker.submit(4, OptimStep(0.1))
    assert (await worker.outcome(4)).failure is not None
    assert (await worker.open()).next_seq == 2
    assert (await worker.runs.cancel("a", fence=1)).next_seq == 2
    await worker.did(2, OptimStep(0.2))
    assert worker.done() == ["pass:1", "optim:0.2"]


async def test_a_failure_harms_no_other_run(worker: Worker) -> None:
    await worker.open("a")
    await worker.open("b")
    worker.submit(1, passing(1, fail=1), run="a")
    worker.submit(1, passing(1), run="b")
    assert (await worker.outcome(1, "a")).failure is not None
    assert (await worker.outcome(1, "b")).result is not None


async def test_a_bug_of_the_engine_says_nothing_of_its_insides(worker: Worker) -> None:
    await worker.open()
    worker.submit(1, passing(1, crash=1))
    failure = (await worker.outcome(1)).failure
    assert failure is not None
    assert failure.code == "training_failed"
    assert "secret" not in failure.message
    await worker.runs.cancel("a", fence=1)
    await worker.did(1, passing(1))


@pytest.mark.parametrize(
    ("op", "said"),
    [
        (ForwardBackward([]), "`data` is empty"),
        (ForwardBackward([Datum(ids(1, VOCAB), ids(1, 1))]), "id 100; ids are 0 to 99"),
        (ForwardBackward([Datum(ids(1), ids(1, 1))]), "2 ids for 1 tokens"),
        (ForwardBackward([Datum(ids(), ids())]), "has 0 tokens; 1 to 64"),
        (ForwardBackward([Datum(ids(*[1] * 65), ids(*[1] * 65))]), "has 65 tokens"),
        (ForwardBackward([Datum(ids(1), ids(1))], loss="dpo"), "takes pairs"),
        (ForwardBackward([Datum(ids(1), ids(1))], loss="ppo"), "needs `logprobs`"),
        (ForwardBackward([Datum(ids(1), ids(1), weights=ids(1))]), "must be float32"),
        (
            ForwardBackward([Datum(ids(1), ids(1), weights=Tensor("float32", (2,), bytes(8)))]),
            "2 numbers for 1 tokens",
        ),
        (ForwardBackward([Datum(Tensor("float32", (1,), bytes(4)), ids(1))]), "ids are int32"),
        (ForwardBackward([Datum(Tensor("int32", (2, 1), bytes(8)), ids(1))]), "one-dimensional"),
        (LoadState("other"), "'other' has no state"),
        (LoadState("../a"), "cannot be a name"),
        (SaveForSampling("a/b"), "cannot be a name"),
        (SaveForSampling("x", [[1]]), "has 1 ids; 2 to 64"),
        (SaveForSampling("x", [[1, -1]]), "has the id -1"),
        (Sample([[1]]), "has no sampler"),
    ],
)
async def test_an_op_that_asks_for_what_cannot_be(worker: Worker, op: Op, said: str) -> None:
    await worker.open()
    worker.submit(1, op)
    failure = (await worker.outcome(1)).failure
    assert failure is not None
    assert failure.code == "invalid_request"
    assert said in failure.message
    assert worker.done() == []


async def test_outputs_are_the_logprobs_of_each_sequence(worker: Worker) -> None:
    await worker.open()
    data = [Datum(ids(1, 2), ids(2, 3)), Datum(ids(4), ids(5))]
    result = await worker.did(1, ForwardBackward(data, outputs=True))
    assert [(each.dtype, each.shape) for each in result.outputs] == [
        ("float32", (2,)),
        ("float32", (1,)),
    ]
    assert result.metrics["tokens:sum"] == 3


async def test_cancelling_frees_the_numbers_of_what_has_not_begun(worker: Worker) -> None:
    await worker.open()
    worker.trainer.gate.clear()
    for seq in (1, 2, 3):
        worker.submit(seq, passing(seq))
    await until(lambda: worker.trainer.calls)
    async with asyncio.TaskGroup() as tasks:
        lost = tasks.create_task(_error(worker.outcome(2)))
        cancelled = tasks.create_task(worker.runs.cancel("a", fence=1))
        await asyncio.wait([lost])
        assert not cancelled.done()
        worker.trainer.gate.set()
    assert isinstance(lost.result(), RunLost)
    assert cancelled.result().next_seq == 2
    await worker.did(2, passing(9))
    assert worker.done() == ["pass:1", "pass:9"]


async def test_what_fails_while_ops_are_cancelled_is_cancelled_too(worker: Worker) -> None:
    await worker.open()
    worker.trainer.gate.clear()
    worker.submit(1, passing(1, fail=1))
    await until(lambda: worker.trainer.calls)
    async with asyncio.TaskGroup() as tasks:
        cancelled = tasks.create_task(worker.runs.cancel("a", fence=1))
        await asyncio.sleep(0)
        worker.trainer.gate.set()
    assert cancelled.result().next_seq == 1
    await worker.did(1, passing(2))


async def test_a_newer_attempt_has_the_run(worker: Worker) -> None:
    await worker.open(fence=1)
    worker.submit(2, passing(2))
    waiting = asyncio.get_running_loop().create_task(_error(worker.outcome(2, fence=1)))
    await asyncio.sleep(0)
    status = await worker.open(fence=2)
    assert (status.origin, status.next_seq) == ("live", 1)
    assert isinstance(await waiting, Fenced)
    with pytest.raises(Fenced, match="attempt 2 has run 'a'"):
        worker.submit(1, passing(1), fence=1)
    for refused in (
        worker.open(fence=1),
        worker.runs.cancel("a", fence=1),
        worker.runs.unload("a", fence=1),
        worker.runs.delete("a", fence=1),
    ):
        with pytest.raises(Fenced):
            await refused
    worker.submit(1, passing(1), fence=2)
    await worker.outcome(1, fence=2)


async def test_a_fence_outlives_the_worker(worker: Worker) -> None:
    await worker.open(fence=3)
    await worker.restart()
    with pytest.raises(Fenced):
        await worker.runs.delete("a", fence=2)
    with pytest.raises(Fenced):
        await worker.open(fence=2)
    assert (await worker.open(fence=3)).origin == "created"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (OpenRun("huge", LORA), "this worker trains 'tiny'"),
        (OpenRun("tiny", msgspec.structs.replace(LORA, rank=9)), "rank 9: 1 to 8"),
        (OpenRun("tiny", msgspec.structs.replace(LORA, rank=0)), "rank 0"),
        (OpenRun("tiny", msgspec.structs.replace(LORA, alpha=0)), "alpha 0"),
        (OpenRun("tiny", msgspec.structs.replace(LORA, target_modules=["x"])), r"\['x'\]"),
        (OpenRun("tiny", msgspec.structs.replace(LORA, target_modules=[])), "one or more of"),
    ],
)
async def test_a_run_that_cannot_be_trained_here(worker: Worker, asked: OpenRun, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        await worker.runs.open("a", asked)
    assert (await worker.runs.info()).runs == []


async def test_a_run_s_name_is_no_path(worker: Worker) -> None:
    for name in ("..", ".tmp-1", "a/b", "", "x" * 201):
        with pytest.raises(InvalidRequest, match="cannot be a name"):
            await worker.open(name)


async def test_another_adapter_under_the_same_name_is_refused(worker: Worker) -> None:
    await worker.open()
    other = msgspec.structs.replace(LORA, rank=8)
    with pytest.raises(Conflict, match="rank=4"):
        await worker.open(lora=other)
    await worker.restart()
    with pytest.raises(Conflict, match="rank=4"):
        await worker.open(lora=other)


async def test_memory_for_no_other_run(worker: Worker) -> None:
    await worker.runs.stop()
    worker.trainer = FakeTrainer(memory=1)
    await worker.start()
    await worker.open("a")
    with pytest.raises(OutOfMemory):
        await worker.open("b")
    assert not (worker.root / "b").exists()
    await worker.did(1, passing(1))


async def test_too_many_wait(worker: Worker) -> None:
    await worker.open()
    worker.submit(MAX_WAITING, passing(1))
    with pytest.raises(TrainerBusy, match="at most 1024 may wait"):
        worker.submit(MAX_WAITING + 1, passing(1))
    with pytest.raises(InvalidRequest, match="first op of a run is 1"):
        worker.submit(0, passing(1))


async def test_too_many_bytes_wait(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.worker.trainers.runs.MAX_WAITING_BYTES", 10)
    await worker.open()
    with pytest.raises(TrainerBusy, match="0 bytes of ops wait"):
        worker.submit(2, passing(2))
    await worker.did(1, passing(1))


async def test_unloading_and_taking_up_again(worker: Worker) -> None:
    await worker.open()
    await worker.did(1, passing(1))
    worker.submit(3, passing(3))
    with pytest.raises(Conflict, match="wait"):
        await worker.runs.unload("a", fence=1)
    await worker.runs.cancel("a", fence=1)
    await worker.runs.unload("a", fence=1)
    assert worker.trainer.runs == {}
    with pytest.raises(RunLost):
        worker.submit(2, passing(2))
    summary = (await worker.runs.info()).runs
    assert [(each.run, each.live, each.next_seq) for each in summary] == [("a", False, 2)]
    status = await worker.open()
    assert (status.origin, status.next_seq, status.first_outcome) == ("restored", 2, 1)
    await worker.did(2, passing(2))
    assert worker.done() == ["pass:1", "pass:2"]


async def test_the_run_idle_for_longest_makes_room(worker: Worker) -> None:
    worker.max_runs = 2
    await worker.restart()
    await worker.open("a")
    await worker.did(1, passing(1), "a")
    worker.clock.seconds += 1
    await worker.open("b")
    with pytest.raises(TrainerBusy, match="none is idle, so run 'c' must wait"):
        await worker.open("c")
    worker.clock.seconds += IDLE_S
    await worker.open("c")
    assert sorted(worker.trainer.runs) == ["b", "c"]
    worker.submit(2, passing(2), "b")
    worker.clock.seconds += IDLE_S
    assert (await worker.open("a")).origin == "restored"
    assert sorted(worker.trainer.runs) == ["a", "b"]
    assert worker.done("a") == ["pass:1"]


async def test_deleting_leaves_nothing(worker: Worker) -> None:
    await worker.open()
    await worker.did(1, SaveForSampling("s"))
    await worker.did(2, SaveState())
    worker.trainer.gate.clear()
    worker.submit(3, passing(3))
    await until(lambda: worker.trainer.calls)
    worker.submit(4, passing(4))
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(_error(worker.outcome(4)))
        deleted = tasks.create_task(worker.runs.delete("a", fence=1))
        await asyncio.sleep(0)
        worker.trainer.gate.set()
    assert deleted.exception() is None
    assert isinstance(waiting.result(), RunLost)
    assert worker.trainer.runs == {}
    assert [each.name for each in worker.root.iterdir()] == [".lock"]
    await worker.runs.delete("a", fence=None)
    assert (await worker.open()).origin == "created"


async def test_due_passes_are_done_together(worker: Worker) -> None:
    for run in "abc":
        await worker.open(run)
    worker.trainer.gate.clear()
    worker.submit(1, passing(1), "a")
    await until(lambda: worker.trainer.calls)
    for run in "bc":
        worker.submit(1, passing(1), run)
    worker.submit(2, OptimStep(0.1), "a")
    worker.submit(3, passing(3), "a")
    worker.trainer.gate.set()
    await worker.outcome(3, "a")
    assert worker.trainer.calls == [("a",), ("a", "b", "c")]
    assert (worker.runs.turns.passing.times, worker.runs.turns.shared) == (2, 1)


async def test_one_run_s_many_cheap_ops_do_not_hold_up_a_pass(worker: Worker) -> None:
    await worker.open("a")
    await worker.open("b")
    worker.trainer.gate.clear()
    worker.submit(1, passing(1), "b")
    await until(lambda: worker.trainer.calls)
    for seq in range(1, 51):
        worker.submit(seq, OptimStep(0.1), "a")
    worker.submit(2, passing(2), "b")
    worker.trainer.gate.set()
    await worker.outcome(2, "b")
    assert len(worker.done("a")) < 20
    await worker.outcome(50, "a")


async def test_ending_holds_nobody_up(worker: Worker) -> None:
    await worker.open()
    worker.submit(2, passing(2))
    waiting = asyncio.get_running_loop().create_task(
        worker.runs.outcome("a", 2, fence=1, wait_s=30)
    )
    await asyncio.sleep(0)
    worker.runs.let_go()
    assert await waiting is None
    await worker.runs.stop()
    assert worker.trainer.closed
    await worker.start()


async def test_a_full_disk_fails_a_save_and_no_training(worker: Worker) -> None:
    await worker.open()
    await worker.did(1, passing(1))
    worker.trainer.disk_full = True
    worker.submit(2, SaveState())
    with pytest.raises(StorageUnavailable, match="No space left"):
        await worker.outcome(2)
    with pytest.raises(StorageUnavailable):
        await worker.runs.unload("a", fence=1)
    worker.trainer.disk_full = False
    assert (await worker.open(fence=2)).next_seq == 2
    worker.submit(2, SaveState(), fence=2)
    assert (await worker.outcome(2)).result is not None
    assert sorted(each.name for each in (worker.root / "a").iterdir()) == ["run.json", "state-2"]


async def _error(work: Any) -> LoragateError | None:
    try:
        await work
    except LoragateError as exc:
        return exc
    return None
