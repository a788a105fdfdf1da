"""The attempt loop: who gets a request, what is tried again, and every claim released."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.backends.base import Reply
from app.domain import ReplicaState, Route
from app.errors import (
    AdapterLoadFailed,
    LoragateError,
    NoReplicaAvailable,
    UpstreamBroke,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
)
from app.serving import breaker
from app.serving.forward import MAX_ATTEMPTS, Forwarder
from app.serving.request import InferenceRequest, parse
from tests.unit.serving.made import FleetOfMemory, snapshot, stream, version, whole
from tests.waiting import until

ADAPTER = Route("tiny", "pool", "pirate@1", version())
BASE = Route("tiny", "pool", "served-tiny")
UNKNOWN = b'{"error":{"message":"The model `pirate@1` does not exist.","type":"NotFoundError"}}'


def request(model: str = "pirate") -> InferenceRequest:
    found = parse("/v1/completions", b'{"model":"%b","prompt":"x"}' % model.encode())
    found.headers = b"x-request-id: 1\r\n"
    return found


async def forwarded(made: FleetOfMemory, route: Route = ADAPTER) -> tuple[int, bytes, str]:
    reply = await Forwarder(made.fleet, made.clock).forward(request(), route)
    try:
        return reply.status, await reply.read(1 << 20), reply.replica
    finally:
        reply.close()


def idle(made: FleetOfMemory) -> bool:
    return all(r.inflight == 0 and r.busy == {} for r in made.fleet.live())


async def test_a_base_is_asked_for_by_the_name_its_replicas_know(made: FleetOfMemory) -> None:
    await made.sync(snapshot())
    assert (await forwarded(made, BASE))[0] == 200
    body = b'{"model":"served-tiny","prompt":"x"}'
    assert made.connected[0].sent == [("/v1/completions", body, b"x-request-id: 1\r\n")]
    assert made.connected[0].loads == []


async def test_an_adapter_is_loaded_once_and_then_served(made: FleetOfMemory) -> None:
    await made.sync(snapshot())
    for _ in range(3):
        assert (await forwarded(made))[0] == 200
    backend = made.connected[0]
    assert (len(backend.loads), len(backend.sent)) == (1, 3)
    assert backend.sent[0][1] == b'{"model":"pirate@1","prompt":"x"}'


async def test_a_claim_is_held_until_the_reply_closes(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    made.connected[0].answers = [lambda: stream(b"data: 1\n\n")]
    reply = await Forwarder(made.fleet, made.clock).forward(request(), ADAPTER)
    assert (reply.replica, replica.inflight) == ("r0", 1)
    assert made.fleet.inflight("pirate@1") == 1
    assert await reply.next() == b"data: 1\n\n"
    assert await reply.next() == b""
    assert replica.inflight == 1
    reply.close()
    reply.close()
    assert replica.inflight == 0


async def test_a_refusal_goes_to_the_next_replica(made: FleetOfMemory) -> None:
    first, second = await made.sync(snapshot(replicas=2))
    made.connected[0].answers = [UpstreamRefused("down")]
    status, _, replica = await forwarded(made, BASE)
    assert (status, replica) == (200, "r1")
    assert (first.state, second.state) == (ReplicaState.UNHEALTHY, ReplicaState.HEALTHY)
    assert idle(made)


@pytest.mark.parametrize("status", [503, 429])
async def test_an_overload_goes_to_the_next_replica(made: FleetOfMemory, status: int) -> None:
    first, _ = await made.sync(snapshot(replicas=2))
    made.connected[0].answers = [lambda: whole(status)]
    assert (await forwarded(made, BASE))[::2] == (200, "r1")
    assert first.state is ReplicaState.HEALTHY, "busy is not broken"
    assert idle(made)


async def test_an_overload_everywhere_is_passed_on(made: FleetOfMemory) -> None:
    await made.sync(snapshot(replicas=5))
    for backend in made.connected:
        backend.answers = [lambda: whole(503, b"all busy")]
    status, body, _ = await forwarded(made, BASE)
    assert (status, body) == (503, b"all busy")
    assert sum(len(b.sent) for b in made.connected) == MAX_ATTEMPTS
    assert idle(made)


async def test_an_overload_is_better_news_than_no_replica(made: FleetOfMemory) -> None:
    await made.sync(snapshot(replicas=2))
    made.connected[0].answers = [lambda: whole(503, b"busy")]
    made.connected[1].answers = [UpstreamRefused("down")]
    assert (await forwarded(made, BASE))[:2] == (503, b"busy")


@pytest.mark.parametrize("replicas", [0, 1, 5])
async def test_nobody_is_there(made: FleetOfMemory, replicas: int) -> None:
    await made.sync(snapshot(replicas=replicas))
    for backend in made.connected:
        backend.answers = [UpstreamRefused("down")]
    with pytest.raises(NoReplicaAvailable, match=r"'pool'.*'served-tiny'"):
        await forwarded(made, BASE)
    assert sum(len(b.sent) for b in made.connected) == min(replicas, MAX_ATTEMPTS)
    assert idle(made)


async def test_what_may_still_be_running_is_not_sent_again(made: FleetOfMemory) -> None:
    await made.sync(snapshot(replicas=2))
    made.connected[0].answers = [UpstreamTimeout("late")]
    with pytest.raises(UpstreamTimeout):
        await forwarded(made, BASE)
    assert made.connected[1].sent == []
    assert idle(made)


async def test_a_replica_that_dies_before_its_answer_costs_nothing(made: FleetOfMemory) -> None:
    await made.sync(snapshot(replicas=2))
    made.connected[0].answers = [UpstreamBroke("died")]
    assert (await forwarded(made, BASE))[::2] == (200, "r1")
    assert idle(made)


async def test_a_request_that_two_replicas_died_of_is_not_given_to_a_third(
    made: FleetOfMemory,
) -> None:
    await made.sync(snapshot(replicas=3))
    for backend in made.connected:
        backend.answers = [UpstreamBroke("died")]
    with pytest.raises(UpstreamBroke):
        await forwarded(made, BASE)
    assert sum(len(b.sent) for b in made.connected) == 2
    assert idle(made)


async def test_a_dead_engine_behind_a_live_server_is_left_at_once(made: FleetOfMemory) -> None:
    first, _ = await made.sync(snapshot(replicas=2))
    made.connected[0].answers = [
        lambda: whole(500, b'{"error":{"message":"EngineCore encountered an issue."}}')
    ]
    assert (await forwarded(made, BASE))[::2] == (200, "r1")
    assert first.state is ReplicaState.UNHEALTHY
    assert idle(made)


async def test_any_other_failure_of_a_replica_is_passed_on(made: FleetOfMemory) -> None:
    first, _ = await made.sync(snapshot(replicas=2))
    made.connected[0].answers = [lambda: whole(500, b"a bug")]
    assert (await forwarded(made, BASE))[:2] == (500, b"a bug")
    assert first.state is ReplicaState.HEALTHY


async def test_the_breaker_opens_after_failures_that_health_does_not_see(
    made: FleetOfMemory,
) -> None:
    first, second = await made.sync(snapshot(replicas=2))
    made.connected[0].answers = [UpstreamBroke("died")] * 50
    for _ in range(20):
        assert (await forwarded(made, BASE))[0] == 200
    assert len(made.connected[0].sent) == breaker.FAILURES
    made.clock.at += breaker.FIRST_PAUSE_S
    sent = len(made.connected[0].sent)
    for _ in range(20):
        assert (await forwarded(made, BASE))[0] == 200
    assert len(made.connected[0].sent) == sent + 1, "half open: one request tries"
    made.connected[0].answers = []
    made.clock.at += 2 * breaker.FIRST_PAUSE_S
    for _ in range(20):
        assert (await forwarded(made, BASE))[0] == 200
    assert len(made.connected[0].sent) > sent + 2
    assert second.inflight == first.inflight == 0


async def test_retries_end_when_their_budget_is_spent(made: FleetOfMemory) -> None:
    await made.sync(snapshot(replicas=3))
    for backend in made.connected:
        backend.answers = [lambda: whole(503, b"busy")] * 100
    pool = made.fleet.pools["pool"]
    while pool.budget.spend(made.clock.monotonic()):
        pass
    assert (await forwarded(made, BASE))[:2] == (503, b"busy")
    assert sum(len(b.sent) for b in made.connected) == 1
    made.clock.at += 1
    await forwarded(made, BASE)
    assert sum(len(b.sent) for b in made.connected) == 1 + MAX_ATTEMPTS


async def test_the_preferred_replica_is_asked_first(made: FleetOfMemory) -> None:
    await made.sync(snapshot(replicas=3))
    forwarder = Forwarder(made.fleet, made.clock)
    for wanted in ("r2", "r1", "r2", "r0"):
        reply = await forwarder.forward(request(), BASE, prefer=wanted)
        assert reply.replica == wanted
        reply.close()
    made.connected[2].answers = [UpstreamRefused("down")]
    reply = await forwarder.forward(request(), BASE, prefer="r2")
    assert (reply.status, reply.replica) != (200, "r2")
    reply.close()


async def test_an_adapter_that_a_replica_lost_is_loaded_again(made: FleetOfMemory) -> None:
    await made.sync(snapshot())
    await forwarded(made)
    made.connected[0].adapters.clear()  # the engine was restarted behind our back
    assert (await forwarded(made))[0] == 200
    backend = made.connected[0]
    assert (len(backend.loads), len(backend.sent)) == (2, 3)
    assert all(reply._callbacks is None for reply in backend.replies), "a reply was left open"
    assert idle(made)


async def test_an_adapter_is_loaded_again_only_once(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    made.connected[0].answers = [lambda: whole(404, UNKNOWN), lambda: whole(404, UNKNOWN)]
    with pytest.raises(UpstreamBroke, match="'pirate@1' and does not know it"):
        await forwarded(made)
    assert len(made.connected[0].sent) == 2
    assert replica.residency.known == {}
    assert idle(made)


@pytest.mark.parametrize("healed_first", [False, True])
async def test_a_404_of_another_kind_is_passed_on(made: FleetOfMemory, healed_first: bool) -> None:
    await made.sync(snapshot())
    other = [lambda: whole(404, b'{"detail":"Not Found"}')]
    lost: list[Callable[[], Reply] | LoragateError] = [lambda: whole(404, UNKNOWN)]
    made.connected[0].answers = [*lost, *other] if healed_first else [*other]
    assert (await forwarded(made))[:2] == (404, b'{"detail":"Not Found"}')
    assert idle(made)


async def test_a_404_for_a_base_is_passed_on(made: FleetOfMemory) -> None:
    await made.sync(snapshot())
    made.connected[0].answers = [lambda: whole(404, UNKNOWN)]
    assert (await forwarded(made, BASE))[:2] == (404, UNKNOWN)


async def test_weights_one_replica_refuses_are_tried_elsewhere(made: FleetOfMemory) -> None:
    """It may be its own fault: a store that is not mounted there."""
    first, _ = await made.sync(snapshot(replicas=2))
    made.connected[0].load_errors = [AdapterLoadFailed("no such folder")]
    assert (await forwarded(made))[::2] == (200, "r1")
    assert first.state is ReplicaState.HEALTHY
    assert idle(made)


async def test_weights_every_replica_refuses_are_refused(made: FleetOfMemory) -> None:
    await made.sync(snapshot(replicas=2))
    for backend in made.connected:
        backend.load_errors = [AdapterLoadFailed("rank 4096")]
    with pytest.raises(AdapterLoadFailed, match="4096"):
        await forwarded(made)
    assert all(not backend.sent for backend in made.connected)
    assert idle(made)


@pytest.mark.parametrize("error", [UpstreamError("busy"), UpstreamTimeout("x"), UpstreamBroke("x")])
async def test_a_replica_that_cannot_load_now_is_passed_over(
    made: FleetOfMemory, error: LoragateError
) -> None:
    """The request never arrived there, whatever became of the load."""
    await made.sync(snapshot(replicas=2))
    made.connected[0].load_errors = [error]
    assert (await forwarded(made))[::2] == (200, "r1")
    assert idle(made)


async def test_leaving_during_a_load(made: FleetOfMemory) -> None:
    (replica,) = await made.sync(snapshot())
    made.connected[0].loading = asyncio.Event()
    task = asyncio.get_running_loop().create_task(forwarded(made))
    await until(lambda: made.connected[0].loads)
    assert replica.inflight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert idle(made)
    made.connected[0].loading.set()
    await until(lambda: replica.holds("pirate@1", version().digest))


async def test_leaving_before_the_answer(made: FleetOfMemory) -> None:
    await made.sync(snapshot())
    made.connected[0].answering = asyncio.Event()
    task = asyncio.get_running_loop().create_task(forwarded(made))
    await until(lambda: made.connected[0].sent)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert idle(made)


async def test_a_complaint_that_breaks_off(made: FleetOfMemory) -> None:
    await made.sync(snapshot())
    broken = stream(b'{"error":', broken=True)
    broken.status = 503
    made.connected[0].answers = [lambda: broken]
    with pytest.raises(UpstreamBroke):
        await forwarded(made, BASE)
    assert idle(made)


OUTCOMES = st.sampled_from(
    [
        "ok",
        "stream",
        "broken stream",
        "503",
        "429",
        "500",
        "unknown",
        "404",
        "refused",
        "timeout",
        "broke",
    ]
)
LOADS = st.sampled_from(["ok", "ok", "refused weights", "busy", "refused", "crash"])


def answer(outcome: str) -> Callable[[], Reply] | LoragateError:
    errors = {
        "refused": UpstreamRefused("x"),
        "timeout": UpstreamTimeout("x"),
        "broke": UpstreamBroke("x"),
    }
    replies: dict[str, Callable[[], Reply]] = {
        "ok": lambda: whole(200),
        "stream": lambda: stream(b"data: 1\n\n", b"data: [DONE]\n\n"),
        "broken stream": lambda: stream(b"data: 1\n\n", broken=True),
        "unknown": lambda: whole(404, UNKNOWN),
        "404": lambda: whole(404, b"nothing here"),
    }
    return errors.get(outcome) or replies.get(outcome) or (lambda: whole(int(outcome)))


def load_error(outcome: str) -> Exception | None:
    return {
        "ok": None,
        "refused weights": AdapterLoadFailed("x"),
        "busy": UpstreamError("x"),
        "refused": UpstreamRefused("x"),
        "crash": ZeroDivisionError("x"),
    }[outcome]


@given(
    outcomes=st.lists(st.lists(OUTCOMES, max_size=4), min_size=1, max_size=4),
    loads=st.lists(LOADS, max_size=4),
    ways=st.lists(
        st.tuples(st.booleans(), st.sampled_from(["read", "close", "leave"]), st.integers(0, 6)),
        max_size=8,
    ),
)
async def test_whatever_happens_every_claim_is_released_and_every_reply_closed(
    outcomes: list[list[str]], loads: list[str], ways: list[tuple[bool, str, int]]
) -> None:
    made = FleetOfMemory()
    async with made.fleet:
        await made.sync(snapshot(replicas=len(outcomes)))
        for backend, script in zip(made.connected, outcomes, strict=True):
            backend.answers = [answer(outcome) for outcome in script]
            backend.load_errors = [load_error(outcome) for outcome in loads]

        async def one(base: bool, how: str) -> None:
            reply = await Forwarder(made.fleet, made.clock).forward(
                request(), BASE if base else ADAPTER
            )
            try:
                assert how == "close" or await reply.read(1 << 20) is not None
            finally:
                reply.close()

        tasks = []
        for base, how, steps in ways:
            task = asyncio.get_running_loop().create_task(one(base, how))
            tasks.append(task)
            for _ in range(steps):
                await asyncio.sleep(0)
            if how == "leave":
                task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        expected = (LoragateError, asyncio.CancelledError)
        assert [end for end in ends if end is not None and not isinstance(end, expected)] == []
        assert idle(made)
        for backend in made.connected:
            assert all(reply._callbacks is None for reply in backend.replies)


async def test_the_preferred_replica_is_not_asked_for_what_it_serves_wrongly(
    made: FleetOfMemory,
) -> None:
    first, _ = await made.sync(snapshot(replicas=2))
    first.quarantined["pirate@1"] = "numbers"
    reply = await Forwarder(made.fleet, made.clock).forward(request(), ADAPTER, prefer="r0")
    assert (reply.status, reply.replica) == (200, "r1")
    assert made.fleet.retries == {}, "it was no attempt that failed"
    reply.close()
