"""Which backends train and which sample, from the environment. Pure, but for `in_registry`.

What comes in: `BackendSettings` and `Settings`. What goes out: a `Combination`: the pools and
trainers it makes, and what the embedded worker is for. Nothing here asks whether a server answers.

| USE_MEGATRON | USE_VLLM | trains              | samples                       |
|--------------|----------|---------------------|-------------------------------|
| true         | true     | the Megatron worker | vLLM                          |
| true         | false    | the Megatron worker | the server at the same address |
| false        | false    | the embedded worker | the embedded worker           |
| false        | true     | the embedded worker | vLLM                          |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app import demo
from app.control.pools import checked_url
from app.db.tables import PoolRow
from app.domain import TrainerKind
from app.errors import ConfigurationError, InvalidRequest, NotTrainable
from app.settings import BackendSettings, PoolSettings, Settings, TrainerSettings

#: Jobs that a Hugging Face trainer is given at once, unless MAX_WORKERS says otherwise.
HF_JOBS = 8
VLLM_POOL = "vllm"
MEGATRON_POOL = "megatron"
MEGATRON_TRAINER = "megatron"


class Operation(StrEnum):
    """What Tink's users call the things a backend does."""

    ADD_LORA = "add_lora"
    REMOVE_LORA = "remove_lora"
    FWDBWD = "fwdbwd"
    OPTIM = "optim"
    SAMPLE = "sample"
    ASAMPLE = "asample"

    @property
    def samples(self) -> bool:
        return self in (Operation.SAMPLE, Operation.ASAMPLE)


@dataclass(frozen=True, slots=True)
class Embedded:
    """What the embedded worker is for: it `samples`, or trains, or both.

    `trains` is its engine, None if it does not train; it is given `max_jobs` jobs at once.
    """

    base_model: str
    samples: bool
    trains: TrainerKind | None
    max_jobs: int


@dataclass(frozen=True, slots=True)
class Combination:
    """Everything that is declared: LORAGATE_POOLS, LORAGATE_TRAINERS, and what USE_… adds.

    `base_model` is the one that USE_… is about, or the embedded worker; None without either.
    """

    pools: tuple[PoolSettings, ...]
    trainers: tuple[TrainerSettings, ...]
    embedded: Embedded | None
    base_model: str | None

    def does(self, operation: Operation) -> str:
        """Which backend does an operation on `base_model`: `hf`, `megatron` or `vllm`.

        Raises:
            NotTrainable: nothing trains it, or nothing samples from it.
        """
        found = self._sampler() if operation.samples else self._trainer()
        if found is None:
            verb = "samples from" if operation.samples else "trains"
            raise NotTrainable(f"Nothing {verb} {self.base_model or 'a base model'!r} here.")
        return found

    def _sampler(self) -> str | None:
        for pool in self.pools:
            if pool.base_model == self.base_model:
                return str(pool.dialect)
        return "hf" if self.embedded is not None and self.embedded.samples else None

    def _trainer(self) -> str | None:
        for trainer in self.trainers:
            if trainer.base_model == self.base_model:
                return str(trainer.kind)
        return None if self.embedded is None else self.embedded.trains


def combine(backends: BackendSettings, settings: Settings) -> Combination:
    """What the environment declares.

    Raises:
        ConfigurationError: it contradicts itself; the message names the variable to set.
    """
    if not (backends.use_megatron or backends.use_vllm):
        return _as_declared(backends, settings)
    base = _base(backends, settings)
    pool = _vllm_pool(backends, settings, base) if backends.use_vllm else None
    trainers = settings.trainers
    if backends.use_megatron:
        url = _url("MEGATRON_SERVER_URL", backends.megatron_server_url)
        if pool is not None and url in pool.replicas:
            raise ConfigurationError(
                f"VLLM_BASE_URL and MEGATRON_SERVER_URL are both {url}: one server is not both. "
                "Set each to its own, or USE_VLLM=false if the Megatron worker is to sample."
            )
        _refuse_second_trainer(settings)
        trainers = (
            *trainers,
            TrainerSettings(name=MEGATRON_TRAINER, kind="megatron", base_model=base, url=url),
        )
        pool = pool or _megatron_pool(settings, base, url)
    assert pool is not None
    _refuse_second_pool(settings, pool)
    embedded = _trains_beside(backends, settings, base, trainers)
    if (embedded is not None or trainers) and backends.use_vllm and not backends.vllm_enable_lora:
        raise ConfigurationError(
            "VLLM_ENABLE_LORA=false, so that no adapter that is trained could be sampled from: "
            "set VLLM_ENABLE_LORA=true, or LORAGATE_WORKER_TRAINER=off and USE_MEGATRON=false."
        )
    return Combination((*settings.pools, pool), trainers, embedded, base)


def worker_base(settings: Settings) -> str:
    """What a worker with these settings calls its base."""
    if settings.worker_served_name is not None:
        return settings.worker_served_name
    return demo.BASE_NAME if settings.worker_model is None else settings.worker_model.name


def vllm_command(backends: BackendSettings, settings: Settings) -> list[str]:
    """How to start the vLLM that these variables describe."""
    base = _base(backends, settings)
    url = urlsplit(_vllm_url(backends))
    model = backends.vllm_model or str(settings.worker_model or demo.MODEL_DIR)
    command = ["vllm", "serve", model, "--served-model-name", base, "--port", str(url.port or 80)]
    if backends.vllm_enable_lora:
        command += ["--enable-lora", "--max-loras", str(backends.vllm_max_loras)]
        command += ["--max-lora-rank", str(backends.vllm_max_lora_rank)]
    command += ["--gpu-memory-utilization", str(backends.vllm_gpu_memory_util)]
    command += ["--tensor-parallel-size", str(backends.vllm_tensor_parallel_size)]
    return [*command, "--dtype", backends.vllm_dtype]


