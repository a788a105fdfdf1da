"""The engine thread: company changes nothing, and every way to end ends cleanly."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import AdapterLoadFailed, LoragateError
from app.worker.errors import EngineDead, StepFailed
from app.worker.samplers.adapters import Adapter
from app.worker.samplers.delta import Delta
from app.worker.samplers.engine import Engine
from app.worker.samplers.model import CausalModel
from app.worker.samplers.sequence import Sequence
from tests.waiting import until
from tests.worker.tiny import CONTEXT, Room, collect, plain, settings

PROMPTS = [
    [10, 20, 30],
    [40 + index for index in range(37)],
    [7],
    [100 + index % 50 for index in range(90)],
    [61, 62, 63, 64, 65],
]
WHO = [None, "narrow", "wide", "head", "embedding"]

pytestmark = pytest.mark.worker


async def test_greedy_tokens_alone_and_in_a_crowd(room: Room) -> None:
    adapters = {name: await room.load(name) for name in WHO if name}
    asked = [(prompt, adapters.get(who or "")) for who in WHO for prompt in PROMPTS]
    alone = [
        (await room.answer([prompt], who, temperature=0, max_tokens=12, ignore_eos=True))[0]
        for prompt, who in asked
    ]
    crowd = [
        room.ask([prompt], who, temperature=0, max_tokens=12, ignore_eos=True)
        for prompt, who in asked
    ]
    noise = [room.ask([[5 + index]], None, max_tokens=3 + index, seed=index) for index in range(20)]
    found = [(await collect(ticket))[0] for ticket in crowd]
    assert [delta.token_ids for delta in found] == [delta.token_ids for delta in alone]
    for ticket in noise:
        await collect(ticket)


@pytest.mark.parametrize("who", WHO)
async def test_logprobs_agree_with_transformers_and_peft(
    room: Room, tiny: Path, who: str | None
) -> None:
    adapter = None if who is None else await room.load(who)
    found = await room.answer(
        PROMPTS,
        adapter,
        temperature=0,
        max_tokens=8,
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=2,
    )
    reference = plain(tiny, who)
    for prompt, delta in zip(PROMPTS, found, strict=True):
        with torch.inference_mode():
            whole = torch.tensor([[*prompt, *delta.token_ids]])
            odds = reference(whole).logits[0].log_softmax(-1)
        told = [*(delta.prompt_logprobs or []), *delta.logprobs]
        assert told[0] is None
        for place, one in enumerate(told[1:]):
            assert one is not None
            assert one.ids[0] == whole[0, place + 1]
            expected = odds[place, one.ids]
            assert torch.allclose(torch.tensor(one.logprobs), expected, atol=1e-4)
            assert one.rank == int((odds[place] >= odds[place, one.ids[0]]).sum())


async def test_long_prompts_are_read_in_passes(tiny: Path, model: CausalModel) -> None:
    async def answers(pass_tokens: int) -> list[tuple[Any, ...]]:
        engine = Engine(model, settings(tiny, worker_max_batch_tokens=pass_tokens))
        engine.start()
        room = Room(engine, tiny)
        found = await room.answer(PROMPTS, temperature=0, max_tokens=4, prompt_logprobs=1)
        await asyncio.to_thread(engine.stop)
        return [(one.token_ids, [p.ids for p in one.prompt_logprobs or [] if p]) for one in found]

    assert await answers(7) == await answers(100_000)


async def test_indexes_and_streams(room: Room) -> None:
    whole = await room.answer([[5, 6], [7, 8, 9]], n=3, seed=4, max_tokens=5)
    assert [delta.index for delta in whole] == list(range(6))
    parts: dict[int, list[Delta]] = {index: [] for index in range(6)}
    ticket = room.ask([[5, 6], [7, 8, 9]], n=3, seed=4, max_tokens=5, stream=True)
    for delta in await collect(ticket):
        parts[delta.index].append(delta)
    for delta in whole:
        mine = parts[delta.index]
        assert [token for part in mine for token in part.token_ids] == delta.token_ids
        assert "".join(part.text for part in mine) == delta.text
        assert mine[-1].finish_reason == delta.finish_reason
    assert len({tuple(delta.token_ids) for delta in whole[:3]}) == 3


async def test_more_samples_than_rows(tiny: Path, model: CausalModel) -> None:
    engine = Engine(model, settings(tiny, worker_max_batch=2))
    engine.start()
    found = await Room(engine, tiny).answer([[5, 6]], n=5, max_tokens=3, ignore_eos=True)
    await asyncio.to_thread(engine.stop)
    assert [len(delta.token_ids) for delta in found] == [3] * 5


async def test_the_context_ends_a_sequence(room: Room) -> None:
    (found,) = await room.answer([[5] * (CONTEXT - 3)], max_tokens=50, ignore_eos=True)
    assert (len(found.token_ids), found.finish_reason) == (3, "length")


async def test_stop_tokens_are_not_part_of_the_text(room: Room) -> None:
    (free,) = await room.answer([[5, 6]], temperature=0, max_tokens=6, ignore_eos=True)
    last = free.token_ids[3]
    (found,) = await room.answer([[5, 6]], temperature=0, max_tokens=6, stop_token_ids=(last,))
    assert (found.finish_reason, found.stop_reason) == ("stop", last)
    assert found.token_ids == free.token_ids[: free.token_ids.index(last) + 1]
    assert room.engine.tokens.decode(found.token_ids[:-1]).rstrip("\ufffd") == found.text


async def test_a_departed_client_leaves_its_rows(room: Room) -> None:
    ticket = room.ask([[5, 6]] * 3, max_tokens=200, ignore_eos=True, stream=True)
    waiting = room.ask([[5, 6]] * 64, max_tokens=200, ignore_eos=True)
    async for _ in ticket.deltas():
        break
    ticket.cancel()
    waiting.cancel()
    counters = room.engine.counters
    await until(lambda: counters.ended["abort"] and counters.running + counters.waiting == 0)


async def test_a_failing_step_takes_only_its_requests(
    room: Room, model: CausalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.forward

    def fail(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no more")

    running = room.ask([[5, 6]], max_tokens=200, ignore_eos=True, stream=True)
    news = running.deltas()
    await anext(news)
    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(StepFailed, match="no more"):
        async for _ in news:
            pass
    monkeypatch.setattr(model, "forward", forward)
    assert (await room.answer([[5, 6]], max_tokens=2, ignore_eos=True))[0].finish_reason == "length"
    assert room.engine.alive


async def test_a_failing_prefill_spares_those_who_run(
    room: Room, model: CausalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = model.prefill

    def fail_long(prompts: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if any(len(prompt) > 10 for prompt in prompts):
            raise RuntimeError("too long")
        return prefill(prompts, *args, **kwargs)

    monkeypatch.setattr(model, "prefill", fail_long)
    adapter = await room.load("narrow")
    running = room.ask([[5, 6]], adapter, max_tokens=100, ignore_eos=True, stream=True)
    news = running.deltas()
    first = await anext(news)  # several, if this thread was late
    with pytest.raises(StepFailed, match="too long"):
        await room.answer([[5] * 20], adapter)
    rest = [delta async for deltas in news for delta in deltas]
    assert sum(len(delta.token_ids) for delta in (*first, *rest)) == 100
    assert adapter.running == 0


async def test_a_request_that_cannot_be_prepared_fails_alone(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(Sequence, "prepare", fail)
        with pytest.raises(StepFailed, match="no more"):
            await room.answer([[5]])
    assert await room.answer([[5]], max_tokens=1)


async def test_a_load_nobody_waits_for_harms_nobody(room: Room) -> None:
    async with asyncio.TaskGroup() as tasks:
        loading = tasks.create_task(room.load("narrow"))
        await asyncio.sleep(0)
        loading.cancel()
    assert await room.answer([[5]], max_tokens=1)


async def test_a_dead_thread_answers_everyone(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise SystemError("gone")

    running = room.ask([[5, 6]], max_tokens=200, ignore_eos=True)
    waiting = room.ask([[5, 6]] * 100, max_tokens=200, ignore_eos=True)
    monkeypatch.setattr(room.engine, "_leave_cancelled", die)
    for ticket in (running, waiting):
        with pytest.raises(EngineDead):
            await collect(ticket)
    await until(lambda: not room.engine.alive)
    with pytest.raises(EngineDead):
        room.ask([[5]])
    with pytest.raises(EngineDead):
        await room.load("narrow")


async def test_more_adapters_than_slots(tiny: Path, model: CausalModel) -> None:
    engine = Engine(model, settings(tiny, worker_max_loras=2))
    engine.start()
    room = Room(engine, tiny)
    adapters = [Adapter(f"copy{index}", str(tiny / "wide")) for index in range(5)]
    for adapter in adapters:
        await engine.load(adapter)
    tickets = [
        room.ask([[9, 8, 7]], adapter, temperature=0, max_tokens=6, ignore_eos=True)
        for adapter in adapters * 2
    ]
    found = [(await collect(ticket))[0].token_ids for ticket in tickets]
    await asyncio.to_thread(engine.stop)
    assert all(tokens == found[0] for tokens in found)
    held = {slot for layer in model.layers.mixed.values() for slot in layer.weights}
    assert len(held) == 2
    assert not [name for name, _ in model.model.named_parameters() if "lora_" in name]


async def test_an_evicted_adapter_whose_files_are_gone_fails_its_request_alone(
    tiny: Path, model: CausalModel
) -> None:
    engine = Engine(model, settings(tiny, worker_max_loras=1))
    engine.start()
    room = Room(engine, tiny)
    lost = await room.load("lost", "narrow")
    await room.load("other", "wide")
    lost.path = str(tiny / "missing")
    with pytest.raises(LoragateError, match="missing"):
        await room.answer([[5]], lost)
    assert await room.answer([[5]], max_tokens=1)
    await asyncio.to_thread(engine.stop)


async def test_no_slot_left_to_load_into(tiny: Path, model: CausalModel) -> None:
    engine = Engine(model, settings(tiny, worker_max_loras=1))
    engine.start()
    room = Room(engine, tiny)
    busy = await room.load("busy", "narrow")
    ticket = room.ask([[5]], busy, max_tokens=200, ignore_eos=True, stream=True)
    await anext(ticket.deltas())
    with pytest.raises(AdapterLoadFailed, match="slots"):
        await room.load("wide")
    ticket.cancel()
    await asyncio.to_thread(engine.stop)


async def test_stopping_tells_those_who_still_wait(tiny: Path, model: CausalModel) -> None:
    engine = Engine(model, settings(tiny))
    engine.start()
    ticket = Room(engine, tiny).ask([[5, 6]], max_tokens=200, ignore_eos=True)
    engine.stop()
    with pytest.raises(EngineDead):
        await collect(ticket)
    gc.collect()
