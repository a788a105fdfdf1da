"""The pick: who is left out, who is preferred, and that the rest are balanced."""

from __future__ import annotations

from collections import Counter

import pytest

from app.domain import ReplicaState
from app.serving.breaker import FAILURES
from app.serving.policies import IN_MEMORY, LOADING, RESIDENT, ROOM, pick, residency
from app.serving.pool import LivePool
from app.serving.replica import LiveReplica
from app.serving.request import InferenceRequest, parse
from tests.unit.serving.made import replicas

NOW = 100.0
BASE = "served-tiny"


def request(prompt: str = "x") -> InferenceRequest:
    return parse("/v1/completions", b'{"model":"m","prompt":"%b"}' % prompt.encode())


def picked(
    pool: LivePool, name: str = BASE, prompt: str = "x", **more: object
) -> LiveReplica | None:
    return pick(pool, name, request(prompt), NOW, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [BASE, "a@1"])
@pytest.mark.parametrize("why", ["unhealthy", "open", "tried", "features", "quarantined"])
def test_who_cannot_take_it_is_left_out(name: str, why: str) -> None:
    one, two = replicas(2)
    pool = one.in_pool
    pool.rehome({"a@1": [one, two]})
    more: dict[str, object] = {}
    match why:
        case "unhealthy":
            one.turned(ReplicaState.UNHEALTHY, "so")
        case "open":
            for _ in range(FAILURES):
                one.breaker.failed(NOW)
        case "tried":
            more = {"tried": [one]}
        case "features":
            more = {"fits": lambda replica: replica is not one}
        case "quarantined":
            one.quarantined[name] = "numbers"
    assert {picked(pool, name, **more) for _ in range(40)} == {two}
    pool.rehome({"a@1": [one]})
    assert picked(pool, name, **more) is two, "another is found when all homes are out"
    two.turned(ReplicaState.UNHEALTHY, "so")
    assert picked(pool, name, **more) is None


def test_resident_before_room_before_loading() -> None:
    made = replicas(4, max_loras=1, max_cpu_loras=2)
    resident, memory, room, full = made
    for replica in (resident, memory):
        replica.loaded("a@1", "/p")
    for replica in (memory, full):
        replica.loaded("b@1", "/p")
    full.loaded("c@1", "/p")
    scores = [residency(replica, "a@1") for replica in made]
    assert scores == [RESIDENT, IN_MEMORY, ROOM, 0.0]
    full.loads["a@1"] = None  # type: ignore[assignment]
    assert residency(full, "a@1") == LOADING
    pool = resident.in_pool
    pool.rehome({"a@1": [full, room, resident]})
    assert picked(pool, "a@1") is resident
    pool.rehome({"a@1": [full, room]})
    pool.replicas = [full, room]
    pool.forget_candidates()
    assert picked(pool, "a@1") is room


def test_a_shared_prefix_stays_together_until_the_load_bound() -> None:
    made = replicas(3)
    pool = made[0].in_pool
    prefix = "p" * 2048
    first = picked(pool, BASE, prefix)
    assert first is not None
    for n in range(20):
        assert picked(pool, BASE, f"{prefix}{n}") is first
        assert picked(pool, "a@1", prefix) is not None
    for _ in range(60):
        first.claim(BASE)
    assert picked(pool, BASE, prefix) is not first


def test_of_equals_the_less_loaded_is_taken() -> None:
    made = replicas(8)
    pool = made[0].in_pool
    for _ in range(400):
        chosen = picked(pool)
        assert chosen is not None
        chosen.claim(BASE)
    assert max(r.inflight for r in made) - min(r.inflight for r in made) <= 12


def test_idle_equals_take_turns() -> None:
    made = replicas(3)
    counts: Counter[str] = Counter()
    for _ in range(300):
        chosen = picked(made[0].in_pool)
        assert chosen is not None
        chosen.claim(BASE)
        chosen.release(BASE)
        counts[chosen.id] += 1
    assert min(counts.values()) > 60


def test_a_request_of_the_base_does_not_wait_while_another_replica_has_a_place() -> None:
    """A few are drawn of many; all of them may be full."""
    made = replicas(8, max_inflight=1)
    for replica in made[:7]:
        replica.claim(BASE)
    assert {picked(made[0].in_pool) for _ in range(40)} == {made[7]}
