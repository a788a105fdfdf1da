"""Reads token counts out of a reply on its way to the client.

What comes in: the bytes of a reply. What goes out: the same bytes, and counts. A stream that
was made to report usage on our account is given to the client without that last event.
"""

from __future__ import annotations

import re
from asyncio import Future

import msgspec

from app.backends.base import Push
from app.serving.shapes import Counts

_KEY = b'"usage":'
#: Enough for any usage object.
_WINDOW = 400
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d{1,12})')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,12})')
#: A usage object's beginning, and a whole one with its nested details.
_OBJECT = re.compile(rb'"usage":\s{0,64}\{')
_WHOLE = re.compile(rb'"usage":\s{0,64}\{(?:[^{}]++|\{[^{}]*+\})*+\}')
_PENDING = re.compile(rb'"usage":\s{0,64}\Z')
_NO_CHOICES = re.compile(rb'"choices":\s*\[\s*\]')
#: The ends an event may have; vLLM writes the first.
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
#: The same, of a chunk as it is sent.
_CHUNK_ENDS = tuple(end + b"\r\n" for end in _EVENT_ENDS)
_BETWEEN_EVENTS = re.compile(rb"(?<=\n\n)|(?<=\n\r\n)")
#: An event longer than this is passed on in pieces.
_EVENT_BYTES = 1 << 20

_counts = msgspec.json.Decoder(Counts)
_NO_COUNTS = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


class UsageTap:
    """Remembers the last `usage` object that passed.

    A JSON string cannot contain `"usage":` unescaped, so finding the bytes means finding the key.
    With `hide`, complete server-sent events are passed on and the one that has usage and no
    choices is not.
    """

    __slots__ = ("_carry", "_found", "_held", "_hide", "_open")

    def __init__(self, *, hide: bool) -> None:
        self._hide = hide
        self._carry = b""
        self._held = b""
        self._found = b""
        self._open = False

    def feed(self, data: bytes) -> bytes:
        if _KEY not in data and not self._open and data.endswith(_EVENT_ENDS):
            return data  # whole events without usage: nearly all of a stream
        if self._hide:
            data = self._whole_events(data)
        if _KEY in data or self._carry:
            self._look(data)
            if self._hide and _NO_CHOICES.search(data):
                data = b"".join(e for e in _BETWEEN_EVENTS.split(data) if not _only_usage(e))
        elif not data.endswith(_EVENT_ENDS):
            self._carry = data[-len(_KEY) :]
        self._open = bool(self._carry or self._held)
        return data

    def last(self, data: bytes) -> bytes:
        at = -1 if self._open or self._hide else data.rfind(_KEY)
        if at >= 0 and (whole := _WHOLE.match(data, at)):
            self._found = whole[0][:_WINDOW]  # an answer that was not streamed, in one look
            return data
        return self.feed(data) + self.finish()

    def around(self, push: Push) -> Push:
        def tapped(data: bytes) -> Future[None] | None:
            if _KEY in data or self._open or not data.endswith(_EVENT_ENDS):  # see `feed`
                data = self.feed(data)
                if not data:
                    return None
            return push(data)

        return tapped

    def around_chunks(self, push: Push, push_chunk: Push) -> Push:
        def tapped(framed: bytes) -> Future[None] | None:
            if _KEY in framed or self._open or not framed.endswith(_CHUNK_ENDS):  # see `feed`
                data = self.feed(framed[framed.index(b"\r\n") + 2 : -2])
                return push(data) if data else None
            return push_chunk(framed)

        return tapped

    def finish(self) -> bytes:
        held, self._held = self._held, b""
        if not held:
            return b""
        self._look(held)  # a stream that ended without an empty line
        return b"" if _only_usage(held) else held

    def counts(self) -> tuple[int, int]:
        """Prompt and completion tokens as the reply said them; zeros if it did not."""
        found = self._found
        if not found:
            return 0, 0
        try:
            counts = _counts.decode(found[len(_KEY) :])
        except _NO_COUNTS:  # it has other names, or none of the two, or is not whole
            prompt = _PROMPT.search(found)
            completion = _COMPLETION.search(found)
            return int(prompt[1]) if prompt else 0, int(completion[1]) if completion else 0
        return counts.prompt_tokens, counts.completion_tokens

    def _look(self, data: bytes) -> None:
        if self._carry:
            data = self._carry + data
        at = data.rfind(_KEY)
        if at >= 0 and (whole := _WHOLE.match(data, at)):
            self._found = whole[0][:_WINDOW]
            self._carry = b"" if data.endswith(_EVENT_ENDS) else data[-len(_KEY) :]
            return
        pending = at >= 0 and _PENDING.match(data, at)
        carry_from = at if pending else len(data) - len(_KEY)
        while at >= 0 and not _OBJECT.match(data, at):
            at = data.rfind(_KEY, 0, at)  # `"usage":null`, say: the object is before it
        if at >= 0:
            whole = _WHOLE.match(data, at)
            self._found = (whole[0] if whole else data[at:])[:_WINDOW]
            if whole is None and len(self._found) < _WINDOW:
                self._carry = data[at:]
                return
        between = not pending and data.endswith(_EVENT_ENDS)
        self._carry = b"" if between else data[max(carry_from, 0) :]

    def _whole_events(self, data: bytes) -> bytes:
        if self._held:
            data, self._held = self._held + data, b""
        if data.endswith(_EVENT_ENDS) or len(data) > _EVENT_BYTES:
            return data
        end = max((data.rfind(mark) + len(mark) for mark in _EVENT_ENDS if mark in data), default=0)
        self._held = data[end:]
        return data[:end]


def _only_usage(event: bytes) -> bool:
    """Whether this is the event at the end of a stream that was asked to report usage."""
    return _OBJECT.search(event) is not None and _NO_CHOICES.search(event) is not None