async def in_registry(session: AsyncSession, combination: Combination) -> Combination:
    """The combination with each pool that USE_… made called as the one its base has already.

    A base has one pool, and its adapters stay with it: another sampler takes it over.
    """
    named = {
        base: name for base, name in await session.execute(select(PoolRow.base_model, PoolRow.name))
    }
    pools = tuple(
        pool.model_copy(update={"name": named[pool.base_model]})
        if pool.name in (VLLM_POOL, MEGATRON_POOL) and pool.base_model in named
        else pool
        for pool in combination.pools
    )
    return replace(combination, pools=pools)


def _as_declared(backends: BackendSettings, settings: Settings) -> Combination:
    """Hugging Face only: what LORAGATE_… declares, and without a pool the embedded worker."""
    if settings.pools or settings.embedded == "off":
        return Combination(settings.pools, settings.trainers, None, None)
    base = worker_base(settings)
    embedded = Embedded(base, True, _engine(settings), _jobs(backends, settings))
    return Combination((), settings.trainers, embedded, base)


def _trains_beside(
    backends: BackendSettings,
    settings: Settings,
    base: str,
    trainers: tuple[TrainerSettings, ...],
) -> Embedded | None:
    """The embedded worker beside a pool, if nobody else trains the base."""
    engine = _engine(settings)
    declared = any(trainer.base_model == base for trainer in trainers)
    if declared or engine is None or settings.embedded == "off":
        return None
    if base != worker_base(settings):
        raise ConfigurationError(
            f"vLLM serves {base!r} and the worker would train {worker_base(settings)!r}: set "
            f"LORAGATE_WORKER_MODEL to the folder of {base!r} and LORAGATE_WORKER_SERVED_NAME to "
            "its name, or LORAGATE_WORKER_TRAINER=off to sample only."
        )
    return Embedded(base, False, engine, _jobs(backends, settings))


def _engine(settings: Settings) -> TrainerKind | None:
    return None if settings.worker_trainer == "off" else TrainerKind(settings.worker_trainer)


def _jobs(backends: BackendSettings, settings: Settings) -> int:
    if settings.worker_trainer == "megatron":
        return 1
    most = settings.worker_max_runs
    if backends.max_workers is not None and backends.max_workers > most:
        raise ConfigurationError(
            f"MAX_WORKERS={backends.max_workers} jobs at once, and the worker keeps {most} runs: "
            f"set LORAGATE_WORKER_MAX_RUNS={backends.max_workers}, or a lower MAX_WORKERS."
        )
    return backends.max_workers or min(HF_JOBS, most)


def _base(backends: BackendSettings, settings: Settings) -> str:
    """VLLM_MODEL, unless it is the folder of the worker's own base."""
    model = backends.vllm_model
    own = worker_base(settings)
    if model is None or (settings.worker_model is not None and model == str(settings.worker_model)):
        return own
    return model


def _vllm_pool(backends: BackendSettings, settings: Settings, base: str) -> PoolSettings:
    return PoolSettings(
        name=VLLM_POOL,
        base_model=base,
        base_model_path=_folder(settings, base),
        served_name=backends.vllm_model or base,
        max_lora_rank=backends.vllm_max_lora_rank,
        max_loras=backends.vllm_max_loras,
        replicas=(_vllm_url(backends),),
    )


def _megatron_pool(settings: Settings, base: str, url: str) -> PoolSettings:
    return PoolSettings(
        name=MEGATRON_POOL,
        base_model=base,
        base_model_path=_folder(settings, base),
        max_lora_rank=settings.worker_max_lora_rank,
        max_loras=settings.worker_max_loras,
        dialect="megatron",
        replicas=(url,),
    )


def _folder(settings: Settings, base: str) -> Path | None:
    return (settings.worker_model or demo.MODEL_DIR) if base == worker_base(settings) else None


def _vllm_url(backends: BackendSettings) -> str:
    if backends.vllm_base_url is not None:
        return _url("VLLM_BASE_URL", backends.vllm_base_url)
    host = f"[{backends.vllm_host}]" if ":" in backends.vllm_host else backends.vllm_host
    return _url("VLLM_HOST", f"http://{host}:{backends.vllm_port}")


def _url(variable: str, given: str) -> str:
    """A server's base URL; the address that means every address is this machine's here."""
    try:
        url = checked_url(given)
    except InvalidRequest as exc:
        raise ConfigurationError(f"{variable} is http://host:port, not {given!r}.") from exc
    for everywhere in ("//0.0.0.0", "//[::]"):
        if everywhere in url:
            return url.replace(everywhere, "//127.0.0.1", 1)
    return url


def _refuse_second_pool(settings: Settings, pool: PoolSettings) -> None:
    for other in settings.pools:
        if other.base_model == pool.base_model or other.name == pool.name:
            raise ConfigurationError(
                f"LORAGATE_POOLS has the pool {other.name!r} for {other.base_model!r}, and "
                f"USE_{pool.name.upper()} makes {pool.name!r} for {pool.base_model!r}: a base has "
                "one pool. Take one of them away, or set VLLM_MODEL to another base."
            )


def _refuse_second_trainer(settings: Settings) -> None:
    if any(trainer.name == MEGATRON_TRAINER for trainer in settings.trainers):
        raise ConfigurationError(
            f"LORAGATE_TRAINERS has a trainer {MEGATRON_TRAINER!r}, and USE_MEGATRON makes one: "
            "give it another name, or set USE_MEGATRON=false."
        )
