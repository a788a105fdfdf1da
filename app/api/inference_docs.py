"""What /docs says of the inference paths, which the front door serves outside FastAPI.

What comes in: nothing. What goes out: per path its summary, its text, the request's schema with
an example, and examples of the answer. Fields we do not read are the model server's affair: they
pass through, so the schemas name the common ones and allow all others.
"""

from __future__ import annotations

from typing import Any

Document = dict[str, Any]

_NAME = "support-bot"
_MODEL = {
    "type": "string",
    "description": "A base, an adapter (`name`), a version (`name@3`) or an alias (`name:prod`).",
}
_STREAM = {"type": "boolean", "default": False, "description": "Answer as server-sent events."}
_USAGE = {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}
_EXTRAS = (
    " `model` is resolved by this gateway and answered as the version that served it; every "
    "other field, vLLM's extras included, passes through both ways."
)
_CREATED = 1762300800


def _takes(required: list[str], properties: Document, example: Document) -> Document:
    schema = {
        "type": "object",
        "required": ["model", *required],
        "properties": {"model": _MODEL, **properties},
        "additionalProperties": True,
    }
    return {"schema": schema, "example": {"model": _NAME, **example}}


def _answers(example: Document, events: str | None = None) -> Document:
    found: Document = {"application/json": {"schema": {"type": "object"}, "example": example}}
    if events is not None:
        found["text/event-stream"] = {"schema": {"type": "string"}, "example": events}
    return found


_TEXT = {"type": "string"}
_TOKENS = {"type": "array", "items": {"type": "integer"}}
_PROMPT = {
    "description": "A text, several, token ids, or several lists of them.",
    "oneOf": [_TEXT, {"type": "array", "items": _TEXT}, _TOKENS],
}
_SAMPLING: Document = {
    "max_tokens": {"type": "integer", "description": "Most tokens to make."},
    "temperature": {"type": "number"},
    "n": {"type": "integer", "description": "Answers per prompt."},
    "stop": {"oneOf": [_TEXT, {"type": "array", "items": _TEXT}]},
    "seed": {"type": "integer"},
    "stream": _STREAM,
}
_MESSAGES = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {"role": _TEXT, "content": _TEXT},
        "additionalProperties": True,
    },
}
_HELLO = [{"role": "user", "content": "Where is my parcel?"}]

#: Path -> summary, description, request, answers.
INFERENCE: dict[str, tuple[str, str, Document, Document]] = {
    "/v1/chat/completions": (
        "Create a chat completion",
        "OpenAI's chat completions, streamed or whole." + _EXTRAS,
        _takes(
            ["messages"],
            {"messages": _MESSAGES, **_SAMPLING, "logprobs": {"type": "boolean"}},
            {"messages": _HELLO, "max_tokens": 32, "stream": False},
        ),
        _answers(
            {
                "id": "chatcmpl-8a1f",
                "object": "chat.completion",
                "created": _CREATED,
                "model": f"{_NAME}@3",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "On its way."},
                        "finish_reason": "stop",
                    }
                ],
                "usage": _USAGE,
            },
            'data: {"object":"chat.completion.chunk","choices":[{"index":0,'
            '"delta":{"content":"On"}}]}\n\ndata: [DONE]\n\n',
        ),
    ),
    "/v1/completions": (
        "Create a completion",
        "OpenAI's completions, with vLLM's prompts of token ids and lists." + _EXTRAS,
        _takes(
            ["prompt"],
            {"prompt": _PROMPT, **_SAMPLING, "logprobs": {"type": "integer"}},
            {"prompt": "Once upon a time", "max_tokens": 5},
        ),
        _answers(
            {
                "id": "cmpl-8a1f",
                "object": "text_completion",
                "created": _CREATED,
                "model": f"{_NAME}@3",
                "choices": [{"index": 0, "text": " there was a parcel", "finish_reason": "length"}],
                "usage": _USAGE,
            },
            'data: {"object":"text_completion","choices":[{"index":0,"text":" there"}]}\n\n'
            "data: [DONE]\n\n",
        ),
    ),
    "/v1/embeddings": (
        "Create embeddings",
        "OpenAI's embeddings, where the pool's servers have them; theirs is the error if not."
        + _EXTRAS,
        _takes(["input"], {"input": _PROMPT}, {"input": "a parcel"}),
        _answers(
            {
                "object": "list",
                "model": f"{_NAME}@3",
                "data": [{"object": "embedding", "index": 0, "embedding": [0.01, -0.02]}],
                "usage": {"prompt_tokens": 2, "total_tokens": 2},
            }
        ),
    ),
    "/v1/responses": (
        "Create a response",
        "OpenAI's responses, where the pool's servers have them." + _EXTRAS,
        _takes(
            ["input"],
            {
                "input": {"oneOf": [_TEXT, _MESSAGES]},
                "max_output_tokens": {"type": "integer"},
                "stream": _STREAM,
            },
            {"input": "Where is my parcel?"},
        ),
        _answers(
            {
                "id": "resp_8a1f",
                "object": "response",
                "created_at": _CREATED,
                "status": "completed",
                "model": f"{_NAME}@3",
                "output": [
                    {
                        "type": "message",
                        "role": "assistant",
                        "content": [{"type": "output_text", "text": "On its way."}],
                    }
                ],
            },
            'event: response.output_text.delta\ndata: {"delta":"On"}\n\n',
        ),
    ),
    "/tokenize": (
        "Tokenize",
        "vLLM's tokenize: the token ids of a prompt, or of messages in the model's template."
        + _EXTRAS,
        _takes([], {"prompt": _TEXT, "messages": _MESSAGES}, {"prompt": "a parcel"}),
        _answers({"count": 2, "max_model_len": 8192, "tokens": [64, 36107]}),
    ),
    "/detokenize": (
        "Detokenize",
        "vLLM's detokenize: the text of token ids." + _EXTRAS,
        _takes(["tokens"], {"tokens": _TOKENS}, {"tokens": [64, 36107]}),
        _answers({"prompt": "a parcel"}),
    ),
}
