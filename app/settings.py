"""The only reader of the environment.

What comes in: `LORAGATE_*` variables, and a few without the prefix that say which backends to use.
What goes out: one frozen `Settings`, and `BackendSettings`. Every field is a documented setting;
`docs/settings.md` lists them and a test keeps it true.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class PoolSettings(BaseModel):
    """A pool declared in the environment; the registry is made to match it at startup."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="The pool's name.")
    base_model: str = Field(description="The base model's name, as clients write it.")
    base_model_path: Path | None = Field(
        None, description="Folder with the base's config.json, to check adapters against."
    )
    base_model_aliases: tuple[str, ...] = Field(
        (), description="Other names adapter_config.json files call the base by."
    )
    served_name: str | None = Field(
        None, description="What the replicas call the base; `base_model` when left out."
    )
    max_lora_rank: int = Field(64, ge=1, description="The replicas' --max-lora-rank.")
    max_loras: int = Field(8, ge=1, description="The replicas' --max-loras.")
    max_cpu_loras: int | None = Field(
        None, ge=1, description="The replicas' --max-cpu-loras; as `max_loras` when left out."
    )
    max_inflight: int = Field(
        256, ge=1, description="Most requests that one replica is given at once."
    )
    max_queue: int = Field(
        1024, ge=0, description="Most requests that wait while every replica has that many."
    )
    store_mount: str | None = Field(
        None, description="Where the replicas see the adapter store, if not at the same path."
    )
    dialect: Literal["vllm", "megatron"] = Field(
        "vllm",
        description="What the replicas speak; `megatron` for one of Megatron's own servers, which "
        "serve the base and no adapter.",
    )
    replicas: tuple[str, ...] = Field((), description="Base URLs of the pool's servers.")
    api_key: SecretStr | None = Field(None, description="The replicas' --api-key.")


