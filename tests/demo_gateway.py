"""A gateway before one model server that has the demo model, with adapters of the demo's.

What comes in: a `ModelServer`. What goes out: a `Gateway` for the length of a block, and how many
requests it says it answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from app import demo
from app.settings import PoolSettings, Settings
from tests.integration.gateway import Gateway
from tests.servers import MAX_LORA_RANK, ModelServer
from tests.waiting import wait_until


@contextmanager
def gateway_before(
    server: ModelServer, folder: Path, adapters: Iterable[str] = ()
) -> Iterator[Gateway]:
    pool = PoolSettings.model_validate(
        {
            "name": "pool",
            "base_model": demo.BASE_NAME,
            "base_model_path": demo.MODEL_DIR,
            "max_lora_rank": MAX_LORA_RANK,
            "replicas": (server.url,),
        }
    )
    settings = Settings(
        data_dir=folder,
        import_dirs=(demo.MODEL_DIR.parent,),
        pools=(pool,),
        embedded="off",
        health_period_s=0.2,
    )
    gateway = Gateway(settings)
    try:
        wait_until(gateway.ready)
        for name in adapters:
            gateway.register(name, demo.ADAPTERS[name])
        yield gateway
    finally:
        gateway.close()


def asked(gateway: Gateway) -> float:
    """How many requests the gateway has answered with 200."""
    families = text_string_to_metric_families(gateway.client.get("/metrics").text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "loragate_requests_total" and sample.labels["status"] == "200"
    )
