"""SkyRL's Tinker server with its JAX backend: how to install it, start it and drive it.

What comes in: batches of token ids. What goes out: seconds and losses. SkyRL is no package: its
source is fetched at one commit, and it runs in an environment of its own under `.bench/skyrl`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from app import demo
from bench.batching import until_200
from bench.peers import HOME
from bench.processes import Unusable, free_port, running
from bench.training_client import AHEAD, LEARNING_RATE, RANK, RUNS, Batch

REPOSITORY = "https://github.com/NovaSky-AI/SkyRL"
COMMIT = "a9564572eb8e91076be43c1bd5e4615e3de17265"
ENVIRONMENT, SOURCE = HOME / "skyrl", HOME / "skyrl-src"
CLIENT = Path(__file__).with_name("skyrl_client.py")
#: On older ones its server does not import: pydantic wants another TypedDict there.
PYTHONS = ("python3.12", "python3.13")
#: What its project file asks for with the extras `tinker` and `jax`; uv is how it is started.
REQUIREMENTS = (
    "aiosqlite", "asyncpg", "cloudpathlib>=0.23", "datasets>=4", "fastapi[standard]",
    "flax>=0.12.2", "hf_transfer", "jax>=0.8,<1", "optax>=0.2.5", "peft==0.18.1", "pillow",
    "psycopg2-binary", "rich", "safetensors>=0.6.2", "sqlalchemy[asyncio]", "sqlmodel",
    "tinker==0.24.1", "tokenizers>=0.21.2", "transformers>=5.6.1,<=5.8.0", "typer", "uv",
    "xxhash", "zstandard",
)  # fmt: skip
TOLD = ("jax", "jaxlib", "flax", "optax", "tinker", "transformers")
#: One place is the base's own. More places, or a higher rank, would only cost it time: it
#: computes all of them in every optimizer step.
BACKEND = {"max_lora_adapters": RUNS + 1, "max_lora_rank": RANK}
STARTS_S = 180.0


def install() -> bool:
    """Make its environment unless it is there. False: it cannot be had here."""
    complete = ENVIRONMENT / ".complete"
    if complete.exists():
        return True
    python = next(filter(None, map(_working, PYTHONS)), None)
    if python is None:
        print(f"SkyRL needs one of {', '.join(PYTHONS)}", file=sys.stderr)
        return False
    print(f"installing SkyRL at {COMMIT[:9]} into .bench/skyrl", flush=True)
    HOME.mkdir(exist_ok=True)
    commands: list[list[str]] = [
        [python, "-m", "venv", str(ENVIRONMENT)],
        [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet", *REQUIREMENTS],
    ]
    if not (SOURCE / "skyrl").exists():
        git = ["git", "-C", str(SOURCE)]
        commands += [
            ["git", "clone", "--filter=blob:none", "--no-checkout", REPOSITORY, str(SOURCE)],
            [*git, "checkout", "--quiet", COMMIT, "--", "skyrl"],
        ]
    for argv in commands:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(done.stderr.strip(), file=sys.stderr)
            return False
    complete.touch()
    return True


def versions() -> dict[str, str]:
    """What it consists of here, as installed."""
    asked = "import importlib.metadata as m, sys\nfor n in sys.argv[1:]: print(n, m.version(n))"
    argv = [str(ENVIRONMENT / "bin" / "python"), "-c", asked, *TOLD]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return {"SkyRL": COMMIT[:9], **dict(line.split(" ", 1) for line in done.stdout.splitlines())}


@contextlib.contextmanager
def server_running(scratch: Path) -> Iterator[str]:
    """Its API server and its engine on the demo model; the URL."""
    port = free_port()
    folder = scratch / f"skyrl-{port}"
    folder.mkdir()
    binaries = ENVIRONMENT / "bin"
    # It starts its engine with the words it was started with itself, which must be uv's.
    argv = [str(binaries / "uv"), "run", "--no-project", "--python", str(binaries / "python")]
    argv += ["-m", "skyrl.tinker.api", "--backend", "jax"]
    argv += ["--base-model", str(demo.MODEL_DIR), "--backend-config", json.dumps(BACKEND)]
    argv += ["--database-url", f"sqlite:///{folder / 'tinker.db'}"]
    argv += ["--checkpoints-base", str(folder / "checkpoints")]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    env = {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(SOURCE),
        "UV_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
    }
    log = scratch / f"skyrl-{port}.log"
    with running(argv, core=None, log=log, env=env, cwd=folder) as process:
        until_200(port, "/api/v1/healthz", process, log, STARTS_S)
        yield f"http://127.0.0.1:{port}"


class Client:
    """Its SDK at work on eight runs, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def round(self, batches: Sequence[Batch], steps: int) -> tuple[float, list[list[float]]]:
        """Steps of the first runs, one for each batch: seconds until all are done, and losses."""
        answer = self.ask({"batches": list(batches), "steps": steps})
        return answer["seconds"], answer["losses"]

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        """One line to it and one back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise Unusable("SkyRL's client ended; its messages are above")
        found: dict[str, Any] = json.loads(line)
        return found


@contextlib.contextmanager
def client_running(url: str) -> Iterator[Client]:
    """Eight runs made on the server, ready for rounds."""
    argv = [str(ENVIRONMENT / "bin" / "python"), str(CLIENT)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        client = Client(process)
        task = {"url": url, "base_model": str(demo.MODEL_DIR), "rank": RANK, "runs": RUNS}
        client.ask({**task, "ahead": AHEAD, "learning_rate": LEARNING_RATE})
        try:
            yield client
        finally:
            if process.stdin is not None:
                process.stdin.close()
            process.terminate()


def _working(name: str) -> str | None:
    """The program if it runs: a version manager may offer names of versions it lacks."""
    found = shutil.which(name)
    if found is None:
        return None
    done = subprocess.run([found, "--version"], capture_output=True, check=False)
    return found if done.returncode == 0 else None
