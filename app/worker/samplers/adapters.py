"""Which adapters are in memory.

What comes in: adapters that requests want. What goes out: the slot each has in the model, and the
least recently used one gone when there are too many. It must not know: names clients use, HTTP.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

_numbers = count()


@dataclass(eq=False, slots=True)
class Adapter:
    """One registration of adapter files. Loading the same files again is another one.

    `running` counts sequences that hold its slot; a retired adapter leaves when none does.
    """

    name: str
    path: str
    slot: str = field(default_factory=lambda: f"slot{next(_numbers)}")
    running: int = 0
    retired: bool = False


class Layers(Protocol):
    """Where slots live."""

    def unload(self, slot: str) -> None:
        """Free a slot; one that is not there is fine."""


class Resident:
    """The adapters that have a slot, least recently used first."""

    def __init__(self, layers: Layers, load: Callable[[Adapter], None], limit: int) -> None:
        self._layers = layers
        self._load = load
        self._limit = limit
        self._adapters: OrderedDict[Adapter, None] = OrderedDict()

    def __contains__(self, adapter: Adapter) -> bool:
        return adapter in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def ensure(self, adapter: Adapter) -> bool:
        """Load it if needed. False when every slot belongs to a running adapter."""
        if adapter in self._adapters:
            self._adapters.move_to_end(adapter)
            return True
        if not self._make_room():
            return False
        self._load(adapter)
        self._adapters[adapter] = None
        return True

    def retire(self, adapter: Adapter) -> None:
        """It will not be asked for again; sequences that run on it finish."""
        adapter.retired = True
        if adapter.running == 0:
            self._evict(adapter)

    def claim(self, adapter: Adapter) -> None:
        adapter.running += 1

    def release(self, adapter: Adapter) -> None:
        adapter.running -= 1
        if adapter.retired and adapter.running == 0:
            self._evict(adapter)

    def _make_room(self) -> bool:
        while len(self._adapters) >= self._limit:
            idle = next((one for one in self._adapters if one.running == 0), None)
            if idle is None:
                return False
            self._evict(idle)
        return True

    def _evict(self, adapter: Adapter) -> None:
        if adapter in self._adapters:
            del self._adapters[adapter]
            self._layers.unload(adapter.slot)
