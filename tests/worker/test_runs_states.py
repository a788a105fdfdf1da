"""What is left on disk: whole states, the newest one, and nothing of what was cut short."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.domain import LoraSpec
from app.errors import InvalidRequest, StorageUnavailable
from app.ops import LoadState, Lora, OptimStep, SaveForSampling, SaveState
from app.worker.trainers.states import Manifest, Record, States
from tests.disks import full, small_disk
from tests.fakes.trainer import FakeTrainer
from tests.waiting import until
from tests.worker.made_runs import LORA, Worker, passing

RECORD = Record("tiny", LORA, 1)


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncGenerator[Worker]:
    made = Worker(tmp_path / "runs")
    await made.start()
    yield made
    await made.runs.stop()


@pytest.fixture
async def patient(tmp_path: Path) -> AsyncGenerator[Worker]:
    """One that has the time to save what no state holds when it is told to end."""
    made = Worker(tmp_path / "runs", save_s=10.0)
    await made.start()
    yield made
    await made.runs.stop()


@pytest.fixture
def states(tmp_path: Path) -> States:
    made = States(tmp_path / "runs")
    made.start()
    return made


def save(states: States, next_seq: int, text: str = "weights") -> None:
    with states.writing("a") as folder:
        (folder / "engine").mkdir()
        (folder / "engine" / "w").write_text(text)
        states.commit_state("a", folder, Manifest(RECORD, next_seq, 0, []))


def break_off(states: States, error: Exception) -> None:
    with states.writing("a") as folder:
        (folder / "half").write_text("x")
        raise error


async def test_a_killed_worker_goes_on_from_the_newest_state(worker: Worker) -> None:
    await worker.open()
    await worker.did(1, passing(1))
    await worker.did(2, OptimStep(0.5))
    await worker.did(3, SaveState())
    await worker.did(4, passing(4))
    await worker.did(5, SaveState())
    await worker.did(6, passing(6))
    assert sorted(each.name for each in (worker.root / "a").iterdir()) == ["run.json", "state-5"]
    kept = await worker.outcome(4)
    await worker.restart()
    status = await worker.open()
    assert (status.origin, status.next_seq, status.optim_steps) == ("restored", 6, 1)
    assert status.first_outcome == 1
    assert await worker.outcome(4) == kept
    assert (await worker.outcome(5)).result is not None
    assert worker.done() == ["pass:1", "optim:0.5", "pass:4"]
    worker.submit(4, passing(4))  # known still, by its digest
    await worker.did(6, passing(6))


async def test_told_to_end_a_worker_loses_nothing(patient: Worker) -> None:
    for run in ("a", "b"):
        await patient.open(run)
        await patient.did(1, passing(1), run)
    await patient.did(2, OptimStep(0.5), "a")
    await patient.did(2, SaveState(), "b")
    patient.trainer.gate.clear()
    patient.submit(3, passing(3), "a")
    patient.submit(4, passing(4), "a")  # not begun when the worker is told to end
    await until(lambda: patient.running("a") == 3)
    patient.runs.let_go()
    patient.trainer.gate.set()
    await patient.restart()
    status = await patient.open("a")
    assert (status.origin, status.next_seq, status.optim_steps) == ("restored", 4, 1)
    assert patient.done("a") == ["pass:1", "optim:0.5", "pass:3"]
    assert (await patient.outcome(3, "a")).result is not None
    assert (await patient.open("b")).next_seq == 3


async def test_told_to_end_a_full_disk_costs_no_other_run(
    patient: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in ("a", "b"):
        await patient.open(run)
        await patient.did(1, passing(1), run)
    write = patient.trainer.save_state

    def full(run: str, folder: Path) -> None:
        if run == "a":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(run, folder)

    monkeypatch.setattr(patient.trainer, "save_state", full)
    await patient.restart()
    assert (await patient.open("a")).origin == "created"
    assert (await patient.open("b")).next_seq == 2


async def test_told_to_end_it_waits_no_longer_than_it_may(worker: Worker) -> None:
    worker.save_s = 0.05
    await worker.restart()
    await worker.open()
    await worker.did(1, passing(1))
    worker.trainer.gate.clear()
    worker.submit(2, passing(2))
    await until(lambda: worker.running("a") == 2)
    stopping = asyncio.ensure_future(worker.runs.stop())
    await until(lambda: not worker.runs.alive)
    worker.trainer.gate.set()
    await stopping
    worker.trainer = FakeTrainer()
    await worker.start()
    assert (await worker.open()).origin == "created"


async def test_acknowledged_outcomes_are_not_written(worker: Worker) -> None:
    await worker.open()
    await worker.did(1, passing(1))
    await worker.did(2, passing(2))
    worker.submit(3, SaveState(), acked=1)
    await worker.outcome(3)
    await worker.restart()
    assert (await worker.open()).first_outcome == 2


async def test_a_state_of_another_run(worker: Worker) -> None:
    await worker.open("a")
    await worker.did(1, passing(1), "a")
    await worker.did(2, OptimStep(0.5), "a")
    await worker.did(3, SaveState(), "a")
    await worker.open("b")
    await worker.did(1, LoadState("a"), "b")
    assert worker.done("b") == ["pass:1", "optim:0.5"]
    assert (await worker.open("b")).optim_steps == 1


async def test_a_state_of_another_shape_is_refused(worker: Worker) -> None:
    await worker.open("a")
    await worker.did(1, SaveState(), "a")
    await worker.open("b", lora=Lora(8, 8, ["q_proj"], 1))
    worker.submit(1, LoadState("a"), "b")
    failure = (await worker.outcome(1, "b")).failure
    assert failure is not None
    assert "rank 4" in failure.message
    assert "rank 8" in failure.message


async def test_an_adapter_written_again_takes_the_place_of_the_first(worker: Worker) -> None:
    await worker.open()
    first = await worker.did(1, SaveForSampling("x"))
    await worker.did(2, passing(2))
    second = await worker.did(3, SaveForSampling("x", [[1, 2]]))
    assert first.files != second.files
    assert second.probe is not None
    path = await worker.runs.file("a", "x", "adapter_model.safetensors")
    assert path.read_text() == '["pass:2"]'
    assert sorted(each.name for each in (worker.root / "a").iterdir()) == ["adapters", "run.json"]


async def test_a_state_that_the_engine_cannot_read_holds_no_memory(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.open()
    await worker.did(1, SaveState())
    await worker.restart()

    def broken(*_: Any, **__: Any) -> None:
        raise InvalidRequest("no such weights")

    monkeypatch.setattr(worker.trainer, "load_state", broken)
    with pytest.raises(InvalidRequest):
        await worker.open()
    assert worker.trainer.runs == {}


async def test_a_state_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    worker = Worker(tmp_path / "file" / "runs")
    await worker.start()
    try:
        with pytest.raises(StorageUnavailable, match="LORAGATE_WORKER_STATE_DIR"):
            await worker.open()
        assert worker.trainer.runs == {}
        assert (await worker.runs.info()).runs == []
    finally:
        await worker.runs.stop()


def test_only_the_newest_is_kept(states: States) -> None:
    for next_seq in (3, 8):
        save(states, next_seq)
    found = states.newest("a")
    assert found is not None
    assert found[0].next_seq == 8
    assert [each.name for each in (states.root / "a").iterdir()] == ["state-7"]
    assert list(states.runs()) == [("a", 8)]


@pytest.mark.parametrize("harm", ["changed", "missing", "more", "manifest", "no manifest"])
def test_a_state_that_is_not_whole_is_passed_over(states: States, harm: str) -> None:
    save(states, 3)
    state = states.root / "a" / "state-2"
    whole = states.root / "a" / "aside"
    state.rename(whole)
    save(states, 8)
    whole.rename(state)
    newest = states.root / "a" / "state-7"
    match harm:
        case "changed":
            (newest / "engine" / "w").write_text("other")
        case "missing":
            (newest / "engine" / "w").unlink()
        case "more":
            (newest / "engine" / "v").write_text("")
        case "manifest":
            (newest / "manifest.json").write_text("{")
        case _:
            (newest / "manifest.json").unlink()
    found = states.newest("a")
    assert found is not None
    assert found[0].next_seq == 3
    (state / "manifest.json").unlink()
    assert states.newest("a") is None


def test_what_was_cut_short_is_swept_at_the_next_start(states: States) -> None:
    save(states, 3)
    for left in (states.root / ".tmp-1", states.root / "a" / ".tmp-2"):
        left.mkdir()
        (left / "half").write_text("x")
    (states.root / "a" / ".tmp-3").write_text("x")
    beside = States(states.root)
    beside.start()  # somebody is at work: nothing is swept
    assert (states.root / ".tmp-1").exists()
    beside.close()
    states.close()
    after = States(states.root)
    after.start()
    assert sorted(each.name for each in states.root.iterdir()) == [".lock", "a"]
    assert [each.name for each in (states.root / "a").iterdir()] == ["state-2"]
    after.close()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_nothing_half_done(states: States, error: Exception) -> None:
    save(states, 3)
    with pytest.raises(StorageUnavailable):
        break_off(states, error)
    assert [each.name for each in (states.root / "a").iterdir()] == ["state-2"]


def test_a_record_that_has_no_room_leaves_the_one_before(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        states = States(disk)
        states.start()
        states.write_record("a", RECORD)
        with full(disk), pytest.raises(StorageUnavailable, match="No space left on device"):
            states.write_record("a", msgspec.structs.replace(RECORD, fence=2))
        assert states.record("a") == RECORD
        assert [each.name for each in (states.root / "a").iterdir()] == ["run.json"]
        states.close()


def test_other_errors_are_not_the_disk_s(states: States) -> None:
    with pytest.raises(ValueError, match="mine"):
        break_off(states, ValueError("mine"))
    assert list((states.root / "a").iterdir()) == []


async def test_the_engine_is_not_asked_for_two_things_at_once(worker: Worker) -> None:
    await worker.open("a")
    await worker.open("b")
    for seq in range(1, 6):
        worker.submit(seq, SaveState() if seq % 2 else passing(seq), "a")
        worker.submit(seq, passing(seq) if seq % 2 else SaveForSampling(f"x{seq}"), "b")
    await worker.outcome(5, "a")
    await worker.outcome(5, "b")
    await until(lambda: worker.done("b") == ["pass:1", "pass:3", "pass:5"])
    assert len(worker.trainer.threads) == 1
    assert worker.trainer.runs["a"].spec == LoraSpec(4, 8, ("q_proj",), 1)
