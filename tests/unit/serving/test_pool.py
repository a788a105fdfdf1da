"""Candidates of a pool: homes, then holders; found on the spot and given up with their replica."""

from __future__ import annotations

import random
from collections import Counter

from app.domain import ReplicaState
from tests.unit.serving.made import replicas

NOW = 100.0


def test_a_first_home_is_the_same_every_time_and_even() -> None:
    first = replicas(8)[0].in_pool
    other = replicas(8)[0].in_pool
    names = [f"a{n}@1" for n in range(800)]
    homes = {name: first.candidates(name, NOW)[0].id for name in names}
    assert homes == {name: other.candidates(name, NOW)[0].id for name in names}
    counts = Counter(homes.values())
    assert len(counts) == 8
    assert max(counts.values()) < 150


def test_losing_a_replica_moves_only_its_adapters() -> None:
    made = replicas(6)
    pool = made[0].in_pool
    names = [f"a{n}@1" for n in range(300)]
    before = {name: pool.candidates(name, NOW)[0] for name in names}
    gone = made[2]
    pool.consists_of([r for r in made if r is not gone])
    for name in names:
        (now,) = pool.candidates(name, NOW)
        assert now is before[name] or before[name] is gone
        assert now is not gone


def test_a_full_replica_is_no_first_home() -> None:
    made = replicas(2)
    pool = made[0].in_pool
    for _ in range(50):
        made[0].claim("served-tiny")
    assert {pool.candidates(f"a{n}@1", NOW)[0] for n in range(50)} == {made[1]}


def test_candidates_are_homes_until_all_hold_it_others_that_do() -> None:
    one, two, three = replicas(3)
    pool = one.in_pool
    two.loaded("a@1", "/p")
    pool.rehome({"a@1": [one]})
    assert pool.candidates("a@1", NOW) == (one, two)
    one.loaded("a@1", "/p")
    pool.forget_candidates("a@1")
    assert pool.candidates("a@1", NOW) == (one,)
    pool.rehome({"a@1": [one, three]})
    assert pool.candidates("a@1", NOW) == (one, three, two)


def test_who_holds_it_needs_no_home() -> None:
    one, two = replicas(2)
    two.loaded("a@1", "/p")
    one.in_pool.forget_candidates()
    assert one.in_pool.candidates("a@1", NOW) == (two,)


def test_nobody_is_there() -> None:
    (one,) = replicas(1)
    one.turned(ReplicaState.UNHEALTHY, "so")
    assert one.in_pool.candidates("a@1", NOW) == ()
    assert one.in_pool.next_best("a@1", NOW, ()) is None


def test_mean_load_is_what_runs_and_waits() -> None:
    made = replicas(4)
    for replica in random.choices(made, k=10):
        replica.claim("served-tiny")
    assert made[0].in_pool.mean_load() == 2.5


def test_a_replica_that_restarts_often_costs_no_more_memory() -> None:
    """Every engine has a bit in the prefix table, whose numbers grew with each restart."""
    one, two = replicas(2)
    pool = one.in_pool
    for _ in range(5000):
        one.restarted({}, ())
        pool.prefixes.note([1, 2, 3], one.bit)
        assert one.bit != two.bit
    assert max(one.bit, two.bit).bit_length() <= 1024
    chain = [7, 8]
    pool.prefixes.note(chain, two.bit)
    assert pool.prefixes.depths(chain, [one.bit, two.bit]) == [0.0, 1.0]
