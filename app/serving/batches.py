"""A batch of prompts: split over replicas, sent at once, put together again.

What comes in: a completion request with an array of prompts. What goes out: one `Reply`, as if one
vLLM had answered. Which prompts go together is `scatter`'s, how answers fit together is `gather`'s.
Knows nothing of the client, nor of how a replica is found for a call.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from app.backends.base import BufferedBody, Reply
from app.domain import Route
from app.errors import LoragateError, UpstreamBroke, UpstreamError
from app.serving.fleet import Fleet
from app.serving.forward import Forwarder
from app.serving.gather import gather
from app.serving.meter import Meter
from app.serving.offender import REFUSALS, Refusal, Refused, find, in_band, may_be_a_prompt
from app.serving.request import InferenceRequest
from app.serving.scatter import Part, prompts_of, shares, split, wanted
from app.serving.streams import MAX_ATTEMPTS, MergedBody, Stream, together

#: Most that one part's answer may have.
_ANSWER_BYTES = 1 << 30
#: What is left out to ask whether prompts are refused: it is dear, or no stream has it.
_NOT_ASKED = ("echo", "logprobs", "prompt_logprobs", "logprob_token_ids", "stream_options")
_JSON = [(b"content-type", b"application/json")]
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


class Batches:
    """Serves requests with many prompts, through a `Forwarder`, one call for each part.

    A batch that is not worth a second replica goes through whole and untouched.
    """

    def __init__(self, forwarder: Forwarder, fleet: Fleet, meter: Meter) -> None:
        self.forwarder = forwarder
        self.fleet = fleet
        self.meter = meter

    async def forward(self, request: InferenceRequest, route: Route, *, name: bool = True) -> Reply:
        """Answer as one vLLM would; with `name`, a refusal names the prompt that is to blame.

        Raises:
            NoReplicaAvailable, AdapterLoadFailed, UpstreamError: a part could not be served.
        """
        prompts = prompts_of(request.content)
        if len(prompts) < 2:
            return await self.forwarder.forward(request, route)
        replicas = self.fleet.spread(route, wanted(prompts))
        filled = shares([replica.inflight for replica in replicas], len(prompts)) or [1.0]
        parts = split(prompts, filled)
        batch = _Batch(self, request, route, prompts, [replica.id for replica in replicas])
        if len(parts) == 1:
            return await batch.untouched(name=name)
        self.meter.split(len(parts))
        try:
            return await (batch.streamed(parts) if request.streams else batch.whole(parts))
        except Refused as exc:
            refusal, replica = exc.refusal, exc.replica
            if name:
                refusal = await batch.named(exc.places, refusal)
        return _answered(refusal, replica)


@dataclass(slots=True)
class _Batch:
    """One batch under way."""

    batches: Batches
    request: InferenceRequest
    route: Route
    prompts: list[bytes]
    replicas: list[str]
    _members: dict[str, msgspec.Raw] | None = None

    @property
    def members(self) -> dict[str, msgspec.Raw]:
        """The members of the body, without `prompt`."""
        if self._members is None:
            self._members = self.request.members()
            del self._members["prompt"]
        return self._members

    async def untouched(self, *, name: bool) -> Reply:
        """Send it as it came."""
        reply = await self.batches.forwarder.forward(self.request, self.route)
        if not name or reply.status not in REFUSALS:
            return reply
        refusal = await _read(reply)
        return _answered(await self.named(range(len(self.prompts)), refusal), reply.replica)

    async def whole(self, parts: Sequence[Part]) -> Reply:
        """Every answer, then one of them all."""
        answers = await together([self._answer(part) for part in parts])
        data = gather([(part.places, body) for part, (_, body) in zip(parts, answers, strict=True)])
        reply = Reply(200, _JSON, BufferedBody(data))
        reply.replica = ",".join(dict.fromkeys(replica for replica, _ in answers))
        return reply

    async def streamed(self, parts: Sequence[Part]) -> Reply:
        """Every stream's beginning, then the events as they come."""
        streams = [Stream(part.places, self._sender(part)) for part in parts]
        try:
            await together([stream.open() for stream in streams])
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        reply = Reply(200, _EVENTS, MergedBody(streams, _samples(self.members)))
        reply.replica = ",".join(dict.fromkeys(stream.replica for stream in streams))
        return reply

    async def named(self, places: Sequence[int], refusal: Refusal) -> Refusal:
        """The refusal of these prompts, with the one that is to blame, if one is."""
        if not may_be_a_prompt(refusal, self.members):
            return refusal
        longest = max(places, key=lambda place: len(self.prompts[place]))
        try:
            found = await find(places, longest, self._refused)
        except LoragateError:
            return refusal
        if found is None:
            return refusal
        place, its_refusal = found
        others = [other for other in places if other != place]
        if refusal.error().get("param") is None and others:
            # The same words about another prompt: it is nothing that the prompts have.
            other = await self._refused(others[:1])
            if other is not None and other.body == its_refusal.body:
                return refusal
        return its_refusal.about(place)

    async def _answer(self, part: Part) -> tuple[str, bytes]:
        """The replica that answered a part, and its body; sent again if it is lost on the way."""
        send = self._sender(part)
        for attempt in range(MAX_ATTEMPTS):
            # What is lost before an answer begins, the forwarder has sent elsewhere already.
            reply = await send(attempt)
            try:
                return reply.replica, await whole(reply)
            except UpstreamError as exc:
                lost = exc
        raise lost

    def _sender(self, part: Part) -> Callable[[int], Coroutine[None, None, Reply]]:
        prompt = b"[%b]" % b",".join([self.prompts[place] for place in part.places])
        return partial(self._sent, self.request.with_prompt(prompt, self.members), part)

    async def _sent(self, request: InferenceRequest, part: Part, attempt: int) -> Reply:
        """A part's answer, if it is one."""
        replicas = self.replicas
        prefer = replicas[(part.share + attempt) % len(replicas)] if replicas else None
        reply = await self.batches.forwarder.forward(request, self.route, prefer=prefer)
        if reply.status < 300:
            return reply
        raise Refused(part.places, await _read(reply), reply.replica)

    async def _refused(self, places: Sequence[int]) -> Refusal | None:
        """Ask about some prompts; as a stream, which is cut as soon as it begins."""
        members = {k: v for k, v in self.members.items() if k not in _NOT_ASKED}
        members["stream"] = msgspec.Raw(b"true")
        if members.get("max_tokens") == msgspec.Raw(b"0"):
            members["max_tokens"] = msgspec.Raw(b"1")
        prompt = b"[%b]" % b",".join([self.prompts[place] for place in places])
        reply = await self.batches.forwarder.forward(
            self.request.with_prompt(prompt, members), self.route
        )
        if reply.status in REFUSALS:
            return await _read(reply)
        try:
            return in_band(await reply.next())
        finally:
            reply.close()


async def _read(reply: Reply) -> Refusal:
    return Refusal(reply.status, reply.headers, await whole(reply))


async def whole(reply: Reply) -> bytes:
    """A reply's body, and the reply closed."""
    try:
        data = await reply.read(_ANSWER_BYTES)
    finally:
        reply.close()
    if len(data) >= _ANSWER_BYTES:
        raise UpstreamBroke(
            f"The answer to a part of the batch is over {_ANSWER_BYTES >> 20} MiB. "
            "Ask in smaller batches."
        )
    return data


def _answered(refusal: Refusal, replica: str) -> Reply:
    reply = Reply(refusal.status, refusal.headers, BufferedBody(refusal.body))
    reply.replica = replica
    return reply


def _samples(members: dict[str, msgspec.Raw]) -> int:
    """How many choices each prompt gets: `n`."""
    try:
        return max(1, int(msgspec.json.decode(members.get("n", b"1"))))
    except (TypeError, ValueError):
        return 1
