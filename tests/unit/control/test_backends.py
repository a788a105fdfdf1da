"""Which backend does what, for every combination of the variables; and those that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from app import demo
from app.control.backends import Combination, Operation, combine, vllm_command, worker_base
from app.errors import ConfigurationError, NotTrainable
from app.settings import BackendSettings, PoolSettings, Settings, TrainerSettings

VLLM = "http://vllm.local:8000"
MEGATRON = "http://megatron.local:5000"
TRAINING = [op for op in Operation if not op.samples]
SAMPLING = [op for op in Operation if op.samples]

#: (USE_MEGATRON, USE_VLLM) -> who trains, who samples.
TABLE = {
    (True, True): ("megatron", "vllm"),
    (True, False): ("megatron", "megatron"),
    (False, False): ("hf", "hf"),
    (False, True): ("hf", "vllm"),
}


def combined(
    megatron: bool = False, vllm: bool = False, settings: Settings | None = None, **also: Any
) -> Combination:
    given = {"megatron_server_url": MEGATRON, "vllm_base_url": VLLM} | also
    backends = BackendSettings(use_megatron=megatron, use_vllm=vllm, **given)
    return combine(backends, settings or Settings())


@pytest.mark.parametrize("operation", Operation)
@pytest.mark.parametrize("use", TABLE)
def test_every_operation_has_its_backend(use: tuple[bool, bool], operation: Operation) -> None:
    trains, samples = TABLE[use]
    assert combined(*use).does(operation) == (samples if operation.samples else trains)


@pytest.mark.parametrize("operation", TRAINING)
def test_a_sampler_alone_trains_nothing(operation: Operation) -> None:
    for settings in (Settings(worker_trainer="off"), Settings(embedded="off")):
        found = combined(vllm=True, settings=settings)
        with pytest.raises(NotTrainable, match="Nothing trains 'demo'"):
            found.does(operation)
        assert [found.does(op) for op in SAMPLING] == ["vllm", "vllm"]


@pytest.mark.parametrize("operation", Operation)
def test_nothing_declared_does_nothing(operation: Operation) -> None:
    with pytest.raises(NotTrainable):
        combined(settings=Settings(embedded="off")).does(operation)


def test_hugging_face_alone_is_the_embedded_worker() -> None:
    found = combined()
    assert (found.pools, found.trainers, found.base_model) == ((), (), "demo")
    assert found.embedded is not None
    assert found.embedded.samples
    assert found.embedded.max_jobs == 8


def test_hugging_face_with_vllm_embeds_a_trainer_that_does_not_sample() -> None:
    found = combined(vllm=True)
    (pool,) = found.pools
    assert (pool.replicas, pool.base_model, pool.dialect) == ((VLLM,), "demo", "vllm")
    assert pool.base_model_path == demo.MODEL_DIR
    assert found.trainers == ()
    assert found.embedded is not None
    assert not found.embedded.samples


def test_megatron_trains_one_job_at_a_time_whatever_max_workers() -> None:
    found = combined(True, True, max_workers=32)
    assert [pool.replicas for pool in found.pools] == [(VLLM,)]
    (trainer,) = found.trainers
    assert (trainer.kind, trainer.url, trainer.max_jobs) == ("megatron", MEGATRON, None)
    assert found.embedded is None


def test_megatron_alone_samples_where_it_trains() -> None:
    (pool,) = combined(True).pools
    assert (pool.dialect, pool.replicas) == ("megatron", (MEGATRON,))
    assert pool.max_lora_rank == Settings().worker_max_lora_rank


def test_the_seeds_defaults() -> None:
    found = combine(BackendSettings(use_megatron=True, use_vllm=True), Settings())
    assert [pool.replicas for pool in found.pools] == [("http://127.0.0.1:8000",)]
    assert [trainer.url for trainer in found.trainers] == ["http://localhost:5000"]
    assert (found.pools[0].max_loras, found.pools[0].max_lora_rank) == (4, 64)


def test_variables_have_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "USE_VLLM": "true",
        "VLLM_HOST": "10.0.0.5",
        "VLLM_PORT": "8100",
        "VLLM_MAX_LORAS": "6",
        "VLLM_MAX_LORA_RANK": "128",
        "MAX_WORKERS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    found = combine(BackendSettings(), Settings())
    (pool,) = found.pools
    assert pool.replicas == ("http://10.0.0.5:8100",)
    assert (pool.max_loras, pool.max_lora_rank) == (6, 128)
    assert found.embedded is not None
    assert found.embedded.max_jobs == 3


def test_the_base_url_wins_over_host_and_port() -> None:
    (pool,) = combined(vllm=True, vllm_host="10.0.0.5", vllm_port=9).pools
    assert pool.replicas == (VLLM,)


def test_a_trainer_declared_for_the_base_is_enough() -> None:
    trainer = TrainerSettings(name="far", base_model="demo", url="http://far:1")
    found = combined(vllm=True, settings=Settings(trainers=(trainer,)))
    assert (found.trainers, found.embedded) == ((trainer,), None)
    assert found.does(Operation.FWDBWD) == "hf"


def test_the_worker_s_folder_as_vllm_model_is_the_worker_s_base() -> None:
    settings = Settings.model_validate({"worker_model": "/models/llama"})
    found = combined(vllm=True, vllm_model="/models/llama", settings=settings)
    (pool,) = found.pools
    assert worker_base(settings) == found.base_model == pool.base_model == "llama"
    assert pool.served_name == "/models/llama"


@pytest.mark.parametrize(
    ("use", "settings", "also", "says"),
    [
        ((True, True), {}, {"vllm_base_url": MEGATRON}, "VLLM_BASE_URL and MEGATRON_SERVER_URL"),
        ((False, True), {}, {"vllm_enable_lora": False}, "set VLLM_ENABLE_LORA=true"),
        ((True, True), {}, {"vllm_enable_lora": False}, "set VLLM_ENABLE_LORA=true"),
        ((False, True), {}, {"vllm_model": "org/llama"}, "set LORAGATE_WORKER_MODEL"),
        ((False, False), {}, {"max_workers": 17}, "set LORAGATE_WORKER_MAX_RUNS=17"),
        ((False, True), {}, {"max_workers": 17}, "set LORAGATE_WORKER_MAX_RUNS=17"),
        ((False, True), {}, {"vllm_base_url": "localhost"}, "VLLM_BASE_URL is http://host:port"),
        ((True, False), {}, {"megatron_server_url": "x/api"}, "MEGATRON_SERVER_URL is http"),
        (
            (False, True),
            {"pools": (PoolSettings(name="mine", base_model="demo"),)},
            {},
            "LORAGATE_POOLS has the pool 'mine' for 'demo'",
        ),
        (
            (True, False),
            {"trainers": (TrainerSettings(name="megatron", base_model="demo", url=VLLM),)},
            {},
            "LORAGATE_TRAINERS has a trainer 'megatron'",
        ),
    ],
)
def test_what_cannot_be_names_the_variable(
    use: tuple[bool, bool], settings: dict[str, Any], also: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        combined(*use, settings=Settings(**settings), **also)


def test_vllm_without_adapters_may_serve_a_base_that_nobody_trains() -> None:
    found = combined(vllm=True, vllm_enable_lora=False, settings=Settings(worker_trainer="off"))
    assert found.does(Operation.SAMPLE) == "vllm"


def test_how_to_start_the_vllm_that_is_described() -> None:
    backends = BackendSettings(
        use_vllm=True, vllm_model="org/llama", vllm_tensor_parallel_size=2, vllm_dtype="bfloat16"
    )
    assert " ".join(vllm_command(backends, Settings())) == (
        "vllm serve org/llama --served-model-name org/llama --port 8000 --enable-lora "
        "--max-loras 4 --max-lora-rank 64 --gpu-memory-utilization 0.2 "
        "--tensor-parallel-size 2 --dtype bfloat16"
    )
