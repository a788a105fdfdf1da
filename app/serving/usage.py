"""Reads token counts out of a reply on its way to the client.

What comes in: the bytes of a reply. What goes out: the same bytes, and a `Usage`. A stream that
was made to report usage on our account is given to the client without that last event.
"""

from __future__ import annotations

import re

from app.domain import Usage

_KEY = b'"usage":'
#: Enough for any usage object's own counts, which come before nested details.
_WINDOW = 400
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d{1,12})')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,12})')
_OBJECT = re.compile(rb'"usage":\s*\{')
_NO_CHOICES = re.compile(rb'"choices":\s*\[\s*\]')
#: The ends an event may have; vLLM writes the first.
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
#: An event longer than this is passed on in pieces.
_EVENT_BYTES = 1 << 20


class UsageTap:
    """Remembers the last `usage` object that passed.

    A JSON string cannot contain `"usage":` unescaped, so finding the bytes means finding the key.
    With `hide`, complete server-sent events are passed on and the one that has usage and no
    choices is not.
    """

    __slots__ = ("_carry", "_found", "_held", "_hide")

    def __init__(self, *, hide: bool) -> None:
        self._hide = hide
        self._carry = b""
        self._held = b""
        self._found = b""

    def feed(self, data: bytes) -> bytes:
        if data.endswith(_EVENT_ENDS) and _KEY not in data and not self._carry and not self._held:
            return data  # whole events without usage: nearly all of a stream
        if self._hide:
            data = self._whole_events(data)
        if _KEY not in data and not self._carry:
            if not data.endswith(_EVENT_ENDS):
                self._carry = data[-len(_KEY) :]
            return data
        self._look(data)
        if self._hide and _NO_CHOICES.search(data):
            return self._without_usage_event(data)
        return data

    def finish(self) -> bytes:
        held, self._held = self._held, b""
        return held

    @property
    def usage(self) -> Usage:
        """What the reply said it took; zeros if it did not say."""
        return Usage(*self.counts())

    def counts(self) -> tuple[int, int]:
        """Prompt and completion tokens, as `usage`."""
        found = self._found
        if not found:
            return 0, 0
        prompt = _PROMPT.search(found)
        completion = _COMPLETION.search(found)
        return int(prompt[1]) if prompt else 0, int(completion[1]) if completion else 0

    def _look(self, data: bytes) -> None:
        data = self._carry + data
        at = data.rfind(_KEY)
        if at >= 0 and (_OBJECT.match(data, at) or len(data) - at < len(_KEY) + 2):
            self._found = data[at : at + _WINDOW]
            self._carry = (
                self._found if len(self._found) < _WINDOW and b"}" not in self._found else b""
            )
        else:
            self._carry = b"" if data.endswith(_EVENT_ENDS) else data[-len(_KEY) :]

    def _whole_events(self, data: bytes) -> bytes:
        if self._held:
            data, self._held = self._held + data, b""
        if data.endswith(_EVENT_ENDS) or len(data) > _EVENT_BYTES:
            return data
        end = max((data.rfind(mark) + len(mark) for mark in _EVENT_ENDS if mark in data), default=0)
        self._held = data[end:]
        return data[:end]

    def _without_usage_event(self, data: bytes) -> bytes:
        mark = _EVENT_ENDS[1] if data.endswith(_EVENT_ENDS[1]) else _EVENT_ENDS[0]
        return mark.join(
            event
            for event in data.split(mark)
            if not (_OBJECT.search(event) and _NO_CHOICES.search(event))
        )
