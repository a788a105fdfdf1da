"""What the data plane reads out of a payload, and the splice that rewrites `model`.

What comes in: the bytes of a JSON body. What goes out: an `InferenceRequest`, and those bytes
with another model name. Everything not named here passes through untouched, byte for byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from app.errors import InvalidJson, InvalidRequest

_KEY = b'"model"'
#: How every letter of `model` begins when spelled with an escape; no encoder does that to a letter.
_ESCAPED = b"\\u006"
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_KEY_AND_COLON = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*')
#: Paths whose streams end with a usage event if `stream_options` asks for one.
_STREAM_OPTIONS_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})


class _Peek(msgspec.Struct, gc=False):
    model: Any = msgspec.UNSET
    stream: Any = False
    stream_options: Any = None


_peek = msgspec.json.Decoder(_Peek)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NOT_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


@dataclass(slots=True)
class InferenceRequest:
    """One call of an inference path.

    `headers` are header lines to send upstream, each ended by CRLF. `reports_usage` is false for
    a stream that would end without telling how many tokens it took.
    """

    path: str
    body: bytes
    model: str
    reports_usage: bool = True
    headers: bytes = b""
    prefix: bytes = b""

    def upstream_body(self, name: str) -> bytes:
        """The body with `name` as its model, made to report usage."""
        body = self.body
        at = body.find(_KEY)
        if self.reports_usage and at >= 0 and body.find(_KEY, at + 7) < 0:
            key = _KEY_AND_COLON.match(body, at)
            written = self._written(key.end()) if key is not None else b""
            # An escaped letter elsewhere may be in a key that spells `model` another way.
            if key is not None and written and body.count(_ESCAPED) == written.count(_ESCAPED):
                rest = body[key.end() + len(written) :]
                return b"%b%b%b" % (body[: key.end()], msgspec.json.encode(name), rest)
        return self._rebuilt(name)

    def _written(self, start: int) -> bytes:
        """The name as it stands at `start`, quotes included; empty if it does not."""
        plain = b'"%b"' % self.model.encode()
        if self.body.startswith(plain, start):
            return plain
        found = _STRING.match(self.body, start)
        if found is None or msgspec.json.decode(found[0]) != self.model:
            return b""
        return found[0]

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
        peek = _peek.decode(body)
    except msgspec.ValidationError as exc:
        raise InvalidJson("The request body must be a JSON object.") from exc
    except _NOT_JSON as exc:
        raise InvalidJson(f"The request body is not valid JSON: {exc}") from exc
    model = peek.model
    if not isinstance(model, str):
        raise _no_model() if model is msgspec.UNSET else _odd_model()
    reports = True
    if peek.stream is True and path in _STREAM_OPTIONS_PATHS:
        reports = _reports_usage(peek.stream_options)
    return InferenceRequest(path, body, model, reports)


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
