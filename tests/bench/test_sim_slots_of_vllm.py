"""The simulator's slots beside vLLM's own: the same uses, the same evictions."""

from __future__ import annotations

import json
import random
import subprocess
from typing import Any

import pytest

from bench.sim.slots import Slots
from tests.servers import vllm_python

GPU_SLOTS, CPU_SLOTS, ADAPTERS = 3, 6, 10

#: Drives vLLM's `LRUCacheWorkerLoRAManager` over a model without layers: no weights, all the rest.
SCRIPT = """
import json, sys
from types import SimpleNamespace
from vllm.lora import model_manager, worker_manager

gpu_slots, cpu_slots, uses = json.load(sys.stdin)

class Models(model_manager.LRUCacheLoRAModelManager):
    def __init__(self):
        self.lora_config = SimpleNamespace(max_loras=gpu_slots, max_cpu_loras=cpu_slots)
        cache = model_manager.AdapterLRUCache
        self._registered_adapters = cache(cpu_slots, self.deactivate_adapter)
        self._active_adapters = cache(gpu_slots, self._deactivate_adapter)
        self.lora_index_to_id = [None] * gpu_slots
        self.modules = {}

    def _add_adapter(self, lora):
        self._registered_adapters[lora.id] = lora

read = []

class Worker(worker_manager.LRUCacheWorkerLoRAManager):
    def __init__(self):
        self._adapter_manager = Models()

    def _load_adapter(self, request):
        read.append(request.lora_int_id)
        return SimpleNamespace(id=request.lora_int_id)

worker = Worker()
seen = []
for number in uses:
    before = len(read)
    worker.add_adapter(SimpleNamespace(lora_int_id=number, load_inplace=False))
    models = worker._adapter_manager
    seen.append([
        len(read) > before,
        list(models._active_adapters.order),
        list(models._registered_adapters.order),
    ])
print("SEEN " + json.dumps(seen))
"""


@pytest.mark.vllm
def test_every_use_moves_what_vllm_moves() -> None:
    draw = random.Random(3)
    weights = [1 / rank for rank in range(1, ADAPTERS + 1)]
    uses = draw.choices(range(1, ADAPTERS + 1), weights, k=400)
    done = subprocess.run(
        [vllm_python(), "-c", SCRIPT],
        input=json.dumps([GPU_SLOTS, CPU_SLOTS, uses]),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert lines, done.stderr[-2000:]
    slots = Slots(GPU_SLOTS, CPU_SLOTS)
    ours: list[Any] = []
    for number in uses:
        moved = slots.use(str(number))
        ours.append([moved.from_disk, _numbers(slots.gpu), _numbers(slots.cpu)])
    assert ours == json.loads(lines[0].removeprefix("SEEN "))


def _numbers(names: Any) -> list[int]:
    return [int(name) for name in names]
