"""Which tokens of a conversation are learned: the assistant's words and the end of its turn."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest

from app.ops import Message, Rendered, RenderRequest
from app.worker.dialect import render as module
from app.worker.dialect.render import render
from app.worker.samplers.tokens import Tokens
from tests.worker.tiny import byte_level, sentencepiece_like

pytestmark = pytest.mark.worker

USER, REPLY = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "I am fine."}
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens(byte_level())


def one(tokens: Tokens, messages: Any, *, complete: bool = True, tools: Any = None) -> Rendered:
    encoded = None if tools is None else msgspec.json.encode(tools)
    asked = RenderRequest([Message(msgspec.json.encode(messages), encoded)], complete)
    (found,) = render(asked, tokens)
    return found


def ids(found: Rendered) -> list[int]:
    assert found.problem is None
    assert found.tokens is not None
    return list(struct.unpack(f"<{found.tokens.shape[0]}i", found.tokens.data))


def learned(found: Rendered, tokens: Tokens) -> list[tuple[str, float]]:
    """The text of each stretch of tokens with a weight, and that weight."""
    assert found.weights is not None
    weights = struct.unpack(f"<{found.weights.shape[0]}f", found.weights.data)
    stretches: list[tuple[list[int], float]] = []
    last = 0.0
    for token, weight in zip(ids(found), weights, strict=True):
        if weight and weight != last:
            stretches.append(([], weight))
        if weight:
            stretches[-1][0].append(token)
        last = weight
    return [(tokens.decode(each), weight) for each, weight in stretches]


def test_the_assistant_s_words_and_the_end_of_its_turn(tokens: Tokens) -> None:
    found = one(tokens, [USER, REPLY])
    assert tokens.decode(ids(found)) == "<|user|>hello</s><|assistant|>I am fine.</s>"
    assert learned(found, tokens) == [("I am fine.</s>", 1.0)]


def test_every_turn_by_its_own_weight(tokens: Tokens) -> None:
    second = {"role": "assistant", "content": "naïve 日本語 😀", "weight": 0.5}
    third = {"role": "assistant", "content": "no", "weight": 0}
    found = one(tokens, [USER, REPLY, USER, second, USER, third])
    assert learned(found, tokens) == [("I am fine.</s>", 1.0), ("naïve 日本語 😀</s>", 0.5)]


def test_what_a_template_writes_after_the_end_is_not_learned() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    tokens = Tokens(tokenizer)
    found = one(tokens, [USER, REPLY, USER, REPLY])
    assert learned(found, tokens) == [("I am fine.</s>", 1.0)] * 2
    assert tokens.decode(ids(found)).endswith("I am fine.</s>\n")


def test_an_empty_answer_is_learned_as_the_end_alone(tokens: Tokens) -> None:
    assert learned(one(tokens, [USER, {"role": "assistant", "content": None}]), tokens) == [
        ("</s>", 1.0)
    ]


def test_markers_for_spaces_do_not_shift_what_is_learned() -> None:
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokens = Tokens(tokenizer)
    (stretch,) = learned(one(tokens, [USER, REPLY]), tokens)
    assert stretch[0].strip() == "I am fine."


def test_a_prompt_has_no_weights(tokens: Tokens) -> None:
    found = one(tokens, [USER], complete=False)
    assert tokens.decode(ids(found)) == "<|user|>hello</s><|assistant|>"
    assert found.weights is None


def test_tools_and_other_fields_reach_the_template() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{{ tools[0]['name'] }}:{% for m in messages %}{{ m['name'] }}{{ m['weight'] }}{% endfor %}"
    )
    tokens = Tokens(tokenizer)
    message = {"role": "user", "content": "", "name": "Ann", "weight": 1}
    found = one(tokens, [message], tools=[{"name": "f"}])
    assert tokens.decode(ids(found)) == "f:Ann"


def test_parts_of_text_are_joined(tokens: Tokens) -> None:
    parts = [{"type": "text", "text": "a"}, "b"]
    found = one(tokens, [{"role": "user", "content": parts}, REPLY])
    assert tokens.decode(ids(found)).startswith("<|user|>a\nb</s>")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "there are 0 messages"),
        ([USER] * 600, "there are 600 messages"),
        ({"role": "user"}, "not a JSON list of objects"),
        ([REPLY], "nothing it answers"),
        ([USER, {**REPLY, "weight": 2}], "weight is 2; 0 to 1"),
        ([USER, {**REPLY, "weight": True}], "weight is True"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "reads text only"),
    ],
)
def test_a_conversation_that_cannot_be_used(tokens: Tokens, messages: Any, said: str) -> None:
    found = one(tokens, messages)
    assert found.tokens is None
    assert said in (found.problem or "")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "the chat template refused"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "changes"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_cannot_be_used(template: str | None, said: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    assert said in (one(Tokens(tokenizer), [USER, REPLY]).problem or "")


def test_one_that_is_wrong_harms_no_other(tokens: Tokens) -> None:
    good = Message(msgspec.json.encode([USER, REPLY]))
    found = render(RenderRequest([good, Message(b"nonsense"), good]), tokens)
    assert [each.problem is None for each in found] == [True, False, True]


def test_a_conversation_that_is_too_large(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 20)
    assert "20 are allowed" in (one(tokens, [USER, REPLY]).problem or "")
