"""What the data plane reads out of a payload, and the splice that rewrites `model`.

What comes in: the bytes of a JSON body. What goes out: an `InferenceRequest`, and those bytes
with another model name. Everything not named here passes through untouched, byte for byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from app.errors import InvalidJson, InvalidRequest
from app.serving.shapes import PeekChat, PeekCompletion, PeekInput

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
#: As much of a prompt as can decide where it goes.
PREFIX_BYTES = 8 << 10

_KEY = b'"model"'
#: How every letter of `model` begins when spelled with an escape; no encoder does that to a letter.
_ESCAPED = b"\\u006"
_MEMBER = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]|\\.)*")', re.DOTALL)
#: Paths whose streams end with a usage event if `stream_options` asks for one.
_STREAM_OPTIONS_PATHS = frozenset({COMPLETIONS, CHAT})
#: A list of token ids is one prompt; a list of strings or of lists is many.
_ARRAY_OF_ONE = re.compile(rb'\[\s*("[^"\\]*+(?:\\.[^"\\]*+)*+"|\[[^\[\]]*+\])\s*\]', re.DOTALL)
_ARRAY_OF_PROMPTS = re.compile(rb'\[[ \t\r\n]*["\[]')

_peek_input: msgspec.json.Decoder[Any] = msgspec.json.Decoder(PeekInput)
_peeks: dict[str, msgspec.json.Decoder[Any]] = {
    COMPLETIONS: msgspec.json.Decoder(PeekCompletion),
    CHAT: msgspec.json.Decoder(PeekChat),
}
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NOT_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


@dataclass(slots=True)
class InferenceRequest:
    """One call of an inference path.

    `headers` are header lines to send upstream, each ended by CRLF. `reports_usage` is false for
    a stream that would end without telling how many tokens it took. `content` is the JSON of the
    prompt, the messages or the input, as it stands in the body. `batch`: the prompt is an array of
    prompts. `session` is the one that the client's headers name. `scoring`: one prompt, not
    streamed, from which at most one token is generated.
    """

    path: str
    body: bytes
    model: str
    reports_usage: bool = True
    headers: bytes = b""
    content: msgspec.Raw | None = None
    user: str = ""
    session: str = ""
    wants_prompt_logprobs: bool = False
    streams: bool = False
    batch: bool = False
    scoring: bool = False

    @property
    def prefix(self) -> memoryview:
        """The beginning of `content`: requests that share it share a prefix cache.

        Of an array of prompts it is the first's, as if that were alone.
        """
        content = memoryview(self.content or b"")
        array = _ARRAY_OF_PROMPTS.match(content) if self.batch else None
        start = array.end() - 1 if array is not None else 0
        return content[start : start + PREFIX_BYTES]

    def only_prompt(self) -> bytes:
        """The prompt, if it is one: as it stands in the body, or in the array it is alone in."""
        content = bytes(self.content or b"")
        alone = _ARRAY_OF_ONE.fullmatch(content) if self.batch else None
        return content if alone is None else alone[1]

    def with_prompt(self, prompt: bytes, members: dict[str, msgspec.Raw]) -> InferenceRequest:
        """The same call with another prompt; `members` are those of the body, without `prompt`."""
        head = msgspec.json.encode(members)[:-1]
        body = b'%b,"prompt":%b}' % (head, prompt)
        return replace(self, body=body, content=msgspec.Raw(prompt))

    def members(self) -> dict[str, msgspec.Raw]:
        """The members of the body, each as it was written."""
        try:
            members: dict[str, msgspec.Raw] = _members.decode(self.body)
        except _NOT_JSON as exc:  # this looks closer, and has less of the stack left, than `parse`
            raise InvalidJson(f"The request body is not valid JSON: {exc}") from exc
        return members

    def upstream_body(self, name: str) -> bytes:
        """The body with `name` as its model, made to report usage."""
        body = self.body
        if self.reports_usage and body.count(_KEY) == 1:
            escaped = body.count(_ESCAPED)
            after = body.find(_KEY) + len(_KEY)
            start = body.find(b'"', after)
            usual = b'"%b"' % self.model.encode()
            colon = body[after:start].strip() == b":"
            if colon and not escaped and body.startswith(usual, start):
                rest = body[start + len(usual) :]
                return b"%b%b%b" % (body[:start], msgspec.json.encode(name), rest)
            found = _MEMBER.search(body)
            # An escaped letter elsewhere may be in a key that spells `model` another way.
            if (
                found is not None
                and found[1].count(_ESCAPED) == escaped
                and msgspec.json.decode(found[1]) == self.model
            ):
                start, end = found.span(1)
                return b"%b%b%b" % (body[:start], msgspec.json.encode(name), body[end:])
        return self._rebuilt(name)

    def _rebuilt(self, name: str) -> bytes:
        """The slow way, when the key's place is ambiguous or another member changes too."""
        try:
            members: dict[str, Any] = _members.decode(self.body)
            members["model"] = name
            if not self.reports_usage:
                options = members.get("stream_options", b"null")
                given = msgspec.json.decode(options, type=dict[str, Any] | None)
                members["stream_options"] = {**(given or {}), "include_usage": True}
            return msgspec.json.encode(members)
        except _NOT_JSON as exc:  # this looks closer, and has less of the stack left, than `parse`
            raise InvalidJson(f"The request body is not valid JSON: {exc}") from exc


def parse(path: str, body: bytes) -> InferenceRequest:
    """Read what routing and accounting need.

    Raises:
        InvalidJson: the body is not a JSON object.
        InvalidRequest: `model` is missing or not a string.
    """
    try:
        peek = _peeks.get(path, _peek_input).decode(body)
    except msgspec.ValidationError as exc:
        raise InvalidJson("The request body must be a JSON object.") from exc
    except _NOT_JSON as exc:
        raise InvalidJson(f"The request body is not valid JSON: {exc}") from exc
    model = peek.model
    if not isinstance(model, str):
        raise _no_model() if model is msgspec.UNSET else _odd_model()
    streams = peek.stream is True
    request = InferenceRequest(path, body, model, True, b"", peek.content)
    if streams:
        request.streams = True
        if path in _STREAM_OPTIONS_PATHS:
            request.reports_usage = _reports_usage(peek.stream_options)
    if isinstance(peek.user, str):
        request.user = peek.user
    if peek.prompt_logprobs is not None:
        request.wants_prompt_logprobs = True
    if path == COMPLETIONS:
        _look_at_completion(request, peek)
    return request


def _look_at_completion(request: InferenceRequest, peek: PeekCompletion) -> None:
    if peek.echo is True and peek.logprobs is not None:
        request.wants_prompt_logprobs = True
    content = peek.content
    if peek.stream not in (False, True, None):
        return
    request.batch = _ARRAY_OF_PROMPTS.match(content) is not None
    limit = peek.max_tokens
    few = limit == 1 or (limit == 0 and peek.echo is True)
    if few and type(limit) is int and not request.streams:
        request.scoring = not request.batch or _ARRAY_OF_ONE.fullmatch(content) is not None


def _reports_usage(stream_options: Any) -> bool:
    """Whether a stream will end with its usage; senseless options are for upstream to refuse."""
    if stream_options is None:
        return False
    return not isinstance(stream_options, dict) or stream_options.get("include_usage") is True


def _no_model() -> InvalidRequest:
    return InvalidRequest(
        "The request has no `model`. Name a base or an adapter; GET /v1/models lists them.",
        param="model",
        code="missing_required_parameter",
    )


def _odd_model() -> InvalidRequest:
    return InvalidRequest("`model` must be a string.", param="model", code="invalid_type")
