"""The replica that takes a request is available, untried, and has the fewest of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.domain import Replica, ReplicaState
from app.serving.fleet import LiveReplica
from app.serving.policies import least_inflight
from tests.unit.serving.made import FakeBackend


def live(number: int, state: ReplicaState, flags: tuple[bool, bool], inflight: int) -> LiveReplica:
    replica = Replica(f"r{number}", "pool", "http://r", cordoned=flags[0], draining=flags[1])
    made = LiveReplica(replica, FakeBackend(replica))
    made.state = state
    for _ in range(inflight):
        made.claim("x@1")
    return made


REPLICAS = st.lists(
    st.tuples(
        st.sampled_from(ReplicaState), st.tuples(st.booleans(), st.booleans()), st.integers(0, 4)
    ),
    max_size=6,
)


@given(replicas=REPLICAS, tried=st.sets(st.sampled_from([f"r{n}" for n in range(6)])))
def test_the_least_busy_of_those_that_may(
    replicas: list[tuple[ReplicaState, tuple[bool, bool], int]], tried: set[str]
) -> None:
    made = [live(n, *fields) for n, fields in enumerate(replicas)]
    able = [
        r
        for r, (state, flags, _) in zip(made, replicas, strict=True)
        if state is ReplicaState.HEALTHY and not any(flags) and r.id not in tried
    ]
    picked = least_inflight(made, tried)
    if not able:
        assert picked is None
        return
    assert picked in able
    assert picked.inflight == min(r.inflight for r in able)


def test_equals_take_turns() -> None:
    made = [live(n, ReplicaState.HEALTHY, (False, False), 0) for n in range(3)]
    order = []
    for _ in range(9):
        picked = least_inflight(made, ())
        assert picked is not None
        picked.claim("x@1")
        picked.release("x@1")
        order.append(picked.id)
    assert sorted(order[:3]) == ["r0", "r1", "r2"]
    assert order == order[:3] * 3


@given(st.integers(1, 5), st.integers(0, 60))
def test_a_load_that_stays_is_spread_evenly(replicas: int, requests: int) -> None:
    made = [live(n, ReplicaState.HEALTHY, (False, False), 0) for n in range(replicas)]
    for _ in range(requests):
        picked = least_inflight(made, ())
        assert picked is not None
        picked.claim("x@1")
    counts = [r.inflight for r in made]
    assert max(counts) - min(counts) <= 1
