"""Every exception loragate raises on purpose.

    LoragateError                        internal_error
    ├── RequestError                     the caller's to fix
    │   ├── InvalidRequest               invalid_request
    │   │   └── InvalidJson              invalid_json
    │   ├── BodyTooLarge                 body_too_large
    │   ├── Unauthenticated              invalid_api_key
    │   ├── Forbidden                    permission_denied
    │   │   └── ModelNotAllowed          model_not_allowed
    │   ├── NotFound                     not_found
    │   │   └── ModelNotFound            model_not_found
    │   ├── MethodNotAllowed             method_not_allowed
    │   ├── Conflict                     conflict
    │   ├── AdapterRejected              adapter_rejected
    │   ├── InvalidTrainingFile          invalid_training_file  with the lines that are wrong
    │   ├── NotTrainable                 model_not_trainable    no trainer has this base
    │   ├── TrainingFailed               training_failed        the job's own doing
    │   │   ├── NonFiniteLoss            non_finite_loss
    │   │   └── OutOfMemory              out_of_memory
    │   └── PromptLogprobsUnsupported    prompt_logprobs_unsupported
    ├── NoReplicaAvailable               no_replica_available
    │   ├── PoolFull                     pool_full
    │   └── AdapterQueueFull             adapter_queue_full
    ├── DeadlineExceeded                 deadline_exceeded
    ├── AdapterLoadFailed                adapter_load_failed
    │   └── ProbeFailed                  probe_failed           served is not what was trained
    ├── UpstreamError                    what a model server did
    │   ├── UpstreamRefused              upstream_unavailable   nothing arrived: retry is safe
    │   ├── UpstreamTimeout              upstream_timeout       it may still be working
    │   └── UpstreamBroke                upstream_broke         it died or spoke nonsense
    ├── TrainerError                     trainer_error          what a training worker did
    │   ├── TrainerUnavailable           trainer_unavailable    it cannot be reached: try again
    │   ├── RunLost                      run_lost               it knows this run no more
    │   ├── TrainerBusy                  trainer_busy           no room for another run now
    │   └── Fenced                       fenced                 a newer attempt has the run
    ├── SourceUnavailable                source_unavailable     weights could not be fetched
    ├── StorageUnavailable               storage_unavailable    the database or disk is unusable
    └── ConfigurationError               invalid_configuration

An exception carries a stable `code` and never an HTTP status; `api.errors` maps the one to the
other. The message names the thing, its id and the way out, and is safe to show a client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass


class LoragateError(Exception):
    """The root. Seen by a client only as "internal error", with a request id."""

    code = "internal_error"
    param: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        if param is not None:
            self.param = param
        if code is not None:
            self.code = code


class RequestError(LoragateError):
    """The caller can mend this by sending something else."""

    code = "invalid_request"


class InvalidRequest(RequestError):
    """A field is missing or has a value that is not allowed."""


class InvalidJson(InvalidRequest):
    """The body is not JSON, or not an object."""

    code = "invalid_json"


class BodyTooLarge(RequestError):
    """The body is over the configured limit."""

    code = "body_too_large"


class Unauthenticated(RequestError):
    """The key is missing, unknown, expired or revoked."""

    code = "invalid_api_key"


class Forbidden(RequestError):
    """The key is known, but its scopes do not cover this."""

    code = "permission_denied"


class ModelNotAllowed(Forbidden):
    """The key's model allow-list leaves this model out."""

    code = "model_not_allowed"
    param = "model"


class NotFound(RequestError):
    """There is no such thing."""

    code = "not_found"


class ModelNotFound(NotFound):
    """No base, adapter, version or alias has this name."""

    code = "model_not_found"
    param = "model"


class MethodNotAllowed(RequestError):
    """The path exists, for another method."""

    code = "method_not_allowed"


