"""The bodies of /api/v1: what Tink's clients send, and what they are told.

What comes in: JSON. What goes out: the specs of single ops. No verbs.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.api.admin.shapes import Answer
from app.control.train_ops import MAX_SEED
from app.ops import MAX_WAIT_S, Loss
from app.training import op_data, single_ops

_MODEL_ID = "base_lora_9f86d081"
_REQUEST_ID = "op-9f86d081884c7d659a2feaa0"
_ModelId = Annotated[
    str, Field(max_length=512, description="What add_lora answered.", examples=[_MODEL_ID])
]


class _Body(BaseModel):
    """A request body: a field nobody knows is a mistake worth telling."""

    model_config = ConfigDict(extra="forbid")


class NewLora(_Body):
    """An adapter to make."""

    base_model: str = Field(
        "base", max_length=512, description="The base; `base` for the only one that is trained."
    )
    rank: int = Field(16, ge=1, le=1024, description="The adapter's rank.")
    alpha: int = Field(
        32, ge=1, le=1 << 20, description="What the adapter is scaled by, times rank."
    )
    target_modules: list[str] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="The linears it changes; when left out, all but the output layer.",
        examples=[["q_proj", "v_proj"]],
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="All that its first weights depend on.", examples=[7]
    )


class ModelName(_Body):
    """The model that is meant."""

    model_id: _ModelId


class Fwdbwd(_Body):
    """A forward and backward pass."""

    model_id: _ModelId
    data: list[Any] = Field(
        description="Items, each a conversation, `{prompt, completion}`, `{input_ids, labels}`, "
        "`{input_ids, weights}` or `{model_input, loss_fn_inputs}`.",
        examples=[[[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy!"}]]],
    )
    loss_fn: Loss = Field("cross_entropy", description="The loss; `dpo` takes items in pairs.")
    loss_fn_config: dict[str, float] = Field({}, description="The loss's own options.")
    forward_only: bool = Field(False, description="Compute the same and keep no gradient.")
    return_logprobs: bool = Field(False, description="Answer the logprobs of every target.")

    async def spec(self) -> single_ops.FwdBwd:
        """Raises InvalidRequest for data of no known form."""
        await asyncio.to_thread(op_data.check, self.data)
        return single_ops.FwdBwd(
            self.model_id,
            self.data,
            self.loss_fn,
            self.loss_fn_config,
            self.forward_only,
            self.return_logprobs,
        )


class AdamParams(_Body):
    """AdamW's options, for this step."""

    learning_rate: float = Field(1e-4, gt=0, description="The step's size.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the second.")
    eps: float = Field(1e-12, ge=0, description="Added to the denominator.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    grad_clip_norm: float = Field(0.0, ge=0, description="Largest norm of the gradient; 0: any.")


class Optim(_Body):
    """An optimizer step."""

    model_id: _ModelId
    adam_params: AdamParams = Field(AdamParams(), description="How to step.")

    def spec(self) -> single_ops.Optim:
        return single_ops.Optim(self.model_id, self.adam_params.model_dump())


class SamplingParams(_Body):
    """Options of sampling; what is left out has its default."""

    max_tokens: int = Field(16, ge=1, description="Most tokens to generate.")
    temperature: float = Field(1.0, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from so much of the probability.")
    top_k: int = Field(-1, ge=-1, description="Sample from so many tokens; -1 or 0: all.")
    n: int = Field(1, ge=1, le=128, description="Completions of each prompt.")
    stop: str | list[str] | None = Field(None, description="Where to stop.", examples=["\n"])
    seed: int | None = Field(None, description="To draw the same again.", examples=[7])

    def to_openai(self) -> dict[str, Any]:
        """The same as fields of a completion, with the logprobs of what is drawn."""
        given = self.model_dump(exclude_none=True, exclude={"top_k"})
        return given | {"logprobs": 0} | ({"top_k": self.top_k} if self.top_k > 0 else {})


class Sample(_Body):
    """Prompts to complete."""

    model_id: str | None = Field(
        None, max_length=512, description="What add_lora answered.", examples=[_MODEL_ID]
    )
    base_model: str | None = Field(
        None, max_length=512, description="A base instead of an adapter.", examples=["base"]
    )
    prompts: list[str] | list[list[int]] = Field(
        min_length=1,
        description="Texts, or token ids of each prompt.",
        examples=[["Tell me about the sea."]],
    )
    sampling_params: SamplingParams = Field(SamplingParams(), description="How to sample.")

    def spec(self, run: str, model: str | None) -> single_ops.Sample:
        prompts: list[str | list[int]] = [*self.prompts]
        return single_ops.Sample(run, prompts, self.sampling_params.to_openai(), model)


class Retrieve(_Body):
    """The op that is asked about."""

    request_id: str = Field(
        max_length=64, description="What the op's route answered.", examples=[_REQUEST_ID]
    )
    wait_s: float = Field(0.0, ge=0, le=MAX_WAIT_S, description="How long to wait for its end.")


class Pending(Answer):
    """An op that was begun."""

    request_id: str = Field(examples=[_REQUEST_ID])
    model_id: str | None = Field(examples=[_MODEL_ID])
    status: Literal["pending"] = "pending"


class Made(Answer):
    """A new adapter."""

    model_id: str = Field(examples=[_MODEL_ID])
    model: str = Field(description="Its first version, by name.", examples=[f"{_MODEL_ID}@1"])


class Deleted(Answer):
    """An adapter that is gone."""

    model_id: str = Field(examples=[_MODEL_ID])
    status: Literal["deleted"] = "deleted"


class LogprobRow(Answer):
    """What a pass answers of one item."""

    logprobs: list[float] = Field(examples=[[-0.25, -1.5]])


class Passed(Answer):
    """What a pass answered."""

    model_id: str = Field(examples=[_MODEL_ID])
    loss: float = Field(description="The mean over what has a weight.", examples=[1.25])
    metrics: dict[str, float] = Field(
        description="Sums over the batch.", examples=[{"loss:sum": 12.5, "weight:sum": 10.0}]
    )
    loss_fn_outputs: list[LogprobRow] | None = Field(
        None, description="If `return_logprobs` was set.", examples=[[{"logprobs": [-0.25, -1.5]}]]
    )


class Stepped(Answer):
    """What an optimizer step answered."""

    model_id: str = Field(examples=[_MODEL_ID])
    step: int = Field(description="How many there were.", examples=[1])
    metrics: dict[str, float] = Field(examples=[{"grad_norm:mean": 0.5}])


class Sequence(Answer):
    """One completion. `tokens` is null if the server does not tell them."""

    stop_reason: str = Field(examples=["stop"])
    text: str = Field(examples=[" Ahoy!"])
    tokens: list[int] | None = Field(examples=[[312, 5]])
    logprobs: list[float | None] | None = Field(examples=[[-0.1, -0.2]])


class Drawn(Answer):
    """Completions, in the order of the prompts."""

    model: str = Field(description="What was sampled.", examples=[f"{_MODEL_ID}@2"])
    sequences: list[Sequence]
    completions: list[str] = Field(description="Their texts.", examples=[[" Ahoy!"]])
    generated_text: str = Field(description="The first one's text.", examples=[" Ahoy!"])


class ModelData(Answer):
    """As Tinker's clients read it."""

    model_name: str = Field(examples=["demo"])
    arch: str | None = Field(None, examples=["llama"])


class Info(Answer):
    """What a model is."""

    model_id: str = Field(examples=[_MODEL_ID])
    model_data: ModelData
    base_model: str = Field(examples=["demo"])
    is_lora: bool
    lora_rank: int | None = Field(None, examples=[16])
    lora_alpha: int | None = Field(None, examples=[32])
    target_modules: list[str] | None = Field(None, examples=[["q_proj", "v_proj"]])
    optim_steps: int | None = Field(None, examples=[3])
    trainer: str | None = Field(None, examples=["embedded"])
