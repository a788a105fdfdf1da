"""The messages between the gateway and a training worker. Read docs/training-protocol.md first.

What comes in and goes out: msgpack maps, typed here for both programs. What it must not know:
HTTP, SQL, torch.
"""

from __future__ import annotations

from typing import Literal

import msgspec

PREFIX = "/train/v1"
MEDIA_TYPE = "application/msgpack"

#: Longest that a worker holds a request for a result that is not there yet, in seconds.
MAX_WAIT_S = 30.0

Loss = Literal["cross_entropy", "dpo", "importance_sampling", "ppo", "cispo"]


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Numbers, row-major and little-endian: `dtype` is `int32` or `float32`."""

    dtype: Literal["int32", "float32"]
    shape: tuple[int, ...]
    data: bytes


class Datum(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One sequence of length n: `tokens[i]` predicts `targets[i]`, so the sender has shifted them.

    `weights` (n) are for `cross_entropy` and `dpo`; `logprobs` and `advantages` (n) for the
    policy losses. For `dpo` data come in pairs: preferred, then not.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor | None = None
    logprobs: Tensor | None = None
    advantages: Tensor | None = None


class _Op(msgspec.Struct, frozen=True, tag_field="op", forbid_unknown_fields=True):
    """What requests have in common: a field that nobody reads is refused."""


class ForwardBackward(_Op, frozen=True, tag="forward_backward"):
    """Add the gradient of a loss, which is a sum over tokens and never a mean.

    `forward_only` computes the same and keeps no gradient. `outputs` asks for each datum's
    logprobs.
    """

    data: list[Datum]
    loss: Loss = "cross_entropy"
    config: dict[str, float] = {}
    forward_only: bool = False
    outputs: bool = False


class OptimStep(_Op, frozen=True, tag="optim_step"):
    """AdamW with decoupled weight decay on the gradient so far, which it clears.

    `grad_clip_norm` 0 clips nothing.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class SaveState(_Op, frozen=True, tag="save_state"):
    """Write weights, optimizer and the results nobody has acknowledged: what a restart needs."""


class LoadState(_Op, frozen=True, tag="load_state"):
    """Continue from a state of this or another run; `optimizer` false takes the weights only."""

    run: str
    optimizer: bool = True


class SaveForSampling(_Op, frozen=True, tag="save_for_sampling"):
    """Write a PEFT folder called `name`, and compute a probe on `probe_tokens` if there are any."""

    name: str
    probe_tokens: list[list[int]] = []


class Sample(_Op, frozen=True, tag="sample"):
    """Generate with the run's weights as they are at this op."""

    prompts: list[list[int]]
    max_tokens: int = 16
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = []
    seed: int | None = None


Op = ForwardBackward | OptimStep | SaveState | LoadState | SaveForSampling | Sample


class Submit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `PUT /runs/{run}/ops/{seq}`.

    `fence` is the attempt of whoever sends it; the results up to `acked` are safe elsewhere.
    """

    op: Op
    fence: int = 0
    acked: int = 0


class Numbered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An op and its number."""

    seq: int
    op: Op


class Exchange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /runs/{run}/ops`: several ops handed over, and outcomes asked for, at once.

    `wanted` is the first and the last op whose outcomes are asked for; the answer waits for the
    last one for `wait_s` seconds, MAX_WAIT_S at most. Without it nothing is waited for.
    """

    ops: list[Numbered] = []
    fence: int = 0
    acked: int = 0
    wanted: tuple[int, int] | None = None
    wait_s: float = 0.0


class SavedFile(msgspec.Struct, frozen=True):
    """A file to fetch from `/runs/{run}/files/{name}/{file}`."""

    name: str
    bytes: int
    sha256: str


class ProbeResult(msgspec.Struct, frozen=True):
    """What `domain.Probe` holds."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    dtype: str


class Sampled(msgspec.Struct, frozen=True):
    """One generated sequence and the logprobs of its tokens."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an op answered; which fields are set depends on the op.

    `metrics` of a forward_backward: `loss:sum`, `weight:sum` (the weights' sum), `tokens:sum`
    (targets with a weight), `correct:sum` (of those, predicted right), `seconds:max`.
    """

    metrics: dict[str, float] = {}
    outputs: list[Tensor] = []
    files: list[SavedFile] = []
    probe: ProbeResult | None = None
    samples: list[Sampled] = []


class Failure(msgspec.Struct, frozen=True):
    """An op failed for good; the error's `code` is that of a class in app/errors.py."""

    code: str
    message: str


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """A finished op: its result or its failure, and never both."""

    seq: int
    result: Result | None = None
    failure: Failure | None = None


class Outcomes(msgspec.Struct, frozen=True):
    """Answer to an `Exchange`: what was wanted and is there, in order, from the first op on.

    One that failed is told when it is the first, so nothing comes after it.
    """

    outcomes: list[Outcome]


class Lora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `domain.LoraSpec` holds."""

    rank: int
    alpha: int
    target_modules: list[str]
    seed: int


class OpenRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `PUT /runs/{run}`: make the run, or take it up where it is."""

    base_model: str
    lora: Lora
    fence: int = 0


class RunStatus(msgspec.Struct, frozen=True):
    """Where a run is. Ops below `next_seq` were done; their outcomes from `first_outcome` on can
    still be asked for. `origin` is how this answer found it.
    """

    run: str
    next_seq: int
    first_outcome: int
    origin: Literal["created", "live", "restored"]
    optim_steps: int


class RunSummary(msgspec.Struct, frozen=True):
    """A run in memory, or only on disk."""

    run: str
    live: bool
    next_seq: int


class TrainerInfo(msgspec.Struct, frozen=True):
    """Body of `GET /info`."""

    kind: Literal["hf", "megatron"]
    base_model: str
    dtype: str
    max_runs: int
    max_rank: int
    max_length: int
    target_modules: list[str]
    parallel: dict[str, int]
    runs: list[RunSummary]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A conversation to be rendered: messages as JSON text, so that any template field passes."""

    messages: bytes
    tools: bytes | None = None


class RenderRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /render`. `complete` renders for training: a weight for each token, 1 on what
    the assistant says (as its messages' own `weight` allows). Without it a generation prompt is
    added.
    """

    conversations: list[Message]
    complete: bool = True


class Rendered(msgspec.Struct, frozen=True, omit_defaults=True):
    """Token ids and weights of one conversation, or what is wrong with it."""

    tokens: Tensor | None = None
    weights: Tensor | None = None
    problem: str | None = None


class RenderReply(msgspec.Struct, frozen=True):
    """In the order of the request."""

    conversations: list[Rendered]
