"""What msgspec reads out of payloads: the members of a request that matter, a reply's usage.

What comes in: the bytes of JSON. What goes out: those members and nothing else. Apart from the
code that uses them, because msgspec looks at a class's annotations when the program runs, and a
compiler such as mypyc keeps no annotations.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

_NOTHING = msgspec.Raw()

_Tokens = Annotated[int, msgspec.Meta(ge=0, lt=10**12)]


class Peek(msgspec.Struct, gc=False):
    """What any request may have. Values are looked at later: theirs may be of any type."""

    model: Any = msgspec.UNSET
    user: Any = None
    stream: Any = False
    stream_options: Any = None
    prompt_logprobs: Any = None


class PeekCompletion(Peek, gc=False):
    """A request for completions; `content` is its prompt."""

    content: msgspec.Raw = msgspec.field(default=_NOTHING, name="prompt")
    echo: Any = False
    logprobs: Any = None
    max_tokens: Any = None


class PeekChat(Peek, gc=False):
    """A request for a chat completion; `content` is its messages."""

    content: msgspec.Raw = msgspec.field(default=_NOTHING, name="messages")


class PeekInput(Peek, gc=False):
    """Any other request."""

    content: msgspec.Raw = msgspec.field(default=_NOTHING, name="input")


class Counts(msgspec.Struct, gc=False):
    """The usual usage object."""

    prompt_tokens: _Tokens
    completion_tokens: _Tokens