class TrainerSettings(BaseModel):
    """A training worker declared in the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="The trainer's name.")
    kind: Literal["hf", "megatron"] = Field("hf", description="Which engine the worker has.")
    base_model: str = Field(description="The base it trains, as clients write it; a pool's.")
    url: str = Field(description="Base URL of the worker.")
    max_jobs: int | None = Field(
        None, ge=1, description="Jobs it is given at once: 8 for `hf`; always 1 for `megatron`."
    )
    api_key: SecretStr | None = Field(None, description="Sent to it as a bearer token.")


class Settings(BaseSettings):
    """Everything that can be set from outside, with its default."""

    model_config = SettingsConfigDict(
        env_prefix="LORAGATE_", env_file=None, frozen=True, extra="ignore"
    )

    host: str = Field("127.0.0.1", description="Address `loragate serve` listens on.")
    port: int = Field(8080, ge=0, le=65535, description="Port `loragate serve` listens on.")
    admin_key: SecretStr | None = Field(
        None,
        description="A secret accepted with every scope, beside the keys in the registry: "
        "how the first key is made on a gateway that is not on loopback.",
    )
    metrics_auth: bool = Field(False, description="/metrics needs a key with the scope `admin`.")
    data_dir: Path = Field(
        Path("~/.loragate"),
        description="Holds the SQLite database, the adapter store, files and a worker's runs.",
    )
    database_url: str | None = Field(
        None,
        description="SQLAlchemy URL; SQLite in the data folder when left out. "
        "`postgresql://…` needs the `postgres` extra and `loragate migrate`.",
    )
    store_dir: Path | None = Field(
        None, description="The adapter store; `store` in the data folder when left out."
    )
    import_dirs: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="Folders, separated by `:`, from which adapters may be registered by path."
    )
    hub_endpoint: str | None = Field(
        None, description="Hugging Face endpoint for adapters given as a repo id."
    )
    hub_token: SecretStr | None = Field(None, description="Token for that endpoint.")
    max_adapter_bytes: int = Field(
        2 << 30, ge=1, description="Largest adapter accepted, unpacked, in bytes."
    )
    pools: tuple[PoolSettings, ...] = Field(
        (), description="Pools declared as JSON; kept in step with the registry at startup."
    )
    embedded: Literal["auto", "off"] = Field(
        "auto", description="`auto`: with no pool at all, start the demo worker as a child."
    )

    trainers: tuple[TrainerSettings, ...] = Field(
        (), description="Training workers declared as JSON; the embedded worker is one by itself."
    )
    max_file_bytes: int = Field(
        512 << 20, ge=1, description="Largest file accepted at /v1/files, in bytes."
    )
    max_queued_jobs: int = Field(
        1000, ge=1, description="Most jobs that one key may have waiting or running."
    )
    lease_s: float = Field(
        15.0, gt=0, description="How long a job stays with a gateway that says nothing more of it."
    )
    job_attempts: int = Field(
        10,
        ge=1,
        description="How often in a row a job may lose its gateway or worker without one new step.",
    )
    trainer_patience_s: float = Field(
        60.0, gt=0, description="How long a running job waits for its worker to come back."
    )
    checkpoint_period_s: float = Field(
        30.0, gt=0, description="Most training that a lost worker can cost a job, in seconds."
    )

    max_body_bytes: int = Field(32 << 20, ge=1024, description="Largest request body, in bytes.")
    coalesce: bool = Field(
        True,
        description="Concurrent requests to score one prompt, alike but for it, share a call to a "
        "replica.",
    )
    max_connections_per_replica: int = Field(
        1024, ge=1, description="Open connections to one replica at most."
    )
    connect_timeout_s: float = Field(2.0, gt=0, description="Deadline to connect to a replica.")
    first_byte_timeout_s: float = Field(
        600.0, gt=0, description="Deadline from a request sent to its first response byte."
    )
    idle_timeout_s: float = Field(
        120.0, gt=0, description="Longest silence between two chunks of a response."
    )
    load_timeout_s: float = Field(120.0, gt=0, description="Deadline for one adapter load.")
    health_period_s: float = Field(2.0, gt=0, description="Time between two health probes.")
    publish_period_s: float = Field(
        0.25, gt=0, description="How often the registry is looked at for changes made elsewhere."
    )
    flush_usage_period_s: float = Field(5.0, gt=0, description="How often usage is written down.")
    unload_grace_s: float = Field(
        60.0,
        ge=0,
        description="How long a version that no alias points to stays loaded after its last "
        "request.",
    )
    reap_period_s: float = Field(60.0, gt=0, description="How often unused files are collected.")
    reap_grace_s: float = Field(
        600.0,
        ge=0,
        description="How long a deleted version's files stay, so that requests for it can end.",
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="At shutdown, how long running requests may go on."
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Lowest level logged."
    )
    log_format: Literal["json", "text"] = Field(
        "json", description="One JSON object a line, or text."
    )
    access_log: Literal["all", "errors", "off"] = Field(
        "errors", description="Which inference requests are logged: all, failed ones, none."
    )

    worker_host: str = Field("127.0.0.1", description="Address `loragate worker` listens on.")
    worker_port: int = Field(8090, ge=0, le=65535, description="Port `loragate worker` listens on.")
    worker_model: Path | None = Field(
        None, description="Folder of the worker's base model; the demo model when left out."
    )
    worker_served_name: str | None = Field(
        None, description="What the worker calls its base; the folder's name when left out."
    )
    worker_device: str = Field("auto", description="`cpu`, `cuda`, `cuda:1`…, or `auto`.")
    worker_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="The worker's number format; `auto` is float32 on a CPU."
    )
    worker_max_loras: int = Field(64, ge=1, description="Adapters the worker keeps in memory.")
    worker_max_lora_rank: int = Field(64, ge=1, description="Largest rank the worker accepts.")
    worker_max_batch: int = Field(64, ge=1, description="Sequences the worker steps at once.")
    worker_max_batch_tokens: int = Field(
        8192, ge=1, description="Prompt tokens the worker prefills in one pass."
    )
    worker_max_logprobs: int = Field(20, ge=0, description="Most logprobs a request may ask for.")
    worker_api_key: SecretStr | None = Field(
        None, description="The bearer token that a request to train must show."
    )
    worker_trainer: Literal["off", "hf", "megatron"] = Field(
        "hf", description="Which engine the worker trains with, if any."
    )
    worker_megatron_engine: Literal["core", "bridge"] = Field(
        "core",
        description="Megatron: Megatron-Core alone, or with Megatron-Bridge, which knows more "
        "models and needs Transformer Engine.",
    )
    worker_state_dir: Path | None = Field(
        None,
        description="Where the worker keeps the states of its runs; `runs` in the data folder when "
        "left out.",
    )
    worker_max_runs: int = Field(16, ge=1, description="Runs the worker keeps in memory.")
    worker_train_tokens: int = Field(
        16384, ge=1, description="Tokens of one training pass; more are done in several."
    )
    worker_gradient_checkpointing: bool = Field(
        False, description="Compute activations twice instead of keeping them."
    )
    worker_tensor_parallel: int = Field(1, ge=1, description="Megatron: ranks a layer is cut in.")
    worker_pipeline_parallel: int = Field(1, ge=1, description="Megatron: stages of layers.")
    worker_data_parallel: int = Field(1, ge=1, description="Megatron: copies of the model.")
    worker_threads: int | None = Field(
        None,
        ge=1,
        description="Torch threads. If unset: all cores, but one for a model under 50 million "
        "parameters, where threads wait for each other longer than they work. Cores left over "
        "train other runs at the same time.",
    )

    @field_validator("import_dirs", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part for part in value.split(":") if part] if isinstance(value, str) else value

    @property
    def runs_path(self) -> Path:
        chosen = self.worker_state_dir
        return chosen.expanduser().absolute() if chosen else self.data_path / "runs"

    @property
    def files_path(self) -> Path:
        return self.data_path / "files"

    @property
    def data_path(self) -> Path:
        return self.data_dir.expanduser().absolute()

    @property
    def store_path(self) -> Path:
        return (
            self.store_dir.expanduser().absolute() if self.store_dir else self.data_path / "store"
        )


def child_environment(settings: Settings) -> dict[str, str]:
    """This program's environment for one it starts, with what its own options changed."""
    return {
        **os.environ,
        "LORAGATE_DATA_DIR": str(settings.data_path),
        "LORAGATE_LOG_LEVEL": settings.log_level,
        "LORAGATE_LOG_FORMAT": settings.log_format,
    }


