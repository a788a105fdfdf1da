"""The bodies clients send, in vLLM's dialect.

What comes in: JSON. What goes out: typed requests; fields nobody reads are ignored, fields that
would change the answer and cannot be honoured are refused. It must not know: tokenizers, engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from app.errors import InvalidRequest
from app.worker.errors import bad_value

INT64 = 2**63
STOP_STRINGS_MAX = 4
PROMPTS_MAX = 1024

TokenId = Annotated[int, Field(ge=0)]
OrDefault = BeforeValidator(lambda value: 0 if value is None else value)


class Body(BaseModel):
    """Unknown fields are ignored, as vLLM ignores them."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str | None = None


class StreamOptions(BaseModel):
    """What else a stream carries."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampled(Body):
    """What completions and chat share."""

    n: int = 1
    seed: int | None = Field(None, ge=-INT64, le=INT64 - 1)
    stop: str | Annotated[list[str], Field(max_length=STOP_STRINGS_MAX)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    allowed_token_ids: list[int] | None = None
    logprob_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=INT64 - 1)
    truncation_side: Literal["left", "right"] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    request_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        _refuse_unsupported(data)
        if data.get("stream_options") and not data.get("stream"):
            raise bad_value(
                "Stream options can only be defined when `stream=True`.", "stream_options"
            )
        _check_prompt_logprobs(data)
        # A null means the default, wherever there is one.
        return {name: value for name, value in data.items() if value is not None}

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to report with each token; None for no logprobs."""
        raise NotImplementedError

    @property
    def prompt_alternatives(self) -> int | None:
        return self.prompt_logprobs


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: list[TokenId] | list[list[TokenId]] | str | list[str]
    max_tokens: int = 16
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        prompt = data.get("prompt")
        if prompt is None or prompt == "":
            raise bad_value(
                "Either prompt or prompt_embeds must be provided and non-empty.", "prompt"
            )
        many = isinstance(prompt, list) and len(prompt) > PROMPTS_MAX
        if many and not all(isinstance(item, int) for item in prompt):
            raise bad_value(
                f"prompt list length {len(prompt)} exceeds the maximum allowed count of "
                f"{PROMPTS_MAX}.",
                "prompt",
            )
        _check_count(data, "logprobs")
        if not data.get("logprob_token_ids"):
            return data
        if data.get("logprobs") is None:
            raise bad_value(
                "when using `logprob_token_ids`, `logprobs` must be set.", "logprob_token_ids"
            )
        if data.get("echo") and data.get("max_tokens") == 0:
            raise bad_value(
                "`logprob_token_ids` is not supported when `echo=True` and `max_tokens=0` "
                "because no output tokens are generated.",
                "logprob_token_ids",
            )
        return data

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompt_alternatives(self) -> int | None:
        if self.prompt_logprobs is None and self.echo:
            return self.logprobs
        return self.prompt_logprobs

    @property
    def prompt_only(self) -> bool:
        """Nothing but the prompt is wanted back; one token is drawn all the same."""
        return self.echo and self.max_tokens == 0


class TextPart(BaseModel):
    """A piece of a message; only text is served."""

    type: str = "text"
    text: str | None = None


class Message(BaseModel):
    """One turn. Extra fields reach the template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[str | TextPart] | None = None


class Templated(Body):
    """What the chat template needs."""

    messages: list[Message]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.chat_template is not None:
            raise InvalidRequest(
                "Chat template is passed with request, but this worker only uses the model's own.",
                param="chat_template",
            )
        given = "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt
        if self.continue_final_message and given:
            raise InvalidRequest(
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
            )
        return self


class ChatRequest(Sampled, Templated):
    """POST /v1/chat/completions."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, OrDefault] = 0
    echo: bool = False
    return_prompt_text: bool = False

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        _check_count(data, "top_logprobs")
        asked = data.get("logprobs")
        if data.get("top_logprobs") and not asked:
            raise bad_value(
                "when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs"
            )
        if data.get("logprob_token_ids") and not asked:
            raise bad_value(
                "when using `logprob_token_ids`, `logprobs` must be set to true.",
                "logprob_token_ids",
            )
        return data

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def prompt_alternatives(self) -> int | None:
        if self.prompt_logprobs is None and self.echo:
            return self.top_logprobs
        return self.prompt_logprobs


class TokenizeText(Body):
    """POST /tokenize with a prompt."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(Templated):
    """POST /tokenize with messages."""

    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0, le=INT64 - 1)]]


class LoadAdapter(BaseModel):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapter(BaseModel):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


def _check_count(data: Mapping[str, Any], name: str) -> None:
    value = data.get(name)
    if value is None:
        return
    if not isinstance(value, int | float):
        raise bad_value(f"`{name}` must be an integer.", name, value)
    if value < 0 and value != -1:
        raise bad_value(f"`{name}` must be a positive value or -1.", name, value)


def _check_prompt_logprobs(data: Mapping[str, Any]) -> None:
    value = data.get("prompt_logprobs")
    if data.get("stream") and isinstance(value, int) and (value > 0 or value == -1):
        raise bad_value(
            "`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs"
        )
    _check_count(data, "prompt_logprobs")


def _refuse_unsupported(data: Mapping[str, Any]) -> None:
    """Say no to what would silently give another answer than the one asked for."""
    choice = data.get("tool_choice")
    shape = data.get("response_format")
    refused = {
        "suffix": data.get("suffix"),
        "use_beam_search": data.get("use_beam_search"),
        "bad_words": data.get("bad_words"),
        "structured_outputs": data.get("structured_outputs"),
        "prompt_embeds": data.get("prompt_embeds"),
        "tool_choice": choice not in (None, "none", "auto"),
        "tools": data.get("tools") and choice != "none",
        "response_format": isinstance(shape, Mapping) and shape.get("type") != "text",
    }
    for name, value in refused.items():
        if value:
            raise InvalidRequest(f"`{name}` is not supported by this worker.", param=name)
