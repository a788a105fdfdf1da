"""What clients may send: vLLM's words for what is wrong, and never a surprise."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.errors import InvalidRequest
from app.worker.dialect.prompts import chat_prompt, completion_prompts, sampling
from app.worker.dialect.requests import ChatRequest, CompletionRequest
from app.worker.samplers.limits import Limits
from app.worker.samplers.params import SamplingParams
from app.worker.samplers.tokens import Tokens
from tests.worker.tiny import byte_level

TOKENS = Tokens(byte_level())
LIMITS = Limits(vocab_size=372, max_model_len=64, eos_id=1, stop_token_ids=(), sampling_defaults={})
CHAT = {"messages": [{"role": "user", "content": "hello"}]}

pytestmark = pytest.mark.worker


def read(limits: Limits = LIMITS, **body: Any) -> SamplingParams:
    request = CompletionRequest.model_validate({"prompt": "hello world", **body})
    prompts = completion_prompts(request, TOKENS, limits)
    limit = 1 if request.prompt_only else request.max_tokens
    return sampling(request, limits, max_tokens=limit, prompts=prompts, max_logprobs=20)


def read_chat(**body: Any) -> SamplingParams:
    request = ChatRequest.model_validate({**CHAT, **body})
    prompt = chat_prompt(request, TOKENS, LIMITS)
    limit = request.max_tokens or request.max_completion_tokens
    return sampling(request, LIMITS, max_tokens=limit, prompts=[prompt], max_logprobs=20)


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"temperature": -1}, "temperature must be non-negative, got -1.0.", "temperature"),
        ({"temperature": 3}, "temperature must be in [0, 2], got 3.0.", "temperature"),
        ({"top_p": 0}, "top_p must be in (0, 1], got 0.0.", "top_p"),
        ({"top_k": -2}, "top_k must be 0 (disable), or at least 1, got -2.", None),
        ({"min_p": 2}, "min_p must be in [0, 1], got 2.0.", None),
        ({"n": 0}, "n must be at least 1, got 0.", None),
        ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling, got 2.", None),
        ({"presence_penalty": 3}, "presence_penalty must be in [-2, 2], got 3.0.", None),
        ({"repetition_penalty": 0}, "repetition_penalty must be greater than zero", None),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0.", "max_tokens"),
        (
            {"max_tokens": 65},
            "max_tokens=65 cannot be greater than max_model_len=64.",
            "max_tokens",
        ),
        ({"min_tokens": -1}, "min_tokens must be greater than or equal to 0, got -1.", None),
        ({"min_tokens": 20}, "min_tokens must be less than or equal to max_tokens=16", None),
        ({"stop": ""}, "stop cannot contain an empty string.", None),
        ({"stop_token_ids": [999]}, "token_id(s) [999] in stop_token_ids", "stop_token_ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias contains key(s)", "logit_bias"),
        ({"logit_bias": {"999": 1}}, "token_id(s) [999] in logit_bias", "logit_bias"),
        (
            {"allowed_token_ids": []},
            "allowed_token_ids is not None and empty!",
            "allowed_token_ids",
        ),
        ({"allowed_token_ids": [999]}, "out-of-vocab token id!", "allowed_token_ids"),
        ({"logprobs": 21}, "Requested sample logprobs of 21, which is greater", "logprobs"),
        ({"logprobs": -1}, "Requested sample logprobs of 372, which is greater", "logprobs"),
        ({"logprobs": -2}, "`logprobs` must be a positive value or -1.", "logprobs"),
        ({"logprobs": "a"}, "`logprobs` must be an integer.", "logprobs"),
        ({"prompt_logprobs": 21}, "Requested prompt logprobs of 21", "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "are not available when", "prompt_logprobs"),
        ({"logprob_token_ids": [5]}, "`logprobs` must be set", "logprob_token_ids"),
        ({"stream_options": {}, "stream": False, "n": 0}, "n must be", None),
        ({"stream_options": {"include_usage": True}}, "Stream options can only", "stream_options"),
        ({"prompt": ""}, "Either prompt or prompt_embeds must be provided", "prompt"),
        ({"prompt": []}, "You must pass at least one prompt", None),
        ({"prompt": [[]]}, "The decoder prompt cannot be empty", None),
        ({"prompt": [999]}, "Token id 999 is out of vocabulary", None),
        ({"prompt": [5] * 64}, "max_tokens must be at least 1, got 0.", "max_tokens"),
        ({"prompt": [5] * 65}, "This model's maximum context length is 64", "input_tokens"),
        ({"prompt": ["x"] * 1025}, "prompt list length 1025 exceeds", "prompt"),
        ({"truncate_prompt_tokens": 99}, "cannot be greater than", "truncate_prompt_tokens"),
        ({"bad_words": ["x"]}, "`bad_words` is not supported by this worker.", "bad_words"),
        ({"response_format": {"type": "json_object"}}, "not supported", "response_format"),
    ],
)
def test_values_out_of_range(body: dict[str, Any], message: str, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read(**body)
    assert message in str(raised.value)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "empty conversation"),
        ({"top_logprobs": 2}, "`logprobs` must be set to true"),
        ({"max_completion_tokens": 99}, "max_completion_tokens=99 cannot be greater"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "Cannot set both"),
        ({"chat_template": "x"}, "Chat template is passed"),
        ({"tools": [{"type": "function"}]}, "`tools` is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text only"),
    ],
)
def test_chats_that_cannot_be_answered(body: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_chat(**body)


def test_defaults() -> None:
    params = read()
    assert (params.max_tokens, params.temperature, params.n) == (16, 1.0, 1)
    assert read(max_tokens=None, temperature=None, stop=None, seed=-1) == params
    assert read_chat().max_tokens == 64 - len(TOKENS.encode("<|user|>hello</s><|assistant|>"))
    assert read(unknown=1, user="me", best_of=1) == params


def test_the_model_s_folder_sets_defaults() -> None:
    limits = Limits(372, 64, 1, (), {"temperature": 0.3, "max_tokens": 9, "top_k": 5})
    params = read(limits, top_k=7)
    assert (params.temperature, params.top_k, params.max_tokens) == (0.3, 7, 16)


def test_what_means_what() -> None:
    assert read(logprobs=3, logprob_token_ids=[7, 8]).logprobs is None
    assert read(echo=True, logprobs=2).prompt_logprobs == 2
    assert read(echo=True, max_tokens=0).max_tokens == 1
    assert read(temperature=0.001).temperature == 0.01
    assert read(logit_bias={"7": 1000}).logit_bias == {7: 100.0}
    assert read_chat(logprobs=True).logprobs == 0
    assert read_chat(logprobs=True, top_logprobs=None).logprobs == 0
    assert read(prompt=[5] * 60).max_tokens == 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 500) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = st.sampled_from([*CompletionRequest.model_fields, "messages", "tools", "suffix"])


@given(st.dictionaries(FIELDS, JSON, max_size=5))
def test_whatever_is_sent_is_read_or_refused(body: dict[str, Any]) -> None:
    for attempt in (lambda: read(**body), lambda: read_chat(**body)):
        try:
            attempt()
        except (InvalidRequest, ValidationError):
            continue
