"""What a simulated replica says of itself: /metrics and /v1/models, in vLLM's names.

What comes in: a replica. What goes out: pages. As in vLLM, `lora_requests_info` names adapters with
a request in flight and no others: what is merely resident shows nowhere.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from bench.sim.answers import CREATED, dumps

if TYPE_CHECKING:
    from bench.sim.replica import Replica


def metrics(replica: Replica) -> bytes:
    engine = replica.engine
    labels = f'engine="0",model_name="{replica.served}"'
    in_flight = {s.adapter for s in (*engine.running, *engine.waiting) if s.adapter is not None}
    names = ",".join(sorted(in_flight))
    lora = f'max_lora="{engine.figures.gpu_slots}",running_lora_adapters="{names}"'
    deferred = sum(s.adapter is not None for s in engine.waiting)
    lines = [
        "# TYPE process_start_time_seconds gauge",
        f"process_start_time_seconds {replica.started_at_s!r}",
        "# TYPE vllm:num_requests_running gauge",
        f"vllm:num_requests_running{{{labels}}} {len(engine.running)}.0",
        "# TYPE vllm:num_requests_waiting gauge",
        f"vllm:num_requests_waiting{{{labels}}} {len(engine.waiting)}.0",
        "# TYPE vllm:num_requests_waiting_by_reason gauge",
        f'vllm:num_requests_waiting_by_reason{{{labels},reason="capacity"}} '
        f"{len(engine.waiting) - deferred}.0",
        f'vllm:num_requests_waiting_by_reason{{{labels},reason="deferred"}} {deferred}.0',
        "# TYPE vllm:kv_cache_usage_perc gauge",
        f"vllm:kv_cache_usage_perc{{{labels}}} {engine.cache.usage:.6f}",
        "# TYPE vllm:prefix_cache_queries counter",
        f"vllm:prefix_cache_queries_total{{{labels}}} {engine.cache.queried_tokens}.0",
        "# TYPE vllm:prefix_cache_hits counter",
        f"vllm:prefix_cache_hits_total{{{labels}}} {engine.cache.hit_tokens}.0",
        "# TYPE vllm:lora_requests_info gauge",
        f'vllm:lora_requests_info{{{lora},waiting_lora_adapters="{names}"}} {time.time()!r}',
    ]
    return "\n".join(lines).encode() + b"\n"


def models(replica: Replica) -> bytes:
    shared: dict[str, Any] = {"object": "model", "created": CREATED, "owned_by": "vllm"}
    length = replica.figures.max_model_len
    base = {"id": replica.served, "root": replica.served, "parent": None, "max_model_len": length}
    cards = [base | shared | {"permission": []}]
    for name, path in replica.adapters.paths.items():
        card = {"id": name, "root": path, "parent": replica.served, "max_model_len": None}
        cards.append(card | shared | {"permission": []})
    return dumps({"object": "list", "data": cards})
