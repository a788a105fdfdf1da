"""loragate as a contender: a gateway from this checkout with keys, adapters and all it does.

What comes in: how many adapters to register. What goes out: a `Contender` whose registry holds
them and one API key. A registry is filled once through the gateway's own verbs and used for every
round; all its adapters share one tiny set of weights, which the store keeps once.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from sqlalchemy import Table, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import SystemClock
from app.control import adapters, keys, pools
from app.control.intake import Candidate, PathSource, admit
from app.db.blobs import AdapterStore
from app.db.engine import Database, database_url, migrate
from app.db.tables import AdapterRow, AliasRow, VersionRow
from app.domain import BaseModel, Pool, Scope
from app.settings import PoolSettings, Settings
from bench import compiled
from bench.client import chat_body, get, post
from bench.measure import Misbehaved
from bench.null_upstream import BASE_MODEL
from bench.peers import Contender, Launch, Stand


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to measure loragate. `command` is what serves it: ours, or any ASGI server's.

    `compiled` runs the build of `make compiled` in the place of the checkout.
    """

    title: str
    adapters: int = 1
    command: tuple[str, ...] = ("loragate", "serve")
    compiled: bool = False


VARIANTS = {
    "loragate-compiled": Variant("loragate, compiled", compiled=True),
    "loragate": Variant("loragate, pure Python"),
    "loragate-10k": Variant("loragate, pure Python, 10,000 adapters", adapters=10_000),
    "loragate-uvicorn": Variant(
        "loragate, pure Python, under plain uvicorn",
        command=("uvicorn", "app.main:app", "--no-access-log", "--log-level", "warning"),
    ),
}

POOL = "bench"
#: A base just large enough for an adapter's shapes to be checked against.
BASE_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 256,
}
RANK = 1


def seeded(name: str, scratch: Path) -> Contender:
    """Fill a registry and return the contender that serves it. Its oldest adapter is asked for."""
    return registered(name, VARIANTS[name], scratch)


def registered(name: str, variant: Variant, scratch: Path, **options: int) -> Contender:
    """The same for any variant, with `options` of its pool that this version has."""
    _forget_environment()
    home = scratch / name
    settings = Settings(data_dir=home, embedded="off")
    migrate(settings)
    key = asyncio.run(_fill(settings, home / "adapter", variant.adapters))
    model = adapter_name(0)
    return Contender(
        name,
        variant.title,
        _launcher(home, variant, options),
        requirements=("loragate", "uvicorn", "httptools", "uvloop"),
        model=model,
        upstream_model=f"{model}@1",
        key=key,
        inspect=_inspect,
        lacking=compiled.missing() if variant.compiled else None,
    )


def _forget_environment() -> None:
    """Measure the defaults, whatever this shell has set for its own gateway."""
    for name in [name for name in os.environ if name.startswith("LORAGATE_")]:
        del os.environ[name]


async def _fill(settings: Settings, adapter: Path, count: int) -> str:
    """One pool, `count` adapters, one key; returns the key's secret."""
    clock = SystemClock()
    base = BaseModel(BASE_MODEL, config=BASE_CONFIG)
    _write_adapter(adapter)
    db = Database(database_url(settings))
    try:
        admitted = await admit(
            PathSource(adapter, roots=(adapter.parent,)),
            candidates=[Candidate(base, Pool(POOL, BASE_MODEL, BASE_MODEL))],
            store=AdapterStore(settings.store_path),
            settings=settings,
        )
        async with db.begin() as session:
            await pools.create(session, clock, name=POOL, base=base, declared=True)
            _, secret = await keys.create(session, clock, name="bench", scopes=[Scope.INFERENCE])
            await adapters.register(
                session,
                clock,
                name=adapter_name(0),
                base_model=BASE_MODEL,
                digest=admitted.digest,
                facts=admitted.facts,
                source="bench",
            )
        async with db.begin() as session:
            await _multiply(session, count)
    finally:
        await db.close()
    return secret


async def _multiply(session: AsyncSession, count: int) -> None:
    """Copy the one adapter's rows under other names: registering each would take a minute."""
    for row in (AdapterRow, VersionRow, AliasRow):
        table = cast(Table, row.__table__)
        original = dict((await session.execute(select(table))).mappings().one())
        ids = {name: value for name, value in original.items() if name in ("id", "adapter_id")}
        copies = []
        for number in range(1, count):
            copy = original | {name: value + number for name, value in ids.items()}
            if row is AdapterRow:
                copy["name"] = adapter_name(number)
            copies.append(copy)
        if copies:
            await session.execute(insert(table), copies)


def adapter_name(number: int) -> str:
    """What the adapters of every registry here are called."""
    return f"bench-{number:05}"


def _write_adapter(folder: Path) -> None:
    """The two files of a LoRA adapter of rank 1 on one projection, all zeros."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_MODEL,
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    width = 64
    size = 4 * RANK * width
    header = json.dumps(
        {
            f"{prefix}.lora_A.weight": {
                "dtype": "F32",
                "shape": [RANK, width],
                "data_offsets": [0, size],
            },
            f"{prefix}.lora_B.weight": {
                "dtype": "F32",
                "shape": [width, RANK],
                "data_offsets": [size, 2 * size],
            },
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    weights = struct.pack("<Q", len(header)) + header + bytes(2 * size)
    (folder / "adapter_model.safetensors").write_bytes(weights)


def _launcher(
    home: Path, variant: Variant, options: Mapping[str, int]
) -> Callable[[Stand], Launch]:
    known = {name: options[name] for name in options if name in PoolSettings.model_fields}

    def launch(stand: Stand) -> Launch:
        pool = {"name": POOL, "base_model": BASE_MODEL, "replicas": stand.upstreams, **known}
        program, *arguments = variant.command
        if program == "uvicorn":
            arguments += ["--host", "127.0.0.1", "--port", str(stand.port)]
        return Launch(
            [str(Path(sys.executable).with_name(program)), *arguments],
            env={
                "LORAGATE_HOST": "127.0.0.1",
                "LORAGATE_PORT": str(stand.port),
                "LORAGATE_DATA_DIR": str(home),
                "LORAGATE_POOLS": json.dumps([pool]),
                "LORAGATE_EMBEDDED": "off",
                **({"PYTHONPATH": str(compiled.FOLDER)} if variant.compiled else {}),
            },
        )

    return launch


def _inspect(port: int, key: str, finished: int, *, stream: bool) -> None:
    """After a load: was the door locked, and did it count and bill what it served?"""
    stranger = post(port, chat_body(adapter_name(0), stream=stream), "lg-not-a-key")
    if stranger.status != 401:
        raise Misbehaved(f"answered {stranger.status} to an unknown key")
    page = get(port, "/metrics").decode()
    counted = _sum(page, "loragate_requests_total", 'status="200"')
    billed = _sum(page, "loragate_tokens_total", f'model="{adapter_name(0)}@1"')
    if counted < finished or billed < finished:
        raise Misbehaved(f"counted {counted} requests and billed {billed} tokens of {finished}")


def _sum(page: str, family: str, label: str) -> int:
    """The sum of a family's samples that have a label."""
    samples = re.findall(rf"^{family}{{([^}}]*)}} (\S+)", page, re.M)
    return int(sum(float(value) for labels, value in samples if label in labels))
