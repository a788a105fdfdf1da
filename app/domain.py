"""The nouns of loragate. Read this first.

What comes in: nothing. What goes out: frozen values that every room may hold and pass on.
What it must not know: HTTP, SQL, torch. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

POOL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: A plain name, or what a fine-tune job calls its result: `ft:<base>:<suffix or nothing>:<id>`.
ADAPTER_NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*|ft:[A-Za-z0-9._-]+:[A-Za-z0-9._-]*:[a-z0-9]{8}"
)
ADAPTER_NAME_MAX = 128
ALIAS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ALIAS_NAME_MAX = 64
LATEST = "latest"


class Scope(StrEnum):
    """What a key may do."""

    INFERENCE = "inference"
    TRAINING = "training"
    ADMIN = "admin"


class ReplicaState(StrEnum):
    """Where a replica is in its life; `cordoned` is a flag beside it, not a state."""

    ADDING = "adding"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"


class Dialect(StrEnum):
    """What a pool's servers speak: vLLM's API, or one of those of Megatron's own servers."""

    VLLM = "vllm"
    MEGATRON = "megatron"


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The weights a pool serves. `config` is its Hugging Face config.json, or None if unknown.

    `aliases` are other names an adapter_config.json may call it by (a hub id, a folder).
    """

    name: str
    config: Mapping[str, Any] | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pool:
    """Interchangeable servers of one base model.

    `served_name` is what its replicas call the base. `store_mount` is the folder under which
    they see the adapter store, when that differs from the gateway's own path. `max_loras` and
    `max_cpu_loras` are the replicas' options of those names: adapters in one step, and in memory.
    A replica gets at most `max_inflight` requests at once; `max_queue` more wait for the pool.
    """

    name: str
    base_model: str
    served_name: str
    max_lora_rank: int = 64
    max_loras: int = 8
    store_mount: str | None = None
    max_cpu_loras: int | None = None
    max_inflight: int = 256
    max_queue: int = 1024
    dialect: Dialect = Dialect.VLLM

    @property
    def cpu_slots(self) -> int:
        """Adapters a replica keeps in memory: vLLM's own default is `max_loras`."""
        return max(self.max_loras, self.max_cpu_loras or 0)


@dataclass(frozen=True, slots=True)
class Replica:
    """One server of a pool, as the registry knows it. Live counters are in `serving.fleet`.

    `url` is its base URL without a path; `dialect` is its pool's. `api_key` is sent upstream as a
    bearer token.
    """

    id: str
    pool: str
    url: str
    cordoned: bool = False
    draining: bool = False
    api_key: str | None = field(default=None, repr=False)
    dialect: Dialect = Dialect.VLLM


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """Immutable weights: version `number` (1, 2, …) of `adapter`.

    `digest` is the sha-256 of its files and names its folder in the store; `rank` is the
    largest rank of any module. `targets_lm_head`: it changes the output layer, which some engines
    leave out of prompt logprobs. `probed`: a `Probe` was registered with it.
    """

    adapter: str
    number: int
    digest: str
    rank: int
    base_model: str
    targets_lm_head: bool = False
    probed: bool = False

    @property
    def upstream_name(self) -> str:
        """What a replica is asked for. Never reused: an engine's prefix cache is keyed by it."""
        return f"{self.adapter}@{self.number}"


@dataclass(frozen=True, slots=True)
class Probe:
    """What the trainer computed for some token ids, to prove that served is what was trained.

    `logprobs[i][j]` is the natural-log probability of `token_ids[i][j + 1]` given the ids before
    it, so a row of `logprobs` is one shorter than its ids. They were computed in `dtype`.
    """

    token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    dtype: str = "float32"


class Sticky(StrEnum):
    """What keeps a client of a weighted alias on one version.

    `user`: the session or `user` a request names, if it names one; `key`: its API key;
    `none`: every request draws anew.
    """

    NONE = "none"
    USER = "user"
    KEY = "key"


@dataclass(frozen=True, slots=True)
class Alias:
    """A movable pointer, or a weighted split, over versions of one adapter.

    `targets` are (version number, weight) pairs; the weights are positive.
    """

    name: str
    targets: tuple[tuple[int, int], ...]
    sticky: Sticky = Sticky.USER


