"""Model servers to test against, one shape for all: fake, simulated, the worker, a real vLLM.

What comes in: pytest's request for a server. What goes out: a `ModelServer` that runs. The
worker and vLLM are subprocesses and start once per session; tests leave no adapter loaded there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from app import demo
from bench.sim import Config, Simulation
from tests.fakes.adapters import write_adapter
from tests.fakes.loops import LoopThread
from tests.fakes.upstream import FakeUpstream
from tests.processes import LORAGATE, Process, free_port

ROOT = Path(__file__).parent.parent
MAX_LORA_RANK = 16


@dataclass(frozen=True)
class ModelServer:
    """A server that speaks vLLM's dialect, an adapter it can load and one too large for it.

    `process` can be killed and started again; the fake has none.
    """

    url: str
    served: str
    adapter: Path
    oversized: Path
    process: Process | None = None

    def wait_healthy(self) -> None:
        if self.process is not None:
            self.process.wait_http(f"{self.url}/health", within_s=180)


@pytest.fixture(scope="session")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    folder = tmp_path_factory.mktemp("fake")
    upstream = FakeUpstream("tiny", max_lora_rank=MAX_LORA_RANK)
    yield ModelServer(
        upstream.url,
        "tiny",
        write_adapter(folder / "good"),
        write_adapter(folder / "oversized", rank=2 * MAX_LORA_RANK),
    )
    upstream.close()
    assert not upstream.problems


@pytest.fixture(scope="session")
def sim_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """One simulated replica, on a loop of its own."""
    folder = tmp_path_factory.mktemp("sim")
    thread = LoopThread("simulation")
    config = Config(replicas=1, served="tiny", speed=100, files=True, max_lora_rank=MAX_LORA_RANK)
    simulation = thread.run(Simulation(config).__aenter__())
    yield ModelServer(
        simulation.replicas[0].url,
        "tiny",
        write_adapter(folder / "good"),
        write_adapter(folder / "oversized", rank=2 * MAX_LORA_RANK),
    )
    thread.run(simulation.__aexit__(None, None, None))
    thread.close()


@pytest.fixture(scope="session")
def worker_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """`loragate worker` with the demo model, alone."""
    port = free_port()
    folder = tmp_path_factory.mktemp("worker")
    env = {
        "LORAGATE_DATA_DIR": str(folder),
        "LORAGATE_WORKER_PORT": str(port),
        "LORAGATE_WORKER_MODEL": str(demo.MODEL_DIR),
        "LORAGATE_WORKER_SERVED_NAME": demo.BASE_NAME,
        "LORAGATE_WORKER_MAX_LORA_RANK": str(MAX_LORA_RANK),
        "LORAGATE_WORKER_DEVICE": "cpu",
        "LORAGATE_WORKER_THREADS": "1",
    }
    yield from _serve([LORAGATE, "worker"], env, port, folder)


@pytest.fixture(scope="session")
def megatron_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """`loragate worker` that trains the demo model in Megatron, each layer cut over two ranks."""
    port = free_port()
    folder = tmp_path_factory.mktemp("megatron")
    env = {
        "LORAGATE_DATA_DIR": str(folder),
        "LORAGATE_WORKER_PORT": str(port),
        "LORAGATE_WORKER_MAX_LORA_RANK": str(MAX_LORA_RANK),
        "LORAGATE_WORKER_DEVICE": "cpu",
        "LORAGATE_WORKER_THREADS": "1",
        "LORAGATE_WORKER_TRAINER": "megatron",
        "LORAGATE_WORKER_TENSOR_PARALLEL": "2",
        "OMP_NUM_THREADS": "1",
    }
    yield from _serve([sys.executable, "-m", "app.worker.main"], env, port, folder)


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """A real vLLM on the CPU with the demo model and our plugin."""
    with run_vllm(tmp_path_factory.mktemp("vllm")) as server:
        yield server


@contextmanager
def run_vllm(
    folder: Path, *more: str, env: Mapping[str, str] | None = None
) -> Iterator[ModelServer]:
    """A vLLM with our plugin of your own, with more options."""
    port = free_port()
    options = {
        "model": str(demo.MODEL_DIR),
        "served-model-name": demo.BASE_NAME,
        "host": "127.0.0.1",
        "port": str(port),
        "dtype": "float32",
        "max-model-len": "1024",
        "max-loras": "4",
        "max-cpu-loras": "16",
        "max-lora-rank": str(MAX_LORA_RANK),
    }
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server"]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    command += ["--enable-lora", "--enforce-eager", *more]
    base_env = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Beside another it would bind the same core, and wait for work without letting go of it.
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "KMP_BLOCKTIME": "0",
    }
    yield from _serve(command, base_env | dict(env or {}), port, folder)


def _serve(
    command: list[str], env: dict[str, str], port: int, folder: Path
) -> Iterator[ModelServer]:
    process = Process(command, log=folder / "log", env=env)
    server = ModelServer(
        f"http://127.0.0.1:{port}",
        demo.BASE_NAME,
        next(iter(demo.ADAPTERS.values())),
        write_adapter(folder / "oversized", rank=2 * MAX_LORA_RANK, base=demo.BASE_NAME),
        process,
    )
    with process:
        server.wait_healthy()
        yield server


def vllm_python() -> str:
    """The Python of a vLLM with our plugin. Without one the test is skipped; not in CI."""
    named = os.environ.get("LORAGATE_TEST_VLLM_PYTHON")
    python = Path(named) if named else ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        _without(f"no vLLM: {python} does not exist (`make vllm` installs one)")
    if not _plugin_is_current(str(python)):
        _without(f"{python} does not have the plugin as it is here (`make vllm` installs it)")
    return str(python)


def bridge_python() -> str:
    """The Python of a Megatron-Bridge. Without one the test is skipped, unless one was named.

    CI has none of itself: it takes 5 GB and another Python.
    """
    named = os.environ.get("LORAGATE_TEST_BRIDGE_PYTHON")
    python = Path(named) if named else ROOT / ".venv-bridge" / "bin" / "python"
    if not python.exists():
        missing = f"no Megatron-Bridge: {python} does not exist (`make bridge` installs one)"
        if named:
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return str(python)


def _plugin_is_current(python: str) -> bool:
    find = "import importlib.util as u; print(u.find_spec('loragate_vllm').origin)"
    found = subprocess.run([python, "-c", find], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        return False
    installed = Path(found.stdout.strip()).parent
    return all(
        (installed / source.name).is_file()
        and (installed / source.name).read_bytes() == source.read_bytes()
        for source in (ROOT / "plugin" / "loragate_vllm").glob("*.py")
    )


def _without(missing: str) -> NoReturn:
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(missing, pytrace=False)
    pytest.skip(missing)
