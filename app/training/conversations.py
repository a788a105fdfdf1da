"""Decides whether one line of a training file is a conversation to learn from. Pure.

What comes in: the object on a line. What goes out: conversations as the trainer renders them, or
`BadLine` with what was found and what is allowed. It must not know: files, tokens, templates;
whether a template takes a conversation is for the trainer to say.

The two forms are those OpenAI documents for the methods `supervised` and `dpo`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from app.ops import Message
from app.strict_json import shown

ROLES = ("system", "developer", "user", "assistant", "tool")

#: What models that think call their thoughts; a template takes the one it knows.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "assistant": ("role", "content", "name", "weight", "tool_calls", *_THOUGHTS),
    "tool": ("role", "content", "name", "tool_call_id"),
}
_PLAIN_KEYS = ("role", "content", "name")
_OLDER = {"functions": "tools", "function_call": "tool_calls"}


class BadLine(Exception):
    """What is wrong with a line."""


def supervised(line: Mapping[str, Any]) -> tuple[Message]:
    """`{"messages": […], "tools"?, "parallel_tool_calls"?}`, which ends with what is learned.

    `weight` 0 on an assistant's message leaves it out of the loss.

    Raises:
        BadLine: it has not that form.
    """
    line = _object(line, "the line", ("messages", "tools", "parallel_tool_calls"))
    tools = _tools(line)
    messages = _messages(line, "messages", weighted=True)
    _check_calls(messages)
    if messages[-1]["role"] != "assistant":
        last = messages[-1]["role"]
        raise BadLine(f"messages: the last has role {last!r}, allowed is 'assistant'")
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        raise BadLine("messages: every assistant message has weight 0, so nothing is learned")
    return (_packed(messages, tools),)


def preference(line: Mapping[str, Any]) -> tuple[Message, Message]:
    """`{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}`.

    The answer is the conversation with the preferred output, then with the other one; only the
    outputs have a weight.

    Raises:
        BadLine: it has not that form.
    """
    line = _object(line, "the line", ("input", "preferred_output", "non_preferred_output"))
    given = _object(line.get("input"), "input", ("messages", "tools", "parallel_tool_calls"))
    tools = _tools(given, "input.")
    before = _messages(given, "messages", "input.")
    if before[-1]["role"] == "assistant":
        raise BadLine("input.messages: the last has role 'assistant', which belongs to the outputs")
    before = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in before]
    good = _output(line, "preferred_output", before)
    bad = _output(line, "non_preferred_output", before)
    if good == bad:
        raise BadLine("preferred_output and non_preferred_output are the same")
    return _packed(good, tools), _packed(bad, tools)


def _output(
    line: Mapping[str, Any], key: str, before: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    output = _messages(line, key)
    for at, message in enumerate(output):
        if message["role"] not in ("assistant", "tool"):
            found = message["role"]
            raise BadLine(f"{key}[{at}].role: found {found!r}, allowed 'assistant' or 'tool'")
    if output[-1]["role"] != "assistant":
        raise BadLine(f"{key}: the last has role 'tool', allowed is 'assistant'")
    whole = before + output
    _check_calls(whole)
    return whole


def _messages(
    line: Mapping[str, Any], key: str, within: str = "", *, weighted: bool = False
) -> list[dict[str, Any]]:
    name, found = within + key, line.get(key)
    if not isinstance(found, list) or not found:
        raise BadLine(f"{name}: {_kind(found)}, allowed is an array with a message or more")
    return [_message(one, f"{name}[{at}]", weighted=weighted) for at, one in enumerate(found)]


def _message(found: Any, name: str, *, weighted: bool) -> dict[str, Any]:
    role = found.get("role") if isinstance(found, dict) else None
    if isinstance(found, dict) and role not in ROLES:
        allowed = ", ".join(map(repr, ROLES))
        raise BadLine(f"{name}.role: found {shown(role)!r}, allowed {allowed}")
    message = _object(found, name, _KEYS.get(str(role), _PLAIN_KEYS))
    if "name" in message:
        _text(message["name"], f"{name}.name")
    if role == "tool":
        _text(message.get("tool_call_id"), f"{name}.tool_call_id")
    if "weight" in message:
        _check_weight(message["weight"], name, weighted=weighted)
    if "tool_calls" in message:
        _check_tool_calls(message["tool_calls"], f"{name}.tool_calls")
    for key in _THOUGHTS:
        if key in message:
            _text(message[key], f"{name}.{key}")
    silent = "tool_calls" in message and "content" not in message
    content = "" if silent else _content(message.get("content"), f"{name}.content")
    if role == "assistant" and not content and "tool_calls" not in message:
        raise BadLine(f"{name}.content: empty, and an assistant without tool_calls says something")
    return message if silent else {**message, "content": content}


def _check_weight(weight: Any, name: str, *, weighted: bool) -> None:
    if not weighted:
        raise BadLine(f"{name}.weight: not allowed here; the outputs are what is learned")
    if type(weight) is not int or weight not in (0, 1):
        raise BadLine(f"{name}.weight: found {shown(weight)!r}, allowed 0 or 1")


def _content(found: Any, name: str) -> str:
    """Text, or the text of parts put together."""
    if isinstance(found, str):
        return found
    if not isinstance(found, list):
        raise BadLine(f"{name}: {_kind(found)}, allowed is a string or an array of text parts")
    texts = []
    for at, part in enumerate(found):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            what = f"type {shown(kind)!r}" if isinstance(part, dict) else _kind(part)
            raise BadLine(f"{name}[{at}]: {what}, allowed is a part of type 'text'")
        texts.append(_text(part.get("text"), f"{name}[{at}].text", empty=True))
    return "".join(texts)


def _check_tool_calls(found: Any, name: str) -> None:
    if not isinstance(found, list) or not found:
        raise BadLine(f"{name}: {_kind(found)}, allowed is an array with a call or more")
    for at, call in enumerate(found):
        call = _object(call, f"{name}[{at}]", ("id", "type", "function"))
        _text(call.get("id"), f"{name}[{at}].id")
        _check_is_function(call, f"{name}[{at}]")
        function = _object(call.get("function"), f"{name}[{at}].function", ("name", "arguments"))
        _text(function.get("name"), f"{name}[{at}].function.name")
        _check_arguments(function.get("arguments"), f"{name}[{at}].function.arguments")


def _check_arguments(found: Any, name: str) -> None:
    text = _text(found, name)
    try:
        value = msgspec.json.decode(text.encode(errors="replace"))
    except (msgspec.DecodeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadLine(f"{name}: found {shown(text)!r}, allowed is a JSON object as a string")


def _check_calls(messages: list[dict[str, Any]]) -> None:
    """Every tool message answers a call made just before, and every call is answered in time."""
    waiting: dict[str, int] = {}
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            if waiting.pop(message["tool_call_id"], None) is None:
                found = shown(message["tool_call_id"])
                raise BadLine(
                    f"messages[{at}].tool_call_id: found {found!r}, allowed is the id of a call "
                    "in the assistant message before, once"
                )
            continue
        if waiting:
            call = shown(next(iter(waiting)))
            raise BadLine(f"messages[{at}]: the call {call!r} before it has no tool message yet")
        waiting = {call["id"]: at for call in message.get("tool_calls", ())}


def _tools(line: Mapping[str, Any], within: str = "") -> list[Any] | None:
    if not isinstance(line.get("parallel_tool_calls", True), bool):
        found = _kind(line["parallel_tool_calls"])
        raise BadLine(f"{within}parallel_tool_calls: {found}, allowed is true or false")
    if "tools" not in line:
        return None
    name, found = f"{within}tools", line["tools"]
    if not isinstance(found, list):
        raise BadLine(f"{name}: {_kind(found)}, allowed is an array of tools")
    for at, tool in enumerate(found):
        _check_tool(tool, f"{name}[{at}]")
    return found or None


def _check_tool(found: Any, name: str) -> None:
    tool = _object(found, name, ("type", "function"))
    _check_is_function(tool, name)
    keys = ("name", "description", "parameters", "strict")
    function = _object(tool.get("function"), f"{name}.function", keys)
    _text(function.get("name"), f"{name}.function.name")
    if "parameters" in function and not isinstance(function["parameters"], dict):
        raise BadLine(
            f"{name}.function.parameters: {_kind(function['parameters'])}, allowed is an object"
        )


def _check_is_function(found: Mapping[str, Any], name: str) -> None:
    if found.get("type") != "function":
        raise BadLine(f"{name}.type: found {shown(found.get('type'))!r}, allowed 'function'")


def _object(found: Any, name: str, keys: Collection[str]) -> dict[str, Any]:
    """An object with no other than these keys; a null is as if it were not there."""
    if not isinstance(found, dict):
        raise BadLine(f"{name}: {_kind(found)}, allowed is an object")
    present = {key: value for key, value in found.items() if value is not None}
    for key in present:
        if key not in keys:
            hint = f"; write it as {_OLDER[key]!r}" if key in _OLDER else ""
            allowed = ", ".join(map(repr, keys))
            raise BadLine(f"{name}: found the key {shown(key)!r}, allowed {allowed}{hint}")
    return present


def _text(found: Any, name: str, *, empty: bool = False) -> str:
    if not isinstance(found, str) or not (found or empty):
        raise BadLine(f"{name}: {_kind(found)}, allowed is a string with something in it")
    return found


def _kind(found: Any) -> str:
    """What a value is, in JSON's words."""
    if found is None:
        return "missing"
    if found in ("", [], {}):
        return "empty"
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return f"found {names.get(type(found), 'a number')}"


def _packed(messages: list[dict[str, Any]], tools: list[Any] | None) -> Message:
    try:
        return Message(
            messages=msgspec.json.encode(messages),
            tools=None if tools is None else msgspec.json.encode(tools),
        )
    except UnicodeEncodeError as exc:
        raise BadLine("half of a surrogate pair (\\ud800 to \\udfff) is no character") from exc
    except RecursionError as exc:
        raise BadLine("nested too deeply") from exc
