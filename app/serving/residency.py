"""What one engine holds, mirrored by us, because no engine says it.

What comes in: adapters loaded, used and forgotten. What goes out: which are in its slots, which in
its memory, which must be read from disk again. Pure state; knows no engine and no clock.

vLLM keeps two LRU caches (`lora/worker_manager.py`, `LRUCacheWorkerLoRAManager`): `max_cpu_loras`
adapters in memory and `max_loras` of them in GPU slots. A load puts an adapter into both, each use
moves it to the end of both, and unloading only forgets the name. Its metric `lora_requests_info`
shows adapters with a request in flight, so an idle one that is ready to serve is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping


class Residency:
    """The names an engine knows (`known`: name -> path), and where their weights are.

    Args:
        slots: adapters that can be in one step, vLLM's `max_loras`.
        memory: adapters kept in memory, vLLM's `max_cpu_loras`; never fewer than `slots`.
    """

    __slots__ = ("_in_memory", "_in_slots", "known", "memory", "slots")

    def __init__(self, slots: int, memory: int) -> None:
        self.slots = slots
        self.memory = max(slots, memory)
        self.known: dict[str, str] = {}
        # Least recently used first.
        self._in_memory: dict[str, None] = {}
        self._in_slots: dict[str, None] = {}

    def resize(self, slots: int, memory: int) -> None:
        """The pool's options changed; what no longer fits is gone."""
        self.slots = slots
        self.memory = max(slots, memory)
        _trim(self._in_memory, self.memory)
        _trim(self._in_slots, self.slots)

    def restart(self, known: Mapping[str, str]) -> None:
        """It is a new engine, or one seen for the first time, which lists these names."""
        self.known = dict(known)
        self._in_memory = dict.fromkeys(known)
        self._in_slots = dict.fromkeys(known)
        _trim(self._in_memory, self.memory)
        _trim(self._in_slots, self.slots)

    def loaded(self, name: str, path: str) -> None:
        """It read the weights: they are in memory and in a slot."""
        self.known[name] = path
        self.used(name)

    def used(self, name: str) -> None:
        """A request for it goes there; if it was evicted, the engine reads it again."""
        _touch(self._in_memory, name, self.memory)
        _touch(self._in_slots, name, self.slots)

    def forget(self, name: str) -> bool:
        """It no longer knows the name; whether it did. The weights stay until evicted."""
        return self.known.pop(name, None) is not None

    def in_slot(self, name: str) -> bool:
        """Serves at once."""
        return name in self._in_slots and name in self.known

    def in_memory(self, name: str) -> bool:
        """Serves after a copy from memory; no disk is read."""
        return name in self._in_memory and name in self.known

    @property
    def room(self) -> bool:
        """Whether another adapter fits into memory without evicting one."""
        return len(self._in_memory) < self.memory


def _touch(cache: dict[str, None], name: str, capacity: int) -> None:
    cache.pop(name, None)
    cache[name] = None
    if len(cache) > capacity:
        del cache[next(iter(cache))]


def _trim(cache: dict[str, None], capacity: int) -> None:
    while len(cache) > capacity:
        del cache[next(iter(cache))]
