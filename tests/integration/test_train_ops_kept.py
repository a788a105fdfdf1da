"""What is kept of single ops: a probe with each version, payloads until nobody can need them."""

from __future__ import annotations

from typing import Any

import pytest

from app.control import train_ops
from app.control.tasks.tidy_payloads import TidyPayloads
from app.domain import JobStatus
from app.errors import NotFound
from app.jobs import queue
from app.training import op_data
from app.training.batches import PROBE_TOKENS
from app.training.single_ops import FwdBwd, RemoveLora
from tests.fakes.training_worker import rendered
from tests.integration.train_ops_desk import ASKING, HI, Desk, desk, fwdbwd, optim, sample

__all__ = ["desk"]


async def test_each_version_has_a_probe_of_what_was_trained_on_last(desk: Desk) -> None:
    run = await desk.add()
    first = await desk.probe(run, 1)
    assert first.token_ids == (tuple(tokens_of(op_data.GREETING)[:PROBE_TOKENS]),)
    for answer in ("Ahoy!", "x" * 100):
        await desk.op(fwdbwd(run, answer))
        await desk.op(fwdbwd(run, "not learned", forward_only=True))
        await desk.op(optim(run))
        await desk.op(sample(run))
    second, third = [await desk.probe(run, number) for number in (2, 3)]
    learned = tokens_of([HI[0], {"role": "assistant", "content": "Ahoy!"}])[:-1]
    assert second.token_ids == (tuple(learned),)
    assert [len(row) for row in third.token_ids] == [PROBE_TOKENS]
    assert len({probe.logprobs[0][0] for probe in (first, second, third)}) == 3
    assert [len(row) for row in second.logprobs] == [len(learned) - 1]


def tokens_of(conversation: Any) -> list[int]:
    tokens = rendered(conversation).tokens
    assert tokens is not None
    return memoryview(tokens.data).cast("i").tolist()


async def test_a_probe_has_some_rows_of_two_tokens_or_more(desk: Desk) -> None:
    run = await desk.add()
    items = [{"input_ids": [5, *range(7, 7 + length)]} for length in range(1, 8)]
    await desk.op(FwdBwd(run, items))
    await desk.op(optim(run))
    await desk.op(sample(run))
    assert [len(row) for row in (await desk.probe(run, 2)).token_ids] == [2, 3, 4, 5]


async def test_a_base_without_a_chat_template(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new adapter changes nothing, and has no probe until it does."""
    monkeypatch.setattr(op_data, "GREETING", [{"role": "user", "content": "unspeakable"}])
    run = await desk.add()
    with pytest.raises(NotFound, match="has no probe"):
        await desk.probe(run, 1)
    await desk.op(FwdBwd(run, [{"input_ids": [5, 6, 7]}]))
    await desk.op(optim(run))
    await desk.op(sample(run))
    assert (await desk.probe(run, 2)).token_ids == ((5, 6),)


async def test_what_ops_worked_on_is_kept_until_a_state_covers_it(desk: Desk) -> None:
    run, other = await desk.add(), await desk.add()
    passes = [await train_ops.submit(desk, ASKING, fwdbwd(name)) for name in (run, run, other)]
    numbers = [job.number for job in passes]
    assert await desk.payloads() == numbers
    assert not any("data" in job.spec for job in passes)
    await desk.run()
    assert await desk.payloads() == numbers
    await desk.op(fwdbwd(run, forward_only=True))
    await desk.op(sample(run))
    assert await desk.payloads() == numbers
    await desk.op(optim(run))
    assert await desk.payloads() == numbers[2:]
    await desk.op(RemoveLora(other))
    assert await desk.payloads() == []
    assert [(await desk.get(job)).result is not None for job in passes] == [True] * 3


async def test_what_failed_ops_worked_on_is_dropped_later(desk: Desk) -> None:
    run = await desk.add()
    tidy = TidyPayloads(desk.db)
    kept = await train_ops.submit(desk, ASKING, fwdbwd(run))
    desk.worker.poison = {4}
    failed = await train_ops.submit(desk, ASKING, fwdbwd(run, "boom"))
    cancelled = await train_ops.submit(desk, ASKING, sample(run))
    async with desk.db.begin() as session:
        await queue.request_cancel(session, desk.clock, cancelled.id)
    await desk.run()
    assert (await desk.get(failed)).status is JobStatus.FAILED
    assert await desk.payloads() == [kept.number, failed.number, cancelled.number]
    assert await tidy.activate() == {"dropped": 2}
    assert await tidy.activate() == {"dropped": 0}
    assert await desk.payloads() == [kept.number]


async def test_a_worker_without_its_states_cannot_be_helped(desk: Desk) -> None:
    run = await desk.add()
    await desk.op(fwdbwd(run))
    await desk.op(optim(run))
    desk.worker.kill()
    desk.worker.states.clear()
    error = await desk.failed(fwdbwd(run))
    assert "not all that was done to it is known any more" in error.message
