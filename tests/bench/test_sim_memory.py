"""The simulator's memory: slots as vLLM's LRU has them, and prefix blocks by adapter and chain."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bench.sim.prefix import PrefixCache, block_keys, count_tokens
from bench.sim.slots import Moved, Slots

NOTHING = Moved(from_disk=False, to_gpu=False)
SWAP = Moved(from_disk=False, to_gpu=True)
READ = Moved(from_disk=True, to_gpu=True)


def test_a_load_puts_an_adapter_in_both() -> None:
    slots = Slots(2, 3)
    assert slots.use("a") == READ
    assert (list(slots.gpu), list(slots.cpu)) == (["a"], ["a"])
    assert slots.use("a") == NOTHING


def test_the_gpu_evicts_the_least_recently_used_and_the_cpu_keeps_it() -> None:
    slots = Slots(2, 3)
    for name in ("a", "b", "a", "c"):
        slots.use(name)
    assert (list(slots.gpu), list(slots.cpu)) == (["a", "c"], ["b", "a", "c"])
    assert slots.use("b") == SWAP


def test_what_the_cpu_evicts_leaves_the_gpu_and_is_read_again() -> None:
    slots = Slots(2, 2)
    for name in ("a", "b", "c"):
        slots.use(name)
    assert (list(slots.gpu), list(slots.cpu)) == (["b", "c"], ["b", "c"])
    assert slots.use("a") == READ
    assert list(slots.gpu) == ["c", "a"]


@given(st.lists(st.integers(0, 9)), st.integers(1, 4), st.integers(0, 4))
def test_slots_are_the_last_used_distinct_adapters(uses: list[int], gpu: int, more: int) -> None:
    """With use touching both, each order is simply the latest distinct names: what LRU means."""
    slots = Slots(gpu, gpu + more)
    for number in uses:
        slots.use(str(number))
    latest = list(dict.fromkeys(map(str, reversed(uses))))
    assert list(reversed(slots.gpu)) == latest[:gpu]
    assert list(reversed(slots.cpu)) == latest[: gpu + more]


def test_blocks_are_found_by_adapter_and_all_that_precedes() -> None:
    cache = PrefixCache(100)
    prefix = "x" * 64 * 3
    cache.add(block_keys("a", prefix + "one" * 40, 16))
    assert cache.leading(block_keys("a", prefix + "two" * 40, 16)) == 3
    assert cache.leading(block_keys("b", prefix, 16)) == 0
    assert cache.leading(block_keys("a", "y" + prefix, 16)) == 0


def test_token_ids_make_blocks_of_sixteen() -> None:
    ids = list(range(40))
    assert count_tokens(ids) == 40
    keys = block_keys("a", ids, 16)
    assert len(keys) == 2
    assert block_keys("a", ids[:16], 16) == keys[:1]


def test_the_oldest_blocks_leave_when_there_are_too_many() -> None:
    cache = PrefixCache(4)
    cache.add([1, 2, 3])
    cache.leading([1])
    cache.add([4, 5])
    assert (cache.leading([2]), cache.leading([1]), len(cache)) == (0, 1, 4)
    cache.held = 3
    cache.add([6])
    assert len(cache) == 1
