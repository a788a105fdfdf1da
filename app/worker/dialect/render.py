"""Conversations through the model's chat template, and which of their tokens to learn.

What comes in: messages as JSON. What goes out: token ids with a weight each, or what is wrong
with a conversation. Tokenizing is work: callers do it off the event loop. It must not know:
engines, sockets, losses.

An assistant's turn is what the template adds when the turn is appended to the messages before it
and their generation prompt: its text and the token that ends it, which the model must learn to
emit. That only means something where the one text begins with the other.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from jinja2.exceptions import TemplateError

from app.ops import Message, Rendered, RenderRequest, Tensor
from app.worker.samplers.tokens import Tokens

#: Of one conversation. Its turns are found by rendering it up to each of them.
MAX_BYTES = 4 << 20
MAX_MESSAGES = 512

Span = tuple[int, int, float]


class _Problem(Exception):
    """Why a conversation cannot be used, for whoever wrote it."""


def render(request: RenderRequest, tokens: Tokens) -> list[Rendered]:
    """Each conversation's ids and weights, or its problem."""
    return [_rendered(each, tokens, complete=request.complete) for each in request.conversations]


def _rendered(conversation: Message, tokens: Tokens, *, complete: bool) -> Rendered:
    try:
        messages, tools = _parsed(conversation)
        if not tokens.tokenizer.chat_template:
            raise _Problem("the model has no chat template")
        if not complete:
            text = _template(messages, tools, tokens, prompt=True)
            return Rendered(tokens=_ids(tokens.encode(text, add_special_tokens=False)))
        text = _template(messages, tools, tokens, prompt=False)
        spans = _spans(text, messages, tools, tokens)
        ids, offsets = _encoded(text, tokens)
        return Rendered(tokens=_ids(ids), weights=_weights(offsets, spans))
    except _Problem as exc:
        return Rendered(problem=str(exc))


def _parsed(conversation: Message) -> tuple[list[dict[str, Any]], Any]:
    if len(conversation.messages) > MAX_BYTES:
        raise _Problem(
            f"the messages are {len(conversation.messages)} bytes; {MAX_BYTES} are allowed"
        )
    try:
        messages = msgspec.json.decode(conversation.messages, type=list[dict[str, Any]])
        tools = msgspec.json.decode(conversation.tools) if conversation.tools else None
    except msgspec.DecodeError as exc:
        raise _Problem(f"the messages are not a JSON list of objects: {exc}") from exc
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise _Problem(f"there are {len(messages)} messages; 1 to {MAX_MESSAGES} are allowed")
    return [_plain(message) for message in messages], tools


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Templates want one string: text parts are joined by line breaks, as in serving."""
    content = message.get("content")
    if not isinstance(content, list):
        return {**message, "content": "" if content is None else content}
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) != len(parts):
        raise _Problem("a message has a part that is not text, and the model reads text only")
    return {**message, "content": "\n".join(texts)}


def _template(messages: list[dict[str, Any]], tools: Any, tokens: Tokens, *, prompt: bool) -> str:
    shown = [{key: value for key, value in each.items() if key != "weight"} for each in messages]
    try:
        return tokens.apply_chat_template(shown, tools=tools, add_generation_prompt=prompt)
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as exc:
        raise _Problem(f"the chat template refused the messages: {exc}") from exc


def _spans(text: str, messages: list[dict[str, Any]], tools: Any, tokens: Tokens) -> list[Span]:
    """(begin, end, weight) of each assistant turn, in characters of `text`."""
    endings = tuple(tokens.tokenizer.all_special_tokens)
    spans = []
    for place, message in enumerate(messages):
        weight = _weight(place, message)
        if weight == 0.0:
            continue
        if place == 0:
            raise _Problem("messages[0] is the assistant's, and there is nothing it answers")
        before = _template(messages[:place], tools, tokens, prompt=True)
        after = _template(messages[: place + 1], tools, tokens, prompt=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise _Problem(
                f"messages[{place}]: the chat template changes earlier turns when later ones are "
                "added, so it cannot be told which tokens the assistant says"
            )
        # The model stops at the token that ends its turn; a line break after it is not its own.
        turn = after.rstrip()
        end = len(turn) if turn.endswith(endings) and len(turn) > len(before) else len(after)
        spans.append((len(before), end, weight))
    return spans


def _weight(place: int, message: dict[str, Any]) -> float:
    if message.get("role") != "assistant":
        return 0.0
    weight = message.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise _Problem(f"messages[{place}].weight is {weight!r}; 0 to 1 is allowed")
    return float(weight)


def _encoded(text: str, tokens: Tokens) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and where in the text each one's characters are."""
    found = tokens.encode_with_offsets(text)
    if found is None:
        raise _Problem("the model's tokenizer does not say which characters a token stands for")
    return found


def _weights(offsets: list[tuple[int, int]], spans: list[Span]) -> Tensor:
    """A token has the weight of the turn that its last character is in."""
    ends = np.array([end for _, end in offsets], dtype=np.int64)
    weights = np.zeros(len(offsets), dtype="<f4")
    for begin, end, weight in spans:
        weights[(begin < ends) & (ends <= end)] = weight
    return Tensor("float32", weights.shape, weights.tobytes())


def _ids(ids: list[int]) -> Tensor:
    array = np.array(ids, dtype="<i4")
    return Tensor("int32", array.shape, array.tobytes())
