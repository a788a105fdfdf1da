"""Plans: they converge, fit into the slots, move little and give hot versions more replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from app.control.placement import PER_COPY, SHRINK, Plan, Seen, Wanted, copies, plan

NONE: frozenset[str] = frozenset()


def fleet(count: int, slots: int = 8) -> list[Seen]:
    return [Seen(f"r{n}", slots) for n in range(count)]


def followed(
    made: Plan, wanted: Sequence[Wanted], seen: Sequence[Seen]
) -> tuple[list[Wanted], list[Seen]]:
    """The world once a plan was carried out."""
    loads = {(a.replica, a.name) for a in made.loads}
    unloads = {(a.replica, a.name) for a in made.unloads}
    held = [
        replace(
            one,
            holds=frozenset(
                name
                for name in one.holds | {n for r, n in loads if r == one.id}
                if (one.id, name) not in unloads
            ),
        )
        for one in seen
    ]
    return [replace(one, homes=made.homes.get(one.name, ())) for one in wanted], held


DEMANDS = st.lists(
    st.tuples(st.floats(0.002, 50, allow_nan=False), st.floats(0, 60, allow_nan=False)),
    min_size=1,
    max_size=24,
)


def wanted_of(demands: list[tuple[float, float]]) -> list[Wanted]:
    return [Wanted(f"a{n}@1", rate, at_once) for n, (rate, at_once) in enumerate(demands)]


@settings(max_examples=300, deadline=None)
@given(demands=DEMANDS, replicas=st.integers(0, 6), slots=st.integers(1, 6), data=st.data())
def test_a_plan_fits_and_planning_its_own_result_changes_nothing(
    demands: list[tuple[float, float]], replicas: int, slots: int, data: st.DataObject
) -> None:
    wanted = wanted_of(demands)
    names = [one.name for one in wanted]
    some = st.frozensets(st.sampled_from([*names, "gone@1"]), max_size=slots)
    seen = [replace(one, holds=data.draw(some)) for one in fleet(replicas, slots)]
    over = frozenset({"gone@1"})
    made = plan(wanted, seen, over)
    on = Counter(id for homes in made.homes.values() for id in homes)
    assert all(count <= slots for count in on.values())
    assert all(len(set(homes)) == len(homes) >= 1 for homes in made.homes.values())
    assert len(made.homes) == min(len(wanted), replicas * slots) or on.total() == replicas * slots
    for one in seen:
        loaded = {a.name for a in made.loads if a.replica == one.id}
        assert not loaded & one.holds, "loaded already"
        assert all(one.id in made.homes[name] for name in loaded)
        assert {a.name for a in made.unloads if a.replica == one.id} == one.holds & over
    wanted, seen = followed(made, wanted, seen)
    again = plan(wanted, seen, over)
    assert again.homes == made.homes
    assert (again.loads, again.unloads) == ((), ())


@settings(max_examples=100, deadline=None)
@given(each=st.integers(8, 20), replicas=st.integers(2, 6), lost=st.integers(0, 5))
def test_a_lost_replica_moves_what_was_on_it_and_hardly_more(
    each: int, replicas: int, lost: int
) -> None:
    count = each * replicas
    wanted = [Wanted(f"a{n}@1", 1.0, 0.5) for n in range(count)]
    seen = fleet(replicas, slots=count)
    before = plan(wanted, seen, NONE).homes
    gone = seen[lost % replicas].id
    left = [one for one in seen if one.id != gone]
    after = plan([replace(o, homes=before[o.name]) for o in wanted], left, NONE).homes
    assert set(after) == set(before)
    moved = [n for n, homes in before.items() if gone not in homes and after[n] != homes]
    assert len(moved) <= count / 20


@settings(max_examples=100, deadline=None)
@given(each=st.integers(8, 20), replicas=st.integers(2, 6))
def test_a_replica_added_moves_no_more_than_its_share(each: int, replicas: int) -> None:
    count = each * replicas
    wanted = [Wanted(f"a{n}@1", 1.0, 0.5) for n in range(count)]
    before = plan(wanted, fleet(replicas, slots=count), NONE).homes
    now = [replace(one, homes=before[one.name]) for one in wanted]
    after = plan(now, fleet(replicas + 1, slots=count), NONE).homes
    moved = [name for name, homes in before.items() if after[name] != homes]
    assert len(moved) <= count / (replicas + 1) + 2


@given(
    demand=st.floats(0.01, 100), total=st.floats(0.01, 400), at_once=st.floats(0, 100),
    replicas=st.integers(0, 8), homes=st.integers(0, 8),
)  # fmt: skip
def test_copies_are_between_one_and_all(
    demand: float, total: float, at_once: float, replicas: int, homes: int
) -> None:
    one = Wanted("a@1", demand, at_once, tuple(f"r{n}" for n in range(homes)))
    found = copies(one, max(total, demand), replicas)
    assert 0 <= found <= replicas
    assert (found == 0) == (replicas == 0)
    if at_once <= PER_COPY and homes <= 1:
        assert found <= 1


def test_a_hot_version_spreads_and_a_cold_one_stays_on_one() -> None:
    wanted = [Wanted("hot@1", 90.0, 64.0), *(Wanted(f"a{n}@1", 1.0, 0.2) for n in range(10))]
    homes = plan(wanted, fleet(4), NONE).homes
    assert len(homes["hot@1"]) == 4
    assert {len(homes[f"a{n}@1"]) for n in range(10)} == {1}


def test_a_copy_too_many_is_kept_until_it_is_clearly_too_many() -> None:
    now = ("r0", "r1", "r2")
    just_two = Wanted("a@1", 1.0, 2 * PER_COPY, now)
    assert copies(just_two, 1.0, 8) == 3
    far_below = replace(just_two, concurrency=2 * SHRINK * PER_COPY - 0.1)
    assert copies(far_below, 1.0, 8) < 3


def test_with_too_few_slots_the_most_wanted_get_them() -> None:
    wanted = [Wanted(f"a{n}@1", float(n + 1), 1.0) for n in range(6)]
    homes = plan(wanted, fleet(2, slots=2), NONE).homes
    assert set(homes) == {"a5@1", "a4@1", "a3@1", "a2@1"}


def test_what_nobody_asks_for_is_not_loaded_and_keeps_its_home() -> None:
    made = plan([Wanted("quiet@1", 0.0, 0.0, ("r1",))], fleet(2), NONE)
    assert made.homes == {"quiet@1": ("r1",)}
    assert made.loads == ()


def test_a_home_is_not_unloaded() -> None:
    seen = [Seen("r0", 4, frozenset({"a@1", "b@1"})), Seen("r1", 4, frozenset({"a@1"}))]
    made = plan([Wanted("a@1", 1.0, 1.0, ("r0",))], seen, frozenset({"a@1", "b@1"}))
    assert {(a.replica, a.name) for a in made.unloads} == {("r0", "b@1"), ("r1", "a@1")}