@dataclass(frozen=True, slots=True)
class Adapter:
    """A named line of LoRA weights as the data plane sees it: its versions and aliases."""

    name: str
    base_model: str
    pool: str
    created_at: datetime
    versions: Mapping[int, AdapterVersion]
    aliases: Mapping[str, Alias]


@dataclass(frozen=True, slots=True)
class Route:
    """A resolved model name: which pool, and what its replicas are asked for."""

    base_model: str
    pool: str
    upstream_name: str
    version: AdapterVersion | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling and what they may do. `models` is an allow-list of globs; None allows all."""

    key_id: str
    name: str
    scopes: frozenset[Scope]
    models: tuple[str, ...] | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request, or of many added up."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """A billing line: what one key asked of one model since the last record."""

    key_id: str
    model: str
    requests: int
    usage: Usage


class TrainerKind(StrEnum):
    """Which engine trains: Megatron takes one job at a time, `hf` several on one base."""

    HF = "hf"
    MEGATRON = "megatron"


@dataclass(frozen=True, slots=True)
class Trainer:
    """A worker that trains adapters of one base model; `url` is its base URL without a path.

    It is given at most `max_jobs` jobs at once.
    """

    name: str
    kind: TrainerKind
    base_model: str
    url: str
    max_jobs: int = 1
    api_key: str | None = field(default=None, repr=False)

    @property
    def lock(self) -> str | None:
        """What a running job of it holds, so that the schema lets no second one run beside it."""
        return f"trainer:{self.name}" if self.max_jobs == 1 else None


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """The adapter a run trains: every `target_modules` linear gets `rank` and `alpha`.

    `seed` is all that its first weights depend on.
    """

    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A run that lives across single ops of its key: what Tink's clients call a `model_id`.

    `id` is also the name of the adapter it becomes: version `version` has the weights after
    `saved_steps` of its `optim_steps`. `next_seq` numbers the next op that its worker is given.
    `worker_base` is what that calls the base. The probe of its next version is of `probe_tokens`.
    """

    id: str
    key_id: str
    trainer: str
    base_model: str
    lora: LoraSpec
    worker_base: str
    next_seq: int
    optim_steps: int
    saved_steps: int | None
    version: int | None
    probe_tokens: tuple[tuple[int, ...], ...]
    created_at: datetime


class JobKind(StrEnum):
    """What a job does; `handlers` has one module for each."""

    FINE_TUNE = "fine_tune"
    TRAIN_OP = "train_op"


class JobStatus(StrEnum):
    """Where a job is in its life. That it shall be cancelled or paused is a flag beside it."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, in the form an API error has."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """Durable work, as it was when it was read.

    `number` is its place in the order of submission. `attempts` counts how often it was claimed
    and is the fencing token of its runner: whoever holds an older one may write nothing. At most
    one running job holds a given `lock`. `spec` is what was asked, `progress` what its handler
    keeps between attempts, `result` what came of it.
    """

    id: str
    number: int
    kind: JobKind
    key_id: str
    trainer: str | None
    lock: str | None
    priority: int
    status: JobStatus
    spec: Mapping[str, Any]
    progress: Mapping[str, Any]
    metadata: Mapping[str, str]
    attempts: int
    max_attempts: int
    cancel_requested: bool
    pause_requested: bool
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    lease_token: str | None = None
    result: Mapping[str, Any] | None = None
    error: JobError | None = None


class JobEventType(StrEnum):
    """A change of status, something to read, or a step's numbers."""

    STATUS = "status"
    MESSAGE = "message"
    METRICS = "metrics"


@dataclass(frozen=True, slots=True)
class JobEvent:
    """What happened to a job: event `number` (1, 2, … without a gap) of its own.

    An event of a training step names the `step`; a job has one such event for each step,
    whatever was repeated to get there.
    """

    job_id: str
    number: int
    type: JobEventType
    level: str
    message: str
    created_at: datetime
    data: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None


@dataclass(frozen=True, slots=True)
class File:
    """An uploaded or produced file; its bytes are on disk under its `digest` (sha-256)."""

    id: str
    key_id: str
    filename: str
    purpose: str
    bytes: int
    digest: str
    created_at: datetime
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights a fine-tune job registered along the way: `model` is the name to ask for.

    `metrics` are those of its `step`.
    """

    id: str
    job_id: str
    step: int
    model: str
    metrics: Mapping[str, float]
    created_at: datetime
