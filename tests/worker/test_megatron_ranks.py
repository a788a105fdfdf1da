"""Ranks start together and end together, whoever starts them and whichever ends."""

from __future__ import annotations

import os
import signal
import sys
from array import array
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from app import domain
from app.domain import TrainerKind
from app.errors import ConfigurationError, TrainerUnavailable
from app.ops import Datum, ForwardBackward, OptimStep, Tensor
from app.settings import Settings
from app.training.trainers import TrainerClient
from app.worker.trainers.megatron import MegatronTrainer, plan
from app.worker.trainers.megatron_launch import launch
from tests.processes import Process, free_port
from tests.waiting import wait_until
from tests.worker.megatron_lab import Lab
from tests.worker.trainees import DEMO, spec

pytestmark = [
    pytest.mark.worker,
    pytest.mark.skipif(find_spec("megatron") is None, reason="pip install 'loragate[megatron]'"),
]

TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--standalone",
    "-m",
)


def test_a_rank_that_dies_ends_the_trainer(tmp_path: Path) -> None:
    lab = Lab(tmp_path, worker_model=DEMO, worker_tensor_parallel=2)
    (other,) = psutil.Process(lab.process.pid).children()
    other.send_signal(signal.SIGKILL)
    assert lab.process.wait(20) == 70
    assert "rank 1 ended with status -9" in lab.log.read_text()


def test_a_call_that_fails_on_one_rank_ends_the_trainer(tmp_path: Path) -> None:
    lab = Lab(tmp_path, worker_model=DEMO, worker_tensor_parallel=2)
    (other,) = psutil.Process(lab.process.pid).children()
    with pytest.raises(EOFError):
        lab.ask("_team.call", "score", "no such run", [[1, 2]])
    assert lab.process.wait(20) == 70
    wait_until(lambda: not other.is_running(), within_s=20)


def test_the_other_ranks_end_with_a_killed_worker(tmp_path: Path) -> None:
    lab = Lab(tmp_path, worker_model=DEMO, worker_data_parallel=2)
    (other,) = psutil.Process(lab.process.pid).children()
    os.kill(lab.process.pid, signal.SIGKILL)
    lab.process.wait(20)
    wait_until(lambda: not other.is_running(), within_s=20)


async def test_a_worker_under_torchrun(tmp_path: Path) -> None:
    port = free_port()
    env = {
        "LORAGATE_WORKER_PORT": str(port),
        "LORAGATE_WORKER_TRAINER": "megatron",
        "LORAGATE_WORKER_TENSOR_PARALLEL": "2",
        "LORAGATE_WORKER_DEVICE": "cpu",
        "LORAGATE_WORKER_STATE_DIR": str(tmp_path / "runs"),
    }
    url = f"http://127.0.0.1:{port}"
    with Process([*TORCHRUN, "app.worker.main"], log=tmp_path / "log", env=env) as worker:
        worker.wait_http(f"{url}/health")
        trainer = domain.Trainer("here", TrainerKind.MEGATRON, "demo", url)
        async with TrainerClient(trainer) as client:
            info = await client.info()
            assert (info.kind, info.parallel) == ("megatron", {"tp": 2, "pp": 1, "dp": 1})
            run = client.run("job")
            await run.open("demo", spec(), 1)
            tokens, targets = (
                Tensor("int32", (3,), array("i", values).tobytes())
                for values in ([5, 6, 7], [6, 7, 8])
            )
            weights = Tensor("float32", (3,), array("f", [1, 1, 1]).tobytes())
            await run.submit(1, ForwardBackward([Datum(tokens, targets, weights)]))
            await run.submit(2, OptimStep(1e-2))
            assert (await run.outcome(1)).metrics["tokens:sum"] == 3
            assert (await run.outcome(2)).metrics["grad_norm:mean"] > 0
        worker.terminate()
        assert "trainer.rank_lost" not in worker.output()


def test_torchrun_and_the_settings_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match=r"started 2 ranks.*TENSOR_PARALLEL.*4 \* 1 \* 1"):
        MegatronTrainer.start(Settings(worker_device="cpu", worker_tensor_parallel=4), DEMO)


def test_layers_must_be_shared_equally() -> None:
    with pytest.raises(ConfigurationError, match=r"6 layers.*WORKER_PIPELINE_PARALLEL"):
        MegatronTrainer.start(Settings(worker_device="cpu", worker_pipeline_parallel=4), DEMO)


def test_a_rank_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that only the other rank reads from the environment."""
    settings = Settings(worker_device="cpu", worker_data_parallel=2)
    monkeypatch.setenv("LORAGATE_WORKER_MAX_BATCH", "0")
    launched = launch(plan(settings, DEMO), settings)
    with pytest.raises(TrainerUnavailable, match=r"Rank 1 .* ended with status 1"):
        launched.join()
    for child in launched.children:
        assert child.stdin is not None
        child.stdin.close()


def test_there_must_be_a_gpu_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    settings = Settings(worker_device="cuda", worker_tensor_parallel=2)
    with pytest.raises(ConfigurationError, match=r"2 \* 1 \* 1 ranks, and this host has 1 GPUs"):
        MegatronTrainer.start(settings, DEMO)


def test_a_number_format_without_range_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="LORAGATE_WORKER_DTYPE is float16"):
        plan(Settings(worker_dtype="float16", worker_device="cpu"), DEMO)


def test_without_megatron_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.worker.trainers.megatron.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"loragate\[megatron\]"):
        MegatronTrainer.start(Settings(), DEMO)


def test_without_transformer_engine_bridge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> object:
        return None if name == "transformer_engine" else name

    monkeypatch.setattr("app.worker.trainers.megatron.find_spec", find)
    with pytest.raises(ConfigurationError, match=r"ENGINE=bridge needs NVIDIA's Transformer Engin"):
        MegatronTrainer.start(Settings(worker_megatron_engine="bridge"), DEMO)


def test_what_ranks_cannot_share_bridge_does_not_pad() -> None:
    def planned(**layout: int) -> None:
        plan(Settings(worker_megatron_engine="bridge", worker_device="cpu", **layout), DEMO)

    planned(worker_tensor_parallel=1, worker_data_parallel=2)
    with pytest.raises(ConfigurationError, match=r"heads 3, which 2.*TENSOR_PARALLEL.*ENGINE=core"):
        planned(worker_tensor_parallel=2)
    with pytest.raises(ConfigurationError, match=r"PIPELINE_PARALLEL is 2.*ENGINE=core"):
        planned(worker_pipeline_parallel=2)
