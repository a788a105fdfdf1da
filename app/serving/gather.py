"""The answers to the parts of a batch, put together as if one server had answered. Pure.

What comes in: bodies and events of vLLM, and where each part's prompts stand in the client's array.
What goes out: one body, or events with the client's indices. Of a choice only `index` is written
anew; everything else passes as it came. Knows nothing of replicas.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from app.errors import UpstreamBroke

_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_elements = msgspec.json.Decoder(list[msgspec.Raw])
_INDEX = re.compile(rb'\{\s*"index":\s*(\d+)')
#: vLLM's events: one choice, whose index comes first. A JSON string has no unescaped quotation
#: mark, so that what matches is a key.
_EVENT = re.compile(rb'data: (\{[^\[]*?)"choices":\s*\[\s*\{\s*"index":\s*(\d+)(?=\s*,)')
_ONLY_USAGE = re.compile(rb'"choices":\s*\[\s*\]')
DONE = b"data: [DONE]\n\n"


def members_of(body: bytes) -> dict[str, msgspec.Raw]:
    """The members of a reply.

    Raises:
        UpstreamBroke: it is not a JSON object.
    """
    try:
        return _members.decode(body)
    except msgspec.DecodeError as exc:
        raise UpstreamBroke(f"A replica's answer is not a completion: {exc}") from exc


def choices_of(members: dict[str, msgspec.Raw], prompts: int) -> list[bytes]:
    """The choices of a reply in the order of their index; as many for each prompt.

    Raises:
        UpstreamBroke: there are none, or not as many for each.
    """
    try:
        choices = [bytes(choice) for choice in _elements.decode(members["choices"])]
        indices = [index_of(choice) for choice in choices]
    except (KeyError, TypeError, msgspec.DecodeError) as exc:
        raise UpstreamBroke(f"A replica's answer has no choices: {exc}") from exc
    if not choices or len(choices) % prompts or sorted(indices) != list(range(len(choices))):
        raise UpstreamBroke(f"A replica gave {len(choices)} choices for {prompts} prompts.")
    return [choices[at] for at in sorted(range(len(choices)), key=indices.__getitem__)]


def gather(answers: Sequence[tuple[Sequence[int], bytes]]) -> bytes:
    """One reply of several; each comes with the places of its prompts in the client's array.

    Raises:
        UpstreamBroke: one of them is no completion, or they do not fit together.
    """
    replies = [members_of(body) for _, body in answers]
    found = [
        choices_of(reply, len(places)) for reply, (places, _) in zip(replies, answers, strict=True)
    ]
    n, prompts = len(found[0]) // len(answers[0][0]), sum(len(places) for places, _ in answers)
    if sum(map(len, found)) != n * prompts:
        raise UpstreamBroke("The replicas gave different numbers of choices for a prompt.")
    ordered = [b""] * (n * prompts)
    for choices, (places, _) in zip(found, answers, strict=True):
        for at, choice in enumerate(choices):
            index = places[at // n] * n + at % n
            ordered[index] = indexed(choice, index)
    usages = [msgspec.json.decode(reply.get("usage", b"null")) for reply in replies]
    whole = dict(replies[0])
    whole["choices"] = msgspec.Raw(b"[%b]" % b",".join(ordered))
    whole["usage"] = msgspec.Raw(msgspec.json.encode(summed(usages)))
    return msgspec.json.encode(whole)


def summed(usages: Sequence[Any]) -> Any:
    """Token counts added up, at any depth; what has no number stays as it first was."""
    objects = [usage for usage in usages if isinstance(usage, dict)]
    if objects:
        keys = dict.fromkeys(key for usage in objects for key in usage)
        return {key: summed([usage.get(key) for usage in objects]) for key in keys}
    numbers = [usage for usage in usages if type(usage) in (int, float)]
    return sum(numbers) if numbers else usages[0]


def index_of(choice: bytes) -> int:
    """Where a choice says that it stands."""
    found = _INDEX.match(choice)
    if found is not None:
        return int(found[1])
    return int(msgspec.json.decode(choice)["index"])


def indexed(choice: bytes, index: int) -> bytes:
    """The same choice, standing at `index`."""
    found = _INDEX.match(choice)
    if found is not None:
        return b'{"index":%d%b' % (index, choice[found.end() :])
    members = _members.decode(choice)
    members["index"] = msgspec.Raw(b"%d" % index)
    return msgspec.json.encode(members)


class Merger:
    """Events of several parts under one id, and their usage added up.

    `told`: one of the parts said that it failed, which ends the whole.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self.told = False
        self._head = b""
        self._usages: list[tuple[bytes, Any]] = []

    def event(self, event: bytes, places: Sequence[int]) -> bytes:
        """What of a part's event goes to the client: nothing of those that end the part."""
        found = _EVENT.match(event)
        if found is None or event.count(b'"index":') > 1:
            return self._odd(event, places)
        self._head = self._head or found[1]
        index = self._place(int(found[2]), places)
        return b'data: %b"choices":[{"index":%d%b' % (self._head, index, event[found.end() :])

    def end(self) -> bytes:
        """The events after the last part's: usage, if it was reported, and the end."""
        if not self._usages:
            return DONE
        members = _members.decode(self._usages[0][0])
        if self._head:  # the id that every other event has
            members |= _members.decode(self._head.rstrip().rstrip(b",") + b"}")
        total = summed([usage for _, usage in self._usages])
        members["usage"] = msgspec.Raw(msgspec.json.encode(total))
        return b"data: %b\n\n%b" % (msgspec.json.encode(members), DONE)

    def _odd(self, event: bytes, places: Sequence[int]) -> bytes:
        """An event that is not a choice as vLLM writes it."""
        data = event.strip().removeprefix(b"data:").strip()
        if data in (b"", b"[DONE]"):
            return b""
        members = members_of(data)
        if "choices" not in members:
            self.told = True
            return event
        if _ONLY_USAGE.search(event) and "usage" in members:
            self._usages.append((data, msgspec.json.decode(members["usage"])))
            return b""
        choices = [bytes(choice) for choice in _elements.decode(members["choices"])]
        moved = [indexed(one, self._place(index_of(one), places)) for one in choices]
        members["choices"] = msgspec.Raw(b"[%b]" % b",".join(moved))
        return b"data: %b\n\n" % msgspec.json.encode(members)

    def _place(self, index: int, places: Sequence[int]) -> int:
        prompt, sample = divmod(index, self._n)
        if prompt >= len(places):
            raise UpstreamBroke(f"A replica gave a choice {index} for {len(places)} prompts.")
        return places[prompt] * self._n + sample
