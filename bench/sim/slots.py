"""Where a replica's adapters are: names, CPU slots and GPU slots, evicted as vLLM does it.

What comes in: an adapter that is loaded or used. What goes out: what had to be moved for it. It
mirrors `LRUCacheWorkerLoRAManager` of vLLM 0.32: a load puts an adapter in both; every use touches
both; what the CPU evicts leaves the GPU too, and its next use reads the files again; unloading
forgets a name and nothing else. It knows nothing of time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moved:
    """What one use cost: read from disk, copied to a GPU slot."""

    from_disk: bool
    to_gpu: bool


class Slots:
    """The adapters of one replica; both orders are oldest first."""

    def __init__(self, gpu_slots: int, cpu_slots: int) -> None:
        if cpu_slots < gpu_slots:
            raise ValueError(f"{cpu_slots} CPU slots are fewer than {gpu_slots} GPU slots")
        self.gpu_slots = gpu_slots
        self.cpu_slots = cpu_slots
        self.gpu: OrderedDict[str, None] = OrderedDict()
        self.cpu: OrderedDict[str, None] = OrderedDict()

    def use(self, name: str) -> Moved:
        """Make an adapter ready for a step, or for the first time."""
        from_disk = name not in self.cpu
        if from_disk and len(self.cpu) >= self.cpu_slots:
            evicted, _ = self.cpu.popitem(last=False)
            self.gpu.pop(evicted, None)
        self.cpu[name] = None
        self.cpu.move_to_end(name)
        to_gpu = name not in self.gpu
        if to_gpu and len(self.gpu) >= self.gpu_slots:
            self.gpu.popitem(last=False)
        self.gpu[name] = None
        self.gpu.move_to_end(name)
        return Moved(from_disk, to_gpu)
