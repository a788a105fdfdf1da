"""The endpoints of a simulated vLLM server.

What comes in: a request and the replica it came to. What goes out: vLLM's answer on the request's
connection, now or when the engine has made it. All state is the replica's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from bench.sim import answers, pages, requests
from bench.sim.answers import Shape, dumps
from bench.sim.engine import Sequence
from bench.sim.exchange import ENGINE_DEAD, Exchange
from bench.sim.faults import Fault, Kind
from bench.sim.http1 import TEXT, Connection, Request
from bench.sim.prefix import block_keys, count_tokens
from bench.sim.requests import Refusal, limit_of, parse, prompts_of, unknown_model

if TYPE_CHECKING:
    from bench.sim.replica import Replica

_ids = itertools.count(1)


def health(replica: Replica, request: Request, connection: Connection) -> None:
    replica.probes += 1
    connection.answer(503 if replica.engine.dead else 200)


def metrics(replica: Replica, request: Request, connection: Connection) -> None:
    connection.answer(200, pages.metrics(replica), TEXT)


def models(replica: Replica, request: Request, connection: Connection) -> None:
    connection.answer(200, pages.models(replica))


def server_info(replica: Replica, request: Request, connection: Connection) -> None:
    """What vllm-router asks for when it starts."""
    connection.answer(200, dumps({"model_path": replica.served, "dp_size": 1}))


def load(replica: Replica, request: Request, connection: Connection) -> None:
    def answer(text: bytes | None) -> None:
        if text is None:
            connection.answer(500, ENGINE_DEAD)
        else:
            connection.answer(200, text, TEXT)

    if replica.engine.dead:
        answer(None)
        return
    replica.adapters.load(parse(request.body), answer)


def unload(replica: Replica, request: Request, connection: Connection) -> None:
    connection.answer(200, replica.adapters.unload(parse(request.body)), TEXT)


def tokenize(replica: Replica, request: Request, connection: Connection) -> None:
    ask = parse(request.body)
    name = ask.model or replica.served
    if not replica.adapters.known(name):
        raise unknown_model(name, replica.served)
    prompt = ask.prompt if isinstance(ask.prompt, str) else requests.conversation_of(ask)
    tokens = answers.tokenize(prompt)
    found = {"count": len(tokens), "max_model_len": replica.figures.max_model_len}
    connection.answer(200, dumps(found | {"tokens": tokens, "token_strs": None}))


def detokenize(replica: Replica, request: Request, connection: Connection) -> None:
    tokens = parse(request.body).tokens or []
    connection.answer(200, dumps({"prompt": answers.detokenize(tokens)}))


def completions(replica: Replica, request: Request, connection: Connection) -> None:
    _infer(replica, request, connection, chat=False)


def chat_completions(replica: Replica, request: Request, connection: Connection) -> None:
    _infer(replica, request, connection, chat=True)


def _infer(replica: Replica, request: Request, connection: Connection, *, chat: bool) -> None:
    fault = replica.faults.popleft() if replica.faults else None
    if fault is not None and fault.kind is Kind.RESET_BEFORE:
        connection.reset()
        return
    if fault is not None and fault.kind is Kind.UNAVAILABLE:
        raise Refusal(503, "The server is overloaded.", "Service Unavailable")
    if replica.engine.dead:
        connection.answer(500, ENGINE_DEAD)
        return
    shape = _shape(replica, request, chat=chat)
    if replica.adapters.known(shape.model):
        _begin(replica, shape, connection, fault)
        return
    if not replica.resolver:
        raise unknown_model(shape.model, replica.served)

    def resolved(done: bool) -> None:
        if done:
            _begin(replica, shape, connection, fault)
        else:
            connection.answer(500, ENGINE_DEAD)

    replica.adapters.bring(shape.model, f"/resolved/{shape.model}", resolved)


def _shape(replica: Replica, request: Request, *, chat: bool) -> Shape:
    ask = parse(request.body)
    prompts = [requests.conversation_of(ask)] if chat else prompts_of(ask)
    limit = limit_of(ask, prompts, replica.figures.max_model_len)
    model = ask.model or replica.served
    rid = request.headers.get(b"x-request-id", b"").decode("latin-1") or f"{next(_ids):016x}"
    speaker = replica.served if replica.lying else model
    return Shape(chat, rid, model, speaker, ask, prompts, limit)


def _begin(replica: Replica, shape: Shape, connection: Connection, fault: Fault | None) -> None:
    """Hand a request to the engine, one sequence a choice."""
    if connection.gone:
        return
    replica.requests[shape.model] = replica.requests.get(shape.model, 0) + 1
    reset_after = fault.tokens if fault is not None else None
    exchange = Exchange(shape, connection, replica.ended, reset_after)
    replica.began(exchange)
    each = shape.ask.choices_each
    sequences = []
    for at, prompt in enumerate(shape.prompts):
        keys = block_keys(shape.model, prompt, replica.figures.block_tokens)
        tokens = count_tokens(prompt)
        sequences += [
            Sequence(
                exchange,
                at * each + choice,
                None if shape.model == replica.served else shape.model,
                keys,
                tokens,
                max(1, shape.limit),  # an echo alone still runs one step
                reads_cache=shape.ask.prompt_logprobs is None,
                streams=exchange.streams,
            )
            for choice in range(each)
        ]
    replica.engine.add(sequences)


Handler = Callable[["Replica", Request, Connection], None]

ROUTES: dict[str, tuple[str, Handler]] = {
    "/health": ("GET", health),
    "/metrics": ("GET", metrics),
    "/v1/models": ("GET", models),
    "/server_info": ("GET", server_info),
    "/get_server_info": ("GET", server_info),
    "/get_model_info": ("GET", server_info),
    "/v1/load_lora_adapter": ("POST", load),
    "/v1/unload_lora_adapter": ("POST", unload),
    "/v1/completions": ("POST", completions),
    "/v1/chat/completions": ("POST", chat_completions),
    "/tokenize": ("POST", tokenize),
    "/detokenize": ("POST", detokenize),
}
