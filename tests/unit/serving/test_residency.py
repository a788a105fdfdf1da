"""The mirror of vLLM's two caches, held against a plain model of them."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from app.serving.residency import Residency

NAMES = st.sampled_from([f"a@{n}" for n in range(6)])
STEPS = st.lists(
    st.tuples(st.sampled_from(["load", "use", "forget"]), NAMES),
    max_size=40,
)


class Plain:
    """`LRUCacheWorkerLoRAManager`: what is evicted from memory loses its slot too."""

    def __init__(self, slots: int, memory: int) -> None:
        self.slots, self.memory = slots, max(slots, memory)
        self.cpu: OrderedDict[str, None] = OrderedDict()
        self.gpu: OrderedDict[str, None] = OrderedDict()
        self.names: dict[str, str] = {}

    def step(self, name: str) -> None:
        if name not in self.cpu and len(self.cpu) + 1 > self.memory:
            oldest, _ = self.cpu.popitem(last=False)
            self.gpu.pop(oldest, None)
        self.cpu[name] = None
        self.cpu.move_to_end(name)
        if name not in self.gpu and len(self.gpu) >= self.slots:
            self.gpu.popitem(last=False)
        self.gpu[name] = None
        self.gpu.move_to_end(name)


@given(slots=st.integers(1, 3), memory=st.integers(1, 5), steps=STEPS)
def test_it_holds_what_vllm_holds(slots: int, memory: int, steps: list[tuple[str, str]]) -> None:
    mirror, engine = Residency(slots, memory), Plain(slots, memory)
    for step, name in steps:
        if step == "load":
            mirror.loaded(name, f"/{name}")
            engine.names[name] = f"/{name}"
            engine.step(name)
        elif step == "use" and name in engine.names:
            mirror.used(name)
            engine.step(name)
        elif step == "forget":
            assert mirror.forget(name) == (engine.names.pop(name, None) is not None)
        assert mirror.known == engine.names
        for each in engine.names:
            assert mirror.in_slot(each) == (each in engine.gpu)
            assert mirror.in_memory(each) == (each in engine.cpu)
        assert mirror.room == (len(engine.cpu) < engine.memory)


@given(
    known=st.lists(NAMES, unique=True),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=5),
)
def test_what_no_longer_fits_is_gone_the_oldest_first(
    known: list[str], sizes: list[tuple[int, int]]
) -> None:
    mirror = Residency(4, 6)
    mirror.restart({name: f"/{name}" for name in known})
    slots, memory = 4, 6
    for to_slots, to_memory in sizes:
        mirror.resize(to_slots, to_memory)
        slots, memory = min(slots, to_slots), min(memory, max(to_slots, to_memory))
        assert [n for n in known if mirror.in_slot(n)] == known[-slots:]
        assert [n for n in known if mirror.in_memory(n)] == known[-memory:]
    assert mirror.known == {name: f"/{name}" for name in known}


def test_a_restart_forgets_what_is_not_listed() -> None:
    mirror = Residency(2, 4)
    mirror.loaded("old@1", "/old")
    mirror.restart({"new@1": "/new"})
    assert mirror.known == {"new@1": "/new"}
    assert not mirror.in_slot("old@1")
    assert not mirror.in_memory("old@1")
    assert mirror.in_slot("new@1")
    assert mirror.room


def test_weights_stay_until_evicted_and_serve_once_known_again() -> None:
    mirror = Residency(1, 1)
    mirror.loaded("a@1", "/a")
    assert mirror.forget("a@1")
    assert not mirror.in_slot("a@1")
    assert not mirror.room
    assert not mirror.forget("a@1")
