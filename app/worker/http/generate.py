"""/v1/completions and /v1/chat/completions: request, prompt, ticket, reply.

What comes in: HTTP requests. What goes out: one body, or events as tokens come. It must not
know: how a reply is written, how tokens are chosen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from app.clock import SystemClock
from app.errors import LoragateError
from app.worker.dialect.chat import ChatReply
from app.worker.dialect.completions import CompletionReply
from app.worker.dialect.envelope import DONE, Envelope, event, reply_id
from app.worker.dialect.prompts import Prompt, chat_prompt, completion_prompts, sampling
from app.worker.dialect.requests import ChatRequest, CompletionRequest, Sampled
from app.worker.http.bodies import read
from app.worker.http.faults import envelope
from app.worker.http.presence import CLIENT_CLOSED_REQUEST, ClientGone, EventStream, while_present
from app.worker.http.served import Served, served
from app.worker.samplers.delta import Delta
from app.worker.samplers.params import SamplingParams
from app.worker.samplers.ticket import Ticket

# Tokenizing or writing about this much takes a few milliseconds; more is done in a thread.
INLINE_CHARACTERS = 8192
INLINE_LOGPROBS = 512

T = TypeVar("T")


class Reply(Protocol):
    """What both dialects have in common."""

    def whole(self, deltas: list[Delta]) -> bytes:
        """The body of a reply that is not streamed."""

    def chunk(self, delta: Delta) -> bytes:
        """One event."""

    def end(self) -> bytes:
        """The last events."""


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    world = served(request)
    body = await read(request, CompletionRequest, world.settings.max_body_bytes)
    adapter = world.find(body.model)
    engine = world.engine
    prompts = await _aside(
        _characters(body.prompt) > INLINE_CHARACTERS,
        lambda: completion_prompts(body, engine.tokens, engine.limits),
    )
    limit = 1 if body.prompt_only else body.max_tokens
    params = _sampling(world, body, limit, prompts)
    ticket = engine.submit([prompt.ids for prompt in prompts], params, adapter)
    reply = CompletionReply(body, prompts, engine.tokens, _envelope(request, body, "cmpl", world))
    return await _respond(request, body, ticket, reply, params, prompts)


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    world = served(request)
    body = await read(request, ChatRequest, world.settings.max_body_bytes)
    adapter = world.find(body.model)
    engine = world.engine
    size = sum(len(str(message.content)) for message in body.messages)
    prompt = await _aside(
        size > INLINE_CHARACTERS, lambda: chat_prompt(body, engine.tokens, engine.limits)
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = _sampling(world, body, limit, [prompt])
    ticket = engine.submit([prompt.ids], params, adapter)
    reply = ChatReply(body, prompt, engine.tokens, _envelope(request, body, "chatcmpl", world))
    return await _respond(request, body, ticket, reply, params, [prompt])


async def _respond(
    request: Request,
    body: Sampled,
    ticket: Ticket,
    reply: Reply,
    params: SamplingParams,
    prompts: list[Prompt],
) -> Response:
    try:
        if body.stream:
            events = _events(ticket, reply)
            # The status waits for the first token: an error before it still has a status.
            first = await while_present(request.receive, anext(events))
            return EventStream(first, events, ticket)
        deltas = await while_present(request.receive, _all(ticket))
        content = await _aside(_logprobs(params, prompts), lambda: reply.whole(deltas))
        return Response(content, media_type="application/json")
    except ClientGone:
        ticket.cancel()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except BaseException:
        ticket.cancel()
        raise


async def _all(ticket: Ticket) -> list[Delta]:
    return [delta async for deltas in ticket.deltas() for delta in deltas]


async def _events(ticket: Ticket, reply: Reply) -> AsyncIterator[bytes]:
    """One chunk of bytes per step, whatever number of choices it moved."""
    begun = False
    try:
        async for deltas in ticket.deltas():
            begun = True
            yield b"".join([reply.chunk(delta) for delta in deltas])
    except LoragateError as exc:
        if not begun:
            raise
        yield event(envelope(exc)) + DONE
        return
    yield reply.end()


async def _aside(big: bool, work: Callable[[], T]) -> T:
    """The loop never computes for long."""
    return await asyncio.to_thread(work) if big else work()


def _logprobs(params: SamplingParams, prompts: list[Prompt]) -> bool:
    """Whether the reply is long to write."""
    sampled = 0 if params.logprobs is None else len(prompts) * params.n * params.max_tokens
    told = 0 if params.prompt_logprobs is None else sum(len(prompt.ids) for prompt in prompts)
    return sampled + told > INLINE_LOGPROBS


def _sampling(
    world: Served, body: Sampled, limit: int | None, prompts: list[Prompt]
) -> SamplingParams:
    return sampling(
        body,
        world.engine.limits,
        max_tokens=limit,
        prompts=prompts,
        max_logprobs=world.settings.worker_max_logprobs,
    )


def _envelope(request: Request, body: Sampled, prefix: str, world: Served) -> Envelope:
    given = request.headers.get("x-request-id") or body.request_id
    created = int(SystemClock().now().timestamp())
    return Envelope(reply_id(prefix, given), created, body.model or world.name)


def _characters(prompt: str | list[int] | list[str] | list[list[int]]) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(item) for item in prompt if not isinstance(item, int))
