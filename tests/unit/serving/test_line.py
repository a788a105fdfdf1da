"""The line: in order within an adapter, adapters in turn, nobody lost."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from app.serving.line import Line, Waiter


def waiter(name: str, since: float = 0.0) -> Waiter:
    return Waiter(name, since, asyncio.get_running_loop().create_future())


def anyone(_: str) -> bool:
    return True


async def test_a_thousand_delay_another_by_one_turn() -> None:
    line = Line()
    for _ in range(1000):
        line.join(waiter("crowd"))
    line.join(waiter("one"))
    served = []
    for _ in range(3):
        found = line.pop(anyone)
        assert found is not None
        served.append(found.name)
    assert served.index("one") <= 1
    assert line.length == 998


async def test_adapters_take_turns() -> None:
    line = Line()
    for name in ("a", "a", "a", "b", "b", "c"):
        line.join(waiter(name))
    assert line.names == 3
    names = []
    while (found := line.pop(anyone)) is not None:
        names.append(found.name)
    assert names == ["a", "b", "c", "a", "b", "a"]
    assert line.names == line.length == 0


async def test_who_cannot_be_served_keeps_its_place() -> None:
    line = Line()
    for name in ("a", "b", "b", "b"):
        line.join(waiter(name))
    for _ in range(2):
        found = line.pop(lambda name: name == "b")
        assert found is not None
        assert found.name == "b"
    found = line.pop(anyone)
    assert found is not None
    assert found.name == "a"
    assert line.pop(lambda name: name == "a") is None


async def test_the_eldest_of_some() -> None:
    line = Line()
    for at, name in enumerate(("a", "b", "a")):
        line.join(waiter(name, since=at))
    assert line.eldest(anyone) == 0
    assert line.eldest(lambda name: name == "b") == 1
    assert line.eldest(lambda name: name == "c") is None


async def test_leaving() -> None:
    line = Line()
    here, gone = waiter("a"), waiter("a")
    line.join(here)
    line.join(gone)
    assert line.leave(gone)
    assert not line.leave(gone)
    assert (line.length, line.of("a")) == (1, 1)
    assert line.pop(anyone) is here
    assert not line.leave(here)
    assert (line.length, line.names, line.of("a")) == (0, 0, 0)


@given(
    st.lists(
        st.tuples(st.sampled_from(["join", "pop", "leave", "clear"]), st.integers(0, 4)),
        max_size=60,
    )
)
async def test_nobody_is_lost_or_served_twice(steps: list[tuple[str, int]]) -> None:
    line = Line()
    inside: dict[str, list[Waiter]] = defaultdict(list)
    for step, number in steps:
        name = f"a@{number}"
        if step == "join":
            joined = waiter(name)
            inside[name].append(joined)
            line.join(joined)
        elif step == "pop":
            found = line.pop(lambda each, name=name: each >= name)  # type: ignore[misc]
            if found is None:
                assert not any(inside[each] for each in inside if each >= name)
            else:
                assert inside[found.name].pop(0) is found, "in order within an adapter"
        elif step == "leave" and inside[name]:
            line.leave(inside[name].pop())
        elif step == "clear":
            everyone = line.clear()
            assert {id(w) for w in everyone} == {id(w) for ws in inside.values() for w in ws}
            inside.clear()
        assert line.length == sum(map(len, inside.values()))
        assert line.names == sum(1 for waiting in inside.values() if waiting)
        assert all(line.of(each) == len(waiting) for each, waiting in inside.items())
