"""The splice changes `model`, adds what accounting needs, and leaves every other byte alone."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from app.errors import InvalidJson, InvalidRequest
from app.serving.request import InferenceRequest, parse

COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
UPSTREAM = 'pirate "the" ☠@3'

#: A lone surrogate is no text; msgspec refuses it, and so would any strict server behind us.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
keys = st.one_of(st.sampled_from(["model", "models", 'x"model', "stream", "messages"]), text)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["model", '"model"', '"model":', "\\", 'a\\"model"']),
    text,
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
members = st.lists(st.tuples(keys, values), max_size=5)
layouts = st.sampled_from(
    [
        {"separators": (",", ":")},
        {"separators": (", ", ": "), "ensure_ascii": False},
        {"separators": (" ,\r\n", "\t: "), "indent": 1},
    ]
)


def escaped(key: str) -> str:
    return "".join(f"\\u{ord(c):04x}" if ord(c) < 0x10000 else c for c in key)


def written(pairs: list[tuple[str, Any]], layout: dict[str, Any], escape: frozenset[int]) -> bytes:
    """An object as some client writes it: duplicates kept, some keys spelled with escapes."""
    item, colon = layout["separators"]
    parts = []
    for at, (key, value) in enumerate(pairs):
        name = f'"{escaped(key)}"' if at in escape else json.dumps(key)
        parts.append(name + colon + json.dumps(value, **layout))
    return ("{" + item.join(parts) + "}").encode()


@given(
    before=members,
    model=text,
    after=members,
    layout=layouts,
    escape=st.frozensets(st.integers(0, 10)),
)
@example([("a", {"model": "x"})], "x", [], {"separators": (",", ":")}, frozenset({1}))
@example([("model", "x")], "x", [], {"separators": (",", ":")}, frozenset({1}))
@example([], "x", [("role", "model")], {"separators": (",", ":")}, frozenset())
def test_only_the_model_changes(
    before: list[tuple[str, Any]],
    model: str,
    after: list[tuple[str, Any]],
    layout: dict[str, Any],
    escape: frozenset[int],
) -> None:
    after = [(key, value) for key, value in after if key != "model"]
    body = written([*before, ("model", model), *after], layout, escape)
    request = parse(EMBEDDINGS, body)
    assert request.model == model
    sent = request.upstream_body(UPSTREAM)
    assert json.loads(sent) == json.loads(body) | {"model": UPSTREAM}


@given(before=members, model=text, after=members, layout=layouts)
def test_where_nothing_is_ambiguous_every_other_byte_stays(
    before: list[tuple[str, Any]],
    model: str,
    after: list[tuple[str, Any]],
    layout: dict[str, Any],
) -> None:
    plain = json.dumps(model, ensure_ascii=False).encode()
    assume(b"\\" not in plain)
    head = written(before, layout, frozenset())[:-1]
    tail = written(after, layout, frozenset())[1:]
    assume(b'"model"' not in head + tail and b"\\u006" not in head + tail)
    head += b" ," if before else b""
    tail = b"\n," + tail if after else tail
    body = head + b'"model" :\t' + plain + tail
    sent = parse(EMBEDDINGS, body).upstream_body("new@1")
    assert sent == head + b'"model" :\t"new@1"' + tail


@pytest.mark.parametrize(
    "number", ["1e400", "-0.0", "0.1000000000000000055", "1E+2", "123456789012345678901234567890"]
)
@pytest.mark.parametrize("ambiguous", [False, True])
def test_numbers_pass_as_they_were_written(number: str, ambiguous: bool) -> None:
    extra = ',"role":"model"' if ambiguous else ""
    body = f'{{"model":"a","seed":{number}{extra}}}'.encode()
    sent = parse(COMPLETIONS, body).upstream_body("b")
    assert sent == body.replace(b'"a"', b'"b"')


def test_a_nested_model_is_not_mistaken_for_one_spelled_with_escapes() -> None:
    body = rb'{"nested":{"model":"a"},"mod\u0065l":"a"}'
    sent = json.loads(parse(COMPLETIONS, body).upstream_body("b"))
    assert sent == {"nested": {"model": "a"}, "model": "b"}


@pytest.mark.parametrize("depth", range(100, 1000, 60))
def test_a_deeply_nested_body_passes_or_is_the_caller_s_mistake(depth: int) -> None:
    deep = b"[" * depth + b"]" * depth
    body = b'{"model":"a","role":"model","deep":%b}' % deep
    try:
        sent = parse(COMPLETIONS, body).upstream_body("b")
    except InvalidJson:
        return
    assert sent == body.replace(b'"a"', b'"b"')


def test_a_body_nested_beyond_reason_is_refused() -> None:
    depth = 10 * sys.getrecursionlimit()
    with pytest.raises(InvalidJson):
        parse(COMPLETIONS, b'{"model":"a","deep":' + b"[" * depth + b"]" * depth + b"}")


def test_a_body_that_is_read_with_less_stack_than_it_is_rewritten_with() -> None:
    """Nesting that just fits where it is parsed may not fit where it is rewritten."""

    def at_depth(frames: int, request: InferenceRequest) -> bytes:
        return at_depth(frames - 1, request) if frames else request.upstream_body("b")

    deep = b"[" * 700 + b"]" * 700
    request = parse(COMPLETIONS, b'{"model":"a","role":"model","deep":%b}' % deep)
    with pytest.raises(InvalidJson, match="not valid JSON"):
        at_depth(400, request)


@pytest.mark.parametrize(
    "body",
    [b'{"model":"a","\xff":"model"}', b'{"model":"a","\xff":1,"stream":true}'],
)
def test_a_key_that_is_not_utf_8_is_the_caller_s_mistake(body: bytes) -> None:
    with pytest.raises(InvalidJson):
        parse(COMPLETIONS, body).upstream_body("b")


STREAM_OPTIONS = st.none() | st.fixed_dictionaries(
    {},
    optional={"include_usage": st.booleans(), "continuous_usage_stats": st.booleans(), "x": values},
)


@given(
    rest=st.dictionaries(keys.filter(lambda k: k not in ("model", "stream")), values, max_size=3),
    options=STREAM_OPTIONS,
    given_at_all=st.booleans(),
)
def test_a_stream_is_made_to_report_usage(
    rest: dict[str, Any], options: dict[str, Any] | None, given_at_all: bool
) -> None:
    asked = {**rest, "model": "a", "stream": True}
    if given_at_all:
        asked["stream_options"] = options
    else:
        options = None
    request = parse(COMPLETIONS, json.dumps(asked).encode())
    wanted = (options or {}).get("include_usage") is True
    assert request.reports_usage is wanted
    sent = json.loads(request.upstream_body("b"))
    if wanted:
        assert sent == asked | {"model": "b"}
    else:
        added = {"stream_options": {**(options or {}), "include_usage": True}}
        assert sent == asked | {"model": "b"} | added


@pytest.mark.parametrize("stream", ["false", "1", '"true"', "null", "[true]"])
def test_what_is_not_a_stream_gets_no_stream_options(stream: str) -> None:
    body = b'{"model":"a","stream":%b}' % stream.encode()
    request = parse(COMPLETIONS, body)
    assert request.reports_usage
    assert request.upstream_body("b") == body.replace(b'"a"', b'"b"')


def test_a_path_without_stream_options_gets_none() -> None:
    body = b'{"model":"a","stream":true}'
    assert parse("/v1/responses", body).upstream_body("b") == body.replace(b'"a"', b'"b"')


@pytest.mark.parametrize("options", ['"yes"', "1", "[1]", "true"])
def test_senseless_stream_options_are_for_the_replica_to_refuse(options: str) -> None:
    body = b'{"model":"a","stream":true,"stream_options":%b}' % options.encode()
    assert parse(COMPLETIONS, body).upstream_body("b") == body.replace(b'"a"', b'"b"')


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"model":"a"} x',
        b'\xef\xbb\xbf{"model":"a"}',
        b'{"model":"a","x":NaN}',
        b'{"model":"a","x":01}',
        b'{"model":"\xff"}',
        rb'{"model":"\ud800"}',
        b"[]",
        b'"model"',
        b"null",
        b"1e999",
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJson):
        parse(COMPLETIONS, body)


@pytest.mark.parametrize("body", [b"{}", b'{"models":"a"}', b'{"x":{"model":"a"}}'])
def test_a_missing_model_is_said_so(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="no `model`") as caught:
        parse(COMPLETIONS, body)
    assert (caught.value.param, caught.value.code) == ("model", "missing_required_parameter")


@pytest.mark.parametrize("model", ["null", "1", "true", '["a"]', '{"model":"a"}'])
def test_a_model_that_is_no_string_is_said_so(model: str) -> None:
    with pytest.raises(InvalidRequest, match="must be a string") as caught:
        parse(COMPLETIONS, b'{"model":%b}' % model.encode())
    assert (caught.value.param, caught.value.code) == ("model", "invalid_type")


@given(st.binary(max_size=60) | st.from_regex(re.compile(rb'\{"model":.{0,40}\}')))
def test_any_bytes_are_served_or_refused(body: bytes) -> None:
    try:
        request = parse(COMPLETIONS, body)
        sent = request.upstream_body("b")
    except InvalidRequest:
        return
    assert parse(COMPLETIONS, sent).model == "b"


@pytest.mark.parametrize(
    ("path", "field"),
    [
        (COMPLETIONS, "prompt"),
        ("/v1/chat/completions", "messages"),
        (EMBEDDINGS, "input"),
        ("/v1/responses", "input"),
    ],
)
def test_the_prefix_is_the_beginning_of_what_is_asked(path: str, field: str) -> None:
    content = json.dumps([{"role": "user", "content": "x" * 20_000}]).encode()
    body = b'{"model":"a", "%b" :  %b , "other":["y"]}' % (field.encode(), content)
    assert bytes(parse(path, body).prefix) == content[:8192]
    assert bytes(parse(path, b'{"model":"a"}').prefix) == b""


@pytest.mark.parametrize(
    ("path", "fields", "wanted"),
    [
        (COMPLETIONS, {"prompt_logprobs": 0}, True),
        ("/v1/chat/completions", {"prompt_logprobs": 5}, True),
        (COMPLETIONS, {"prompt_logprobs": None, "logprobs": 5}, False),
        (COMPLETIONS, {"echo": True, "logprobs": 0}, True),
        (COMPLETIONS, {"echo": True, "logprobs": None}, False),
        (COMPLETIONS, {"echo": False, "logprobs": 1}, False),
        ("/v1/chat/completions", {"echo": True, "logprobs": True}, False),
    ],
)
def test_who_wants_prompt_logprobs(path: str, fields: dict[str, Any], wanted: bool) -> None:
    request = parse(path, json.dumps({"model": "a"} | fields).encode())
    assert request.wants_prompt_logprobs is wanted


@pytest.mark.parametrize(("user", "read"), [('"me"', "me"), ("null", ""), ("5", ""), ("[1]", "")])
def test_the_user_is_read_if_it_is_a_name(user: str, read: str) -> None:
    for path in (COMPLETIONS, EMBEDDINGS, "/v1/chat/completions"):
        assert parse(path, b'{"model":"a","user":%b}' % user.encode()).user == read


@pytest.mark.parametrize(
    ("prompt", "batch"),
    [
        ('"text"', False),
        ("[1, 2]", False),
        ("[]", False),
        ("null", False),
        ('["a"]', True),
        ("[ [1]]", True),
        ("[[]]", True),
    ],
)
@pytest.mark.parametrize("stream", ["true", "false", "null"])
def test_an_array_of_prompts_is_a_batch(prompt: str, batch: bool, stream: str) -> None:
    body = f'{{"model":"a","prompt":{prompt},"stream":{stream}}}'.encode()
    request = parse(COMPLETIONS, body)
    assert (request.batch, request.streams) == (batch, stream == "true")
    assert not parse(EMBEDDINGS, body).batch


def test_a_stream_nobody_understands_is_no_batch() -> None:
    assert not parse(COMPLETIONS, b'{"model":"a","prompt":["a","b"],"stream":"yes"}').batch


@pytest.mark.parametrize(
    ("fields", "scoring"),
    [
        ({"max_tokens": 1}, True),
        ({"max_tokens": 0, "echo": True}, True),
        ({"max_tokens": 0}, False),
        ({"max_tokens": 2}, False),
        ({}, False),
        ({"max_tokens": True}, False),
        ({"max_tokens": 1.0}, False),
        ({"max_tokens": 1, "stream": True}, False),
        ({"max_tokens": 1, "stream": "no"}, False),
        ({"max_tokens": 1, "prompt": ["a", "b"]}, False),
        ({"max_tokens": 1, "prompt": [[1], [2]]}, False),
        ({"max_tokens": 1, "prompt": ['a" ,\\"b']}, True),
        ({"max_tokens": 1, "prompt": [[1, 2]]}, True),
        ({"max_tokens": 2, "prompt": ["a"]}, False),
    ],
    ids=str,
)
def test_what_asks_for_scores(fields: dict[str, Any], scoring: bool) -> None:
    body = json.dumps({"model": "a", "prompt": "x"} | fields).encode()
    assert parse(COMPLETIONS, body).scoring is scoring
    assert not parse("/v1/chat/completions", body).scoring


@pytest.mark.parametrize(
    ("prompt", "only"),
    [('["a b"]', '"a b"'), ("[ [1, 2]\n]", "[1, 2]"), ('"x"', '"x"'), ("[1]", "[1]"), ("[]", "[]")],
)
def test_a_prompt_alone_in_an_array(prompt: str, only: str) -> None:
    assert (
        parse(COMPLETIONS, f'{{"model":"a","prompt":{prompt}}}'.encode()).only_prompt()
        == only.encode()
    )


def test_another_prompt_in_the_same_call() -> None:
    body = b'{"prompt":"a","model":"m","seed":1e400,"role":"model","user":"u"}'
    request = parse(COMPLETIONS, body)
    members = request.members()
    del members["prompt"]
    other = request.with_prompt(b'["b","c"]', members)
    sent = other.upstream_body("m@1")
    assert sent == b'{"model":"m@1","seed":1e400,"role":"model","user":"u","prompt":["b","c"]}'
    assert bytes(other.prefix) == b'["b","c"]'


@pytest.mark.parametrize("prompt", ['"once upon"', "[1, 2]"])
def test_the_prefix_of_a_batch_is_its_first_prompt_s(prompt: str) -> None:
    alone = parse(COMPLETIONS, f'{{"model":"a","prompt":{prompt}}}'.encode())
    batch = parse(COMPLETIONS, f'{{"model":"a","prompt":[ {prompt},{prompt}]}}'.encode())
    assert bytes(batch.prefix).startswith(bytes(alone.prefix))


def test_another_call_is_for_the_same_user() -> None:
    request = parse(COMPLETIONS, b'{"model":"m","prompt":"a","user":"u"}')
    other = request.with_prompt(b'"b"', {"model": msgspec.Raw(b'"m"')})
    assert (other.user, other.path, bytes(other.prefix)) == ("u", COMPLETIONS, b'"b"')
