"""Training files: what is taken, and the words for what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidTrainingFile
from app.training.dataset import MAX_FAULTS, MAX_LINE_BYTES, check, examples
from app.training.spec import Method

USER = {"role": "user", "content": "Hello"}
SAID = {"role": "assistant", "content": "Ahoy"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
TOOL = {"role": "tool", "tool_call_id": "c1", "content": "a sail"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
PAIR = {
    "input": {"messages": [USER]},
    "preferred_output": [SAID],
    "non_preferred_output": [{"role": "assistant", "content": "Hi"}],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.jsonl"


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def problem(path: Path, line: Any, method: Method = "supervised") -> str:
    with pytest.raises(InvalidTrainingFile) as caught:
        check(write(path, line), method)
    [fault] = caught.value.faults
    assert fault.line == 1
    return fault.problem


def test_a_conversation_is_handed_on_as_it_is(path: Path) -> None:
    line = chat({"role": "system", "content": "Be brief"}, USER, SAID, tools=TOOLS)
    [example] = examples(write(path, line), "supervised")
    [conversation] = example.conversations
    assert json.loads(conversation.messages) == line["messages"]
    assert conversation.tools is not None
    assert json.loads(conversation.tools) == TOOLS


@pytest.mark.parametrize(
    "line",
    [
        chat({"role": "developer", "content": "Be brief"}, USER, SAID),
        chat(USER, {**SAID, "weight": 0}, USER, {**SAID, "weight": 1}),
        chat(USER, CALLS, TOOL, SAID, tools=TOOLS, parallel_tool_calls=False),
        chat(USER, CALLS, tools=TOOLS),
        chat(USER, {**SAID, "refusal": None, "audio": None, "tool_calls": None}, tools=None),
        chat({**USER, "name": "Ann"}, {**SAID, "reasoning_content": "She greets me."}),
        chat({"role": "user", "content": ""}, SAID),
    ],
)
def test_what_openai_documents_is_taken(path: Path, line: dict[str, Any]) -> None:
    assert check(write(path, line), "supervised") == 1


def test_text_parts_become_one_text(path: Path) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    [example] = examples(write(path, chat({"role": "user", "content": parts}, SAID)), "supervised")
    assert json.loads(example.conversations[0].messages)[0]["content"] == "Hello"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "column 2; allowed is strict JSON"),
        ("[]", "JSON of type list; allowed is a JSON object"),
        ('{"messages": [], "messages": []}', "the key 'messages' twice"),
        ('{"messages": NaN}', "NaN"),
        ({}, "messages: missing, allowed is an array"),
        (chat(), "messages: empty"),
        (chat(1), "messages[0]: found a number, allowed is an object"),
        (chat(USER, SAID, prompt="x"), "found the key 'prompt', allowed 'messages'"),
        (chat(USER, SAID, functions=[]), "write it as 'tools'"),
        (chat({"role": "pirate", "content": "x"}, SAID), "messages[0].role: found 'pirate'"),
        (chat({"content": "x"}, SAID), "messages[0].role: found None"),
        (chat(USER, {**SAID, "wieght": 0}), "messages[1]: found the key 'wieght'"),
        (chat({**USER, "weight": 1}, SAID), "messages[0]: found the key 'weight'"),
        (chat(USER, {**SAID, "weight": 0.5}), "messages[1].weight: found 0.5, allowed 0 or 1"),
        (chat(USER, {**SAID, "weight": True}), "weight: found True"),
        (chat(USER, {**SAID, "weight": 0}), "every assistant message has weight 0"),
        (chat(SAID, USER), "messages: the last has role 'user', allowed is 'assistant'"),
        (chat({"role": "user"}, SAID), "messages[0].content: missing"),
        (chat({"role": "user", "content": 5}, SAID), "content: found a number"),
        (
            chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, SAID),
            "messages[0].content[0]: type 'image_url', allowed is a part of type 'text'",
        ),
        (chat(USER, {"role": "assistant", "content": ""}), "messages[1].content: empty"),
        (chat(USER, TOOL, SAID), "messages[1].tool_call_id: found 'c1'"),
        (chat(USER, CALLS, USER, SAID), "messages[2]: the call 'c1' before it has no tool"),
        (chat(USER, CALLS, TOOL, TOOL, SAID), "messages[3].tool_call_id"),
        (chat(USER, {**CALLS, "tool_calls": []}), "tool_calls: empty"),
        (
            chat(USER, {**CALLS, "tool_calls": [{**CALL, "type": "code"}]}),
            "tool_calls[0].type: found 'code', allowed 'function'",
        ),
        (
            chat(
                USER,
                {**CALLS, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1"}}]},
            ),
            "arguments: found '[1', allowed is a JSON object as a string",
        ),
        (chat(USER, SAID, tools={}), "tools: empty, allowed is an array"),
        (chat(USER, SAID, tools=[{"type": "function"}]), "tools[0].function: missing"),
        (
            chat(USER, SAID, tools=[{"type": "function", "function": {"name": ""}}]),
            "tools[0].function.name: empty",
        ),
        (chat(USER, SAID, parallel_tool_calls=1), "parallel_tool_calls: found a number"),
        (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "allowed is 'assistant'"),
        (
            r'{"messages": [{"role": "assistant", "content": "\ud800"}]}',
            "half of a surrogate pair",
        ),
    ],
)
def test_a_wrong_conversation_is_named(path: Path, line: Any, words: str) -> None:
    assert words in problem(path, line)


def test_a_pair_becomes_two_conversations_of_which_the_outputs_are_learned(path: Path) -> None:
    line = {**PAIR, "input": {"messages": [USER, SAID, USER], "tools": TOOLS}}
    [example] = examples(write(path, line), "dpo")
    good, bad = (json.loads(one.messages) for one in example.conversations)
    assert good == [USER, {**SAID, "weight": 0}, USER, SAID]
    assert bad == [*good[:3], {"role": "assistant", "content": "Hi"}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (chat(USER, SAID), "found the key 'messages', allowed 'input', 'preferred_output'"),
        ({**PAIR, "input": [USER]}, "input: found an array, allowed is an object"),
        ({**PAIR, "input": {"messages": [USER, SAID]}}, "belongs to the outputs"),
        ({**PAIR, "preferred_output": SAID}, "preferred_output: found an object"),
        ({**PAIR, "preferred_output": [USER]}, "preferred_output[0].role: found 'user'"),
        ({**PAIR, "non_preferred_output": []}, "non_preferred_output: empty"),
        ({**PAIR, "non_preferred_output": [SAID]}, "are the same"),
        ({**PAIR, "preferred_output": [{**SAID, "weight": 1}]}, "weight: not allowed here"),
        ({**PAIR, "preferred_output": [CALLS, TOOL]}, "the last has role 'tool'"),
    ],
)
def test_a_wrong_pair_is_named(path: Path, line: Any, words: str) -> None:
    assert words in problem(path, line, "dpo")


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_examples_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InvalidTrainingFile, match="it is empty") as caught:
        check(path, "supervised", param="validation_file")
    assert caught.value.param == "validation_file"
    assert caught.value.faults == ()


def test_blank_lines_count_and_a_byte_order_mark_does_not(path: Path) -> None:
    good = json.dumps(chat(USER, SAID)).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\r\n" + good)
    assert [example.line for example in examples(path, "supervised")] == [1, 3]


def test_other_encodings_are_refused(path: Path) -> None:
    path.write_bytes(json.dumps(chat(USER, SAID)).encode("utf-16"))
    with pytest.raises(InvalidTrainingFile, match="line 1: 'utf-8' codec can't decode"):
        check(path, "supervised")


def test_every_wrong_line_is_named_up_to_a_limit(path: Path) -> None:
    write(path, chat(USER, SAID), "{", chat(USER, SAID), "[]")
    with pytest.raises(InvalidTrainingFile, match="2 lines wrong") as caught:
        check(path, "supervised")
    assert [fault.line for fault in caught.value.faults] == [2, 4]
    write(path, *["{"] * 100)
    with pytest.raises(InvalidTrainingFile, match="at least 20 lines wrong") as caught:
        check(path, "supervised")
    assert len(caught.value.faults) == MAX_FAULTS


@pytest.mark.parametrize(("over", "wrong"), [(0, False), (1, True), (2, True), (MAX_LINE_BYTES, 1)])
def test_the_line_after_an_overlong_one_is_a_line(path: Path, over: int, wrong: bool) -> None:
    good = json.dumps(chat(USER, SAID))
    write(path, good.ljust(MAX_LINE_BYTES + over), "{")
    with pytest.raises(InvalidTrainingFile) as caught:
        check(path, "supervised")
    assert [fault.line for fault in caught.value.faults] == ([1, 2] if wrong else [2])


def test_deep_nesting_is_a_fault_and_no_crash(path: Path) -> None:
    deep: Any = {"type": "object"}
    for _ in range(5000):
        deep = f'{{"properties": {deep if isinstance(deep, str) else json.dumps(deep)}}}'
    line = json.dumps(chat(USER, SAID, tools=TOOLS)).replace('{"type": "object"}', deep)
    assert "nested too deeply" in problem(path, line)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "messages", "input", "tools", "type", "weight"])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(_JSON, st.sampled_from(["supervised", "dpo"]))
def test_any_json_is_either_taken_or_named(
    tmp_path_factory: pytest.TempPathFactory, line: Any, method: Method
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps({"messages": line, "input": line}) + "\n" + json.dumps(line))
    with pytest.raises(InvalidTrainingFile):
        check(path, method)
