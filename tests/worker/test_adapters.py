"""Which adapters stay in memory."""

from __future__ import annotations

import pytest

from app.worker.samplers.adapters import Adapter, Resident


class FakeLayers:
    def __init__(self) -> None:
        self.slots: list[str] = []

    def load(self, adapter: Adapter) -> None:
        self.slots.append(adapter.slot)

    def unload(self, slot: str) -> None:
        self.slots.remove(slot)


@pytest.fixture
def layers() -> FakeLayers:
    return FakeLayers()


@pytest.fixture
def resident(layers: FakeLayers) -> Resident:
    return Resident(layers, layers.load, 2)


def adapters(count: int) -> list[Adapter]:
    return [Adapter(f"a{index}", "/nowhere") for index in range(count)]


def test_the_least_recently_used_leaves(resident: Resident, layers: FakeLayers) -> None:
    one, two, three = adapters(3)
    for adapter in (one, two, one, three):
        assert resident.ensure(adapter)
    assert layers.slots == [one.slot, three.slot]


def test_a_running_one_never_leaves(resident: Resident) -> None:
    one, two, three = adapters(3)
    resident.ensure(one)
    resident.claim(one)
    resident.ensure(two)
    assert resident.ensure(three)
    assert one in resident
    assert two not in resident


def test_no_room_while_all_run(resident: Resident, layers: FakeLayers) -> None:
    one, two, three = adapters(3)
    for adapter in (one, two):
        resident.ensure(adapter)
        resident.claim(adapter)
    assert not resident.ensure(three)
    resident.release(one)
    assert resident.ensure(three)
    assert layers.slots == [two.slot, three.slot]


def test_a_retired_one_leaves_when_it_has_finished(resident: Resident, layers: FakeLayers) -> None:
    (one,) = adapters(1)
    resident.ensure(one)
    resident.claim(one)
    resident.retire(one)
    assert layers.slots == [one.slot]
    resident.release(one)
    assert layers.slots == []


def test_a_failed_load_takes_no_place(layers: FakeLayers) -> None:
    def fail(adapter: Adapter) -> None:
        raise RuntimeError(adapter.name)

    resident = Resident(layers, fail, 2)
    (one,) = adapters(1)
    with pytest.raises(RuntimeError):
        resident.ensure(one)
    assert len(resident) == 0
