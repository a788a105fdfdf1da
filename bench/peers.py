"""The contenders: how to install each, how to start it, and which versions it consists of.

What goes out: `Contender`s, each able to say the command line that puts it before two replicas.
Every peer lives in its own virtual environment under `.bench/`, so that none decides what another
runs with. It must not know what is measured.

Choices that are the same for all: one process, INFO logging of requests off (where it is on by
default, it alone would decide the race), health checks and retries as each has them by default.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.null_upstream import BASE_MODEL
from bench.processes import free_port

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".bench"
FORWARDERS = Path(__file__).parent / "forwarders"

#: Sent to every contender that has no keys of its own; LiteLLM refuses a weak one.
KEY = f"sk-{secrets.token_hex(24)}"


@dataclass(frozen=True, slots=True)
class Stand:
    """Where a contender is to stand: its port, the replicas behind it, the key in front."""

    port: int
    upstreams: tuple[str, ...]
    key: str
    scratch: Path


@dataclass(frozen=True, slots=True)
class Launch:
    """A command line, and what it needs in its environment."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


class Inspection(Protocol):
    """Raises if a gateway did not do what it should beside answering `finished` requests."""

    def __call__(self, port: int, key: str, finished: int, *, stream: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the race. `launch` is None where there is no gateway at all.

    `model` is asked for; `upstream_model` is what must then arrive at the replica. `requirements`
    are for pip, the package it is known by first; without `environment` it runs in ours.
    `inspect` looks at it after its loads: more than a reply can tell. `lacking` says what of it
    would have to be made before it can run; None if nothing.
    """

    name: str
    title: str
    launch: Callable[[Stand], Launch] | None
    requirements: tuple[str, ...] = ()
    environment: str | None = None
    model: str = BASE_MODEL
    upstream_model: str = BASE_MODEL
    key: str = KEY
    inspect: Inspection | None = None
    ready_within_s: float = 60.0
    lacking: str | None = None


def python_of(environment: str | None) -> Path:
    """The interpreter of a contender's environment, or the one that runs this."""
    return Path(sys.executable) if environment is None else Path(program(environment, "python"))


def program(environment: str, name: str) -> str:
    return str(HOME / environment / "bin" / name)


def _vllm_router(policy: str) -> Callable[[Stand], Launch]:
    def launch(stand: Stand) -> Launch:
        return Launch(
            [
                program("vllm-router", "vllm-router"),
                *("--worker-urls", *stand.upstreams),
                *("--host", "127.0.0.1", "--port", str(stand.port)),
                *("--policy", policy, "--log-level", "error"),
                *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
            ]
        )

    return launch


def vllm_router(policy: str, title: str) -> Contender:
    """vLLM's router under one of its policies; all of them share an environment."""
    return Contender(
        f"vllm-router-{policy.replace('_', '-')}",
        title,
        _vllm_router(policy),
        requirements=("vllm-router",),
        environment="vllm-router",
    )


def _smg(policy: str) -> Callable[[Stand], Launch]:
    def launch(stand: Stand) -> Launch:
        return Launch(
            [
                *(program("smg", "smg"), "launch"),
                *("--worker-urls", *stand.upstreams),
                *("--host", "127.0.0.1", "--port", str(stand.port)),
                *("--policy", policy, "--log-level", "error"),
                *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
            ]
        )

    return launch


def _forwarder(module: str) -> Callable[[Stand], Launch]:
    def launch(stand: Stand) -> Launch:
        return Launch(
            [
                *(program("forwarders", "uvicorn"), "--app-dir", str(FORWARDERS), f"{module}:app"),
                *("--host", "127.0.0.1", "--port", str(stand.port)),
                *("--loop", "uvloop", "--http", "httptools"),
                *("--no-access-log", "--log-level", "warning"),
            ],
            env={"UPSTREAMS": ",".join(stand.upstreams)},
        )

    return launch


def _litellm(stand: Stand) -> Launch:
    """The proxy with a master key and no database, as its documentation begins."""
    deployments = [
        {
            "model_name": BASE_MODEL,
            "litellm_params": {
                "model": f"hosted_vllm/{BASE_MODEL}",
                "api_base": f"{url}/v1",
                "api_key": "none",
            },
        }
        for url in stand.upstreams
    ]
    config = stand.scratch / "litellm.yaml"
    # JSON is YAML.
    general = {"master_key": stand.key}
    config.write_text(json.dumps({"model_list": deployments, "general_settings": general}))
    return Launch(
        [
            *(program("litellm", "litellm"), "--config", str(config)),
            *("--host", "127.0.0.1", "--port", str(stand.port)),
            *("--num_workers", "1", "--telemetry", "False"),
        ],
        # Without the first it asks the internet for a price list before it starts.
        env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"},
    )


def _bare_asgi(stand: Stand) -> Launch:
    return Launch(
        [
            *(sys.executable, "-m", "uvicorn", "--app-dir", str(FORWARDERS), "bare_asgi:app"),
            *("--host", "127.0.0.1", "--port", str(stand.port)),
            *("--loop", "uvloop", "--http", "httptools"),
            *("--no-access-log", "--log-level", "warning"),
        ],
        env={"UPSTREAMS": ",".join(stand.upstreams)},
    )


DIRECT = Contender("direct", "no gateway: wrk to the null upstream", None)

FLOOR = Contender(
    "bare-asgi",
    "bare ASGI forwarder without features, for scale",
    _bare_asgi,
    requirements=("uvicorn", "httptools", "uvloop"),
)

PEERS = (
    vllm_router("round_robin", "vllm-router, round_robin"),
    vllm_router("cache_aware", "vllm-router, cache_aware (its default)"),
    Contender(
        "smg-round-robin",
        "smg, round_robin",
        _smg("round_robin"),
        requirements=("sglang-router",),
        environment="smg",
    ),
    Contender(
        "fastapi-aiohttp",
        "FastAPI + aiohttp, minimal",
        _forwarder("fastapi_aiohttp"),
        requirements=("fastapi", "uvicorn[standard]", "httpx", "aiohttp"),
        environment="forwarders",
    ),
    Contender(
        "fastapi-httpx",
        "FastAPI + httpx, minimal",
        _forwarder("fastapi_httpx"),
        requirements=("fastapi", "uvicorn[standard]", "httpx", "aiohttp"),
        environment="forwarders",
    ),
    Contender(
        "litellm",
        "LiteLLM proxy",
        _litellm,
        requirements=("litellm[proxy]",),
        environment="litellm",
        ready_within_s=180.0,
    ),
)


def install(contender: Contender) -> bool:
    """Make the contender's environment unless it is there. False: it cannot be had here."""
    if contender.lacking is not None:
        print(f"{contender.name} is {contender.lacking}", file=sys.stderr)
        return False
    if contender.environment is None:
        return True
    complete = HOME / contender.environment / ".complete"
    if complete.exists():
        return True
    print(f"installing {' '.join(contender.requirements)} into .bench/{contender.environment}")
    HOME.mkdir(exist_ok=True)
    python = python_of(contender.environment)
    for argv in (
        [sys.executable, "-m", "venv", str(HOME / contender.environment)],
        [str(python), "-m", "pip", "install", "--quiet", *contender.requirements],
    ):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(done.stderr.strip(), file=sys.stderr)
            return False
    complete.touch()
    return True
