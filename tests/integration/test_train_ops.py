"""The handler of single ops, on both databases, with a worker in memory that can be killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.control import runs, train_ops
from app.control.train_ops import Asking, NewLora
from app.domain import JobError, JobStatus, Pool, Trainer, TrainerKind
from app.errors import (
    Conflict,
    InvalidRequest,
    NoReplicaAvailable,
    NotFound,
    NotTrainable,
    TrainerUnavailable,
)
from app.handlers.train_op import KEPT_VERSIONS
from app.jobs import queue
from app.settings import Settings
from app.training.single_ops import RemoveLora, Spec
from tests.fakes.training_worker import unavailable
from tests.integration.train_ops_desk import (
    ASKING,
    BASE,
    POOL,
    Desk,
    GatewayKilled,
    desk,
    fwdbwd,
    optim,
    sample,
)

__all__ = ["desk"]


async def test_an_adapter_can_be_sampled_from_as_soon_as_it_is_made(desk: Desk) -> None:
    run = await desk.add()
    assert run.startswith("base_lora_")
    assert [number for number, _ in await desk.digests(run)] == [1]
    found = await desk.op(sample(run))
    assert found["model"] == f"{run}@1"
    assert found["completions"] == [f" from {run}@1"]
    assert found["sequences"] == [
        {
            "stop_reason": "stop",
            "text": f" from {run}@1",
            "tokens": [1, 2],
            "logprobs": [-0.5, -0.25],
        }
    ]


async def test_after_a_step_the_next_sample_is_of_the_new_weights(desk: Desk) -> None:
    run = await desk.add()
    passed = await desk.op(fwdbwd(run))
    assert 0 < passed["loss"] < 1
    assert passed["loss"] == pytest.approx(
        passed["metrics"]["loss:sum"] / passed["metrics"]["weight:sum"]
    )
    assert (await desk.op(sample(run)))["model"] == f"{run}@1"  # a gradient changes no weights
    assert (await desk.op(optim(run)))["step"] == 1
    assert (await desk.op(sample(run)))["model"] == f"{run}@2"
    assert (await desk.op(sample(run)))["model"] == f"{run}@2"  # exported once
    assert len({digest for _, digest in await desk.digests(run)}) == 2


async def test_ops_sent_together_are_done_in_order(desk: Desk) -> None:
    run = await desk.add()
    specs: list[Spec] = [fwdbwd(run), optim(run), sample(run), fwdbwd(run), optim(run), sample(run)]
    jobs = [await train_ops.submit(desk, ASKING, spec) for spec in specs]
    await desk.run()
    results = [(await desk.get(job)).result or {} for job in jobs]
    assert [results[at]["model"] for at in (2, 5)] == [f"{run}@2", f"{run}@3"]


async def test_what_was_registered_is_sampled_without_the_trainer(desk: Desk) -> None:
    run = await desk.add()
    job = await train_ops.submit(desk, ASKING, sample(run))
    assert (job.lock, job.trainer, job.spec["model"]) == (None, None, f"{run}@1")
    await train_ops.submit(desk, ASKING, optim(run))
    assert (await train_ops.submit(desk, ASKING, sample(run))).lock == f"run:{run}"


async def test_a_trainer_that_does_one_thing_has_one_lock(desk: Desk) -> None:
    desk.trainers = {"gpu": Trainer("gpu", TrainerKind.MEGATRON, BASE, "http://nowhere")}
    one, other = await desk.add(), await desk.add()
    jobs = [await train_ops.submit(desk, ASKING, fwdbwd(run)) for run in (one, other)]
    assert [job.lock for job in jobs] == ["trainer:gpu", "trainer:gpu"]
    await desk.run()


async def test_a_pass_that_fails_leaves_the_run_as_it_was(desk: Desk) -> None:
    run, other = await desk.add(), await desk.add()
    await desk.op(fwdbwd(run))
    desk.worker.poison = {4}  # after the adapter, its state, and a pass
    assert (await desk.failed(fwdbwd(run, "boom"))).code == "non_finite_loss"
    desk.worker.poison = set()
    for name in (run, other):
        await desk.op(optim(name) if name == run else fwdbwd(name))
    await desk.op(optim(other))
    await desk.op(sample(run))
    await desk.op(sample(other))
    assert (await desk.digests(run))[-1] == (await desk.digests(other))[-1]


async def script(desk: Desk) -> str:
    run = await desk.add(seed=1)
    specs: list[Spec] = [
        fwdbwd(run, "one"),
        fwdbwd(run, "two"),
        optim(run),
        sample(run),
        fwdbwd(run, "three"),
        optim(run, 0.02),
        sample(run),
    ]
    for spec in specs:
        await desk.op(spec)
    return run


@pytest.fixture(scope="module")
def undisturbed() -> list[Any]:
    """What `script` leaves when nothing goes wrong; filled by whoever needs it first."""
    return []


@pytest.mark.parametrize("at", range(1, 60, 11))
@pytest.mark.parametrize("what", ["worker", "both"])
async def test_a_loss_at_any_moment_changes_nothing(
    desk: Desk, undisturbed: list[Any], at: int, what: str, tmp_path: Path
) -> None:
    seen = 0

    def trouble(_: str) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            desk.worker.kill()
            raise unavailable() if what == "worker" else GatewayKilled

    if not undisturbed:
        run = await script(desk)
        undisturbed += [digest for _, digest in await desk.digests(run)]
    desk.forgives = 1  # what is not asked again at once is a matter of the next attempt
    desk.worker.trouble = trouble
    if what == "both":
        desk.trouble = trouble
    run = await script(desk)
    assert [digest for _, digest in await desk.digests(run)] == undisturbed
    assert [number for number, _ in await desk.digests(run)] == [1, 2, 3]


async def test_the_worker_loses_a_gradient_that_is_computed_again(desk: Desk) -> None:
    run, other = await desk.add(), await desk.add()
    for name in (run, other):
        await desk.op(fwdbwd(name, "one"))
        await desk.op(fwdbwd(name, "two"))
        if name == run:
            desk.worker.kill()
        await desk.op(optim(name))
        await desk.op(sample(name))
    assert (await desk.digests(run))[-1] == (await desk.digests(other))[-1]


async def test_what_failed_is_not_done_when_the_worker_comes_back(desk: Desk) -> None:
    """Its client was told that it failed, and may have sent it again."""
    run, other = await desk.add(), await desk.add()
    await desk.op(fwdbwd(run, "one"))
    desk.settings = Settings(trainer_patience_s=0.01)

    def away(_: str) -> None:
        desk.worker.kill()
        raise unavailable()

    def away_at_outcome(request: str) -> None:
        if request == "outcome":
            away(request)

    desk.worker.trouble = away_at_outcome
    assert (await desk.failed(fwdbwd(run, "two"))).code == TrainerUnavailable.code
    desk.worker.trouble = lambda _: None
    await desk.op(optim(run))
    await desk.op(sample(run))
    await desk.op(fwdbwd(other, "one"))
    await desk.op(optim(other))
    await desk.op(sample(other))
    assert (await desk.digests(run))[-1] == (await desk.digests(other))[-1]


async def test_an_op_waits_for_the_one_before_it_that_was_put_off(desk: Desk) -> None:
    run = await desk.add()
    first = await train_ops.submit(desk, ASKING, fwdbwd(run))
    context = await desk.claim()
    assert context is not None
    second = await train_ops.submit(desk, ASKING, optim(run))
    async with context.ending() as session:
        lost = JobError("trainer_unavailable", "Away.")
        await queue.give_back(session, desk.clock, context.lease, lost, count=True, delay_s=60.0)
    await desk.run()
    assert (await desk.get(second)).status is JobStatus.QUEUED
    assert (await desk.get(first)).attempts == 1


async def test_a_removed_adapter_is_gone_everywhere(desk: Desk) -> None:
    run = await desk.add()
    late = await train_ops.submit(desk, ASKING, RemoveLora(run))
    assert await desk.done(late) == {"model_id": run, "status": "deleted"}
    assert not desk.worker.live
    assert not desk.worker.states
    with pytest.raises(NotFound):
        await desk.digests(run)
    with pytest.raises(NotFound, match="add_lora makes one"):
        await train_ops.submit(desk, ASKING, fwdbwd(run))


async def test_an_adapter_that_cannot_be_leaves_nothing(desk: Desk) -> None:
    new = NewLora("base", rank=16, alpha=32, target_modules=("nose",))
    job = await train_ops.add_lora(desk, ASKING, POOL, new)
    await desk.run()
    error = (await desk.get(job)).error
    assert error is not None
    assert error.message.startswith("target_modules has 'nose'; the base has q_proj")
    async with desk.db.read() as session:
        with pytest.raises(NotFound):
            await runs.get(session, job.spec["run"])
    assert not desk.worker.live


@pytest.mark.parametrize("rank", [65, 1024])
async def test_a_rank_that_the_pool_does_not_serve(desk: Desk, rank: int) -> None:
    with pytest.raises(InvalidRequest, match="serves 64 at most"):
        await train_ops.add_lora(desk, ASKING, POOL, NewLora("base", rank, 32))


async def test_a_base_that_nobody_trains(desk: Desk) -> None:
    with pytest.raises(NotTrainable, match="Trained here: 'tiny'"):
        await train_ops.add_lora(desk, ASKING, Pool("p", "other", "other"), NewLora("x", 8, 16))
    assert train_ops.only_base(desk.trainers) == BASE
    with pytest.raises(NotTrainable):
        train_ops.only_base({})


async def test_the_same_request_again_is_the_same_job(desk: Desk) -> None:
    once = Asking("key-1", "key-1", "again")
    new = NewLora("base", 16, 32)
    jobs = [await train_ops.add_lora(desk, once, POOL, new) for _ in range(2)]
    assert jobs[0].id == jobs[1].id
    await desk.run()
    run = jobs[0].spec["run"]
    other = Asking("key-1", "key-1", "pass")
    passes = [await train_ops.submit(desk, other, fwdbwd(run)) for _ in range(2)]
    await desk.run()
    await desk.op(optim(run))
    assert await desk.payloads() == []
    passes.append(await train_ops.submit(desk, other, fwdbwd(run)))
    assert len({job.id for job in passes}) == 1
    assert [kind for _, _, kind in desk.worker.done].count("ForwardBackward") == 1
    with pytest.raises(Conflict, match="Idempotency-Key"):
        await train_ops.submit(desk, other, fwdbwd(run, "another"))


async def test_others_do_not_see_a_run(desk: Desk) -> None:
    run = await desk.add()
    with pytest.raises(NotFound):
        await train_ops.submit(desk, Asking("key-2", "key-2"), fwdbwd(run))
    assert (await train_ops.submit(desk, Asking("key-2", None), fwdbwd(run))).key_id == "key-2"


async def test_a_key_has_its_limit(desk: Desk) -> None:
    run = await desk.add()
    desk.settings = Settings(max_queued_jobs=1)
    await train_ops.submit(desk, ASKING, fwdbwd(run))
    with pytest.raises(Conflict) as refused:
        await train_ops.submit(desk, ASKING, fwdbwd(run))
    assert refused.value.code == "too_many_jobs"


async def test_a_sampler_that_is_away_ends_the_op_and_not_the_run(desk: Desk) -> None:
    run = await desk.add()
    desk.request_path.error = NoReplicaAvailable("nobody is here")
    assert (await desk.failed(sample(run))).code == "no_replica_available"
    desk.request_path.error = None
    assert (await desk.op(sample(run)))["model"] == f"{run}@1"


async def test_old_versions_are_deleted(desk: Desk) -> None:
    run = await desk.add()
    for step in range(KEPT_VERSIONS + 2):
        await desk.op(fwdbwd(run, f"answer {step}"))
        await desk.op(optim(run))
        await desk.op(sample(run))
    numbers = [number for number, _ in await desk.digests(run)]
    assert numbers == list(range(4, 4 + KEPT_VERSIONS))