class Conflict(RequestError):
    """The change contradicts what is there."""

    code = "conflict"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with an adapter: the field, what was found there, what is allowed."""

    field: str
    found: object
    allowed: object

    def __str__(self) -> str:
        return f"{self.field}: found {self.found!r}, allowed {self.allowed}"


class AdapterRejected(RequestError):
    """The weights cannot be served by the base they are for; `faults` says every reason."""

    code = "adapter_rejected"

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(map(str, faults)), param=faults[0].field)
        self.faults = tuple(faults)

    def details(self) -> list[dict[str, object]]:
        return [asdict(fault) for fault in self.faults]


@dataclass(frozen=True, slots=True)
class LineFault:
    """One line of a training file that cannot be used; lines count from 1."""

    line: int
    problem: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.problem}"


class InvalidTrainingFile(RequestError):
    """A file cannot be trained on; `faults` names the first lines that are wrong."""

    code = "invalid_training_file"
    param = "training_file"

    def __init__(self, message: str, faults: Sequence[LineFault] = (), *, param: str | None = None):
        super().__init__("; ".join([message, *map(str, faults)]), param=param)
        self.faults = tuple(faults)

    def details(self) -> list[dict[str, object]]:
        return [asdict(fault) for fault in self.faults]


class NotTrainable(RequestError):
    """No trainer is set up for this base model."""

    code = "model_not_trainable"
    param = "model"


class TrainingFailed(RequestError):
    """A step failed because of what the job asked; the same again would fail again."""

    code = "training_failed"


class NonFiniteLoss(TrainingFailed):
    """The loss or a gradient of a step is infinite or not a number."""

    code = "non_finite_loss"


class OutOfMemory(TrainingFailed):
    """A step needs more memory than the trainer has, even alone."""

    code = "out_of_memory"


class PromptLogprobsUnsupported(RequestError):
    """No replica asked can answer prompt logprobs of this model right; the message says why."""

    code = "prompt_logprobs_unsupported"


class NoReplicaAvailable(LoragateError):
    """No replica of the pool can take the request now."""

    code = "no_replica_available"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PoolFull(NoReplicaAvailable):
    """Every replica is full and so is the queue before them."""

    code = "pool_full"


class AdapterQueueFull(NoReplicaAvailable):
    """This adapter has as many requests waiting as one adapter may have."""

    code = "adapter_queue_full"


class DeadlineExceeded(LoragateError):
    """The time the client allowed is over."""

    code = "deadline_exceeded"


class AdapterLoadFailed(LoragateError):
    """A replica answered that it cannot serve these weights; trying again will not help."""

    code = "adapter_load_failed"


class ProbeFailed(AdapterLoadFailed):
    """A replica computes other logprobs for this version than its trainer did."""

    code = "probe_failed"


class UpstreamError(LoragateError):
    """A model server did not answer as it should."""

    code = "upstream_error"


class UpstreamRefused(UpstreamError):
    """Nothing reached the model: the request may be sent elsewhere."""

    code = "upstream_unavailable"


class UpstreamTimeout(UpstreamError):
    """The replica was silent for longer than allowed; it may still be working."""

    code = "upstream_timeout"


class UpstreamBroke(UpstreamError):
    """The replica closed, reset or spoke nonsense after the request was sent."""

    code = "upstream_broke"


class TrainerError(LoragateError):
    """A training worker did not do what it was asked. The job is not to blame."""

    code = "trainer_error"


class TrainerUnavailable(TrainerError):
    """The worker cannot be reached, or ended before it answered: asking again is safe."""

    code = "trainer_unavailable"


class RunLost(TrainerError):
    """The worker knows nothing of this run, or less than was told to it: open it again."""

    code = "run_lost"


class TrainerBusy(TrainerError):
    """The worker has as many runs as it can hold."""

    code = "trainer_busy"


class Fenced(TrainerError):
    """A newer attempt at the job has the run; this one must stop."""

    code = "fenced"


class SourceUnavailable(LoragateError):
    """The place that holds the weights (a hub, a disk) did not deliver them."""

    code = "source_unavailable"


class StorageUnavailable(LoragateError):
    """A database, a store or a worker's state folder cannot be used now: full, locked or away."""

    code = "storage_unavailable"
    retry_after_s = 5


class ConfigurationError(LoragateError):
    """The settings contradict each other; the program does not start."""

    code = "invalid_configuration"