class BackendSettings(BaseSettings):
    """What trains and what samples, in the variables that Tink's users know: docs/backends.md."""

    model_config = SettingsConfigDict(env_prefix="", env_file=None, frozen=True, extra="ignore")

    use_megatron: bool = Field(False, description="Train with Megatron, at `MEGATRON_SERVER_URL`.")
    use_vllm: bool = Field(False, description="Sample from a vLLM server, at `VLLM_BASE_URL`.")
    max_workers: int | None = Field(
        None, ge=1, description="Jobs that Hugging Face trains at once; 8 when left out."
    )
    megatron_server_url: str = Field(
        "http://localhost:5000",
        description="The Megatron worker, which trains, and samples too without `USE_VLLM`.",
    )
    vllm_base_url: str | None = Field(
        None, description="The vLLM server; `VLLM_HOST` and `VLLM_PORT` when left out."
    )
    vllm_host: str = Field("0.0.0.0", description="Host of the vLLM server.")
    vllm_port: int = Field(8000, ge=1, le=65535, description="Port of the vLLM server.")
    vllm_model: str | None = Field(
        None, description="The base model that is served; the worker's when left out."
    )
    vllm_enable_lora: bool = Field(True, description="Whether vLLM serves adapters.")
    vllm_max_loras: int = Field(4, ge=1, description="vLLM's --max-loras.")
    vllm_max_lora_rank: int = Field(64, ge=1, description="vLLM's --max-lora-rank.")
    vllm_gpu_memory_util: float = Field(
        0.2, gt=0, le=1, description="vLLM's --gpu-memory-utilization, a fraction."
    )
    vllm_tensor_parallel_size: int = Field(1, ge=1, description="vLLM's --tensor-parallel-size.")
    vllm_dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = Field(
        "auto", description="vLLM's --dtype."
    )


class TorchrunSettings(BaseSettings):
    """What torchrun tells the processes it starts; all of it is missing where it did not."""

    model_config = SettingsConfigDict(env_file=None, frozen=True, extra="ignore")

    rank: int | None = Field(None, ge=0, description="This process among all.")
    local_rank: int = Field(0, ge=0, description="This process among those of its host.")
    world_size: int | None = Field(None, ge=1, description="How many processes there are.")


class ClientSettings(BaseSettings):
    """How the command line finds a gateway."""

    model_config = SettingsConfigDict(
        env_prefix="LORAGATE_", env_file=None, frozen=True, extra="ignore"
    )

    url: str = Field("http://127.0.0.1:8080", description="The gateway that `loragate` talks to.")
    api_key: SecretStr | None = Field(None, description="The key that `loragate` shows it.")
