"""Two real vLLM, eight adapters, four slots on each: everyone gets the right weights, always.

What is right is what the worker says of the same adapters: transformers and PEFT, in float32.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from app import demo
from app.settings import PoolSettings, Settings
from tests.integration.gateway import Gateway
from tests.servers import MAX_LORA_RANK, ModelServer, run_vllm
from tests.vllm.reference import write_random_adapter
from tests.waiting import until, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.worker]

SLOTS = 4
REQUESTS = 1000
AT_ONCE = 16
TOLERANCE = 1e-3
PROMPTS = demo.SAMPLE_PROMPTS[:4]
GREEDY: dict[str, Any] = {
    "temperature": 0,
    "max_tokens": 5,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's five, and three that nobody trained, far enough off to be told apart."""
    folder = tmp_path_factory.mktemp("random")
    targets = (["q_proj", "v_proj"], ["o_proj", "down_proj"], ["gate_proj", "up_proj", "k_proj"])
    made = {
        f"random-{n}": write_random_adapter(folder / str(n), names, seed=n, spread=0.12)
        for n, names in enumerate(targets)
    }
    return {**demo.ADAPTERS, **made}


# --- the forms in which clients ask


@dataclass(frozen=True)
class Said:
    """What a model said: its name for itself, and what must be the same from the same weights."""

    model: str
    texts: tuple[str, ...]
    logprobs: tuple[float, ...] = ()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Said)
            and self.texts == other.texts
            and self.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
        )


class CutShort(Exception):
    """An answer that had begun did not end as it should."""


Ask = Callable[[openai.AsyncOpenAI, str, str], Awaitable[Said]]


def messages(prompt: str) -> Any:
    return [{"role": "user", "content": prompt}]


async def chat(client: openai.AsyncOpenAI, model: str, prompt: str) -> Said:
    answer = await client.chat.completions.create(
        model=model, messages=messages(prompt), logprobs=True, top_logprobs=2, **GREEDY
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    return Said(
        answer.model, (choice.message.content or "",), tuple(token.logprob for token in tokens)
    )


async def chat_stream(client: openai.AsyncOpenAI, model: str, prompt: str) -> Said:
    stream = await client.chat.completions.create(
        model=model, messages=messages(prompt), logprobs=True, stream=True, **GREEDY
    )
    text, logprobs, models = "", [], set()
    async for chunk in _whole(stream):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        if choice.logprobs is not None:
            logprobs += [token.logprob for token in choice.logprobs.content or []]
        models.add(chunk.model)
    return Said(models.pop() if len(models) == 1 else f"{models}", (text,), tuple(logprobs))


async def completion(client: openai.AsyncOpenAI, model: str, prompt: str) -> Said:
    answer = await client.completions.create(model=model, prompt=prompt, logprobs=1, **GREEDY)
    return _said(answer)


async def completion_stream(client: openai.AsyncOpenAI, model: str, prompt: str) -> Said:
    stream = await client.completions.create(
        model=model, prompt=prompt, logprobs=1, stream=True, **GREEDY
    )
    text, logprobs, models = "", [], set()
    async for chunk in _whole(stream):
        (choice,) = chunk.choices
        text += choice.text
        logprobs += _numbers(choice)
        models.add(chunk.model)
    return Said(models.pop() if len(models) == 1 else f"{models}", (text,), tuple(logprobs))


async def prompt_array(client: openai.AsyncOpenAI, model: str, prompt: str) -> Said:
    prompts = [prompt, *PROMPTS[:2], prompt[::-1]]
    answer = await client.completions.create(model=model, prompt=prompts, logprobs=1, **GREEDY)
    return _said(answer)


async def next_token(client: openai.AsyncOpenAI, model: str, prompt: str) -> Said:
    """Calls like this are merged."""
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 1, "logprobs": 3}
    return _said(await client.completions.create(model=model, prompt=prompt, **asked))


async def echo(client: openai.AsyncOpenAI, model: str, prompt: str) -> Said:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    return _said(await client.completions.create(model=model, prompt=prompt, **asked))


FORMS: tuple[Ask, ...] = (
    chat,
    chat_stream,
    completion,
    completion_stream,
    prompt_array,
    next_token,
    echo,
)


def _said(answer: openai.types.Completion) -> Said:
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    logprobs = [number for choice in answer.choices for number in _numbers(choice)]
    return Said(answer.model, tuple(choice.text for choice in answer.choices), tuple(logprobs))


def _numbers(choice: Any) -> list[float]:
    """The logprobs of a choice's tokens, each with those of its alternatives."""
    if choice.logprobs is None:
        return []
    rows = zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True)
    return [n for own, top in rows if own is not None for n in (own, *sorted(top.values()))]


async def _whole(stream: Any) -> AsyncIterator[Any]:
    """The chunks of a stream whose head has come."""
    try:
        async for chunk in stream:
            yield chunk
    except (openai.APIError, httpx.HTTPError) as exc:
        raise CutShort(repr(exc)) from exc


# --- the servers, and what is right

Wanted = Mapping[tuple[str, Ask, str], Said]


@pytest.fixture(scope="module")
def wanted(worker_server: ModelServer, adapters: dict[str, Path]) -> Wanted:
    """What the worker answers to each adapter, form and prompt."""
    with httpx.Client(base_url=worker_server.url, timeout=60) as http:
        for name, folder in adapters.items():
            body = {"lora_name": name, "lora_path": str(folder)}
            http.post("/v1/load_lora_adapter", json=body).raise_for_status()
        try:
            return asyncio.run(_ask_worker(worker_server.url, list(adapters)))
        finally:
            for name in adapters:
                http.post("/v1/unload_lora_adapter", json={"lora_name": name})


async def _ask_worker(url: str, names: list[str]) -> Wanted:
    keys = list(itertools.product(names, FORMS, PROMPTS))
    turn = asyncio.Semaphore(AT_ONCE)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", timeout=120) as client:

        async def one(name: str, form: Ask, prompt: str) -> Said:
            async with turn:
                return await form(client, name, prompt)

        said = await asyncio.gather(*(one(*key) for key in keys))
    return dict(zip(keys, said, strict=True))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    # Each vLLM binds its threads to cores it thinks its own: these would be the first one's.
    with run_vllm(tmp_path_factory.mktemp("second")) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(
    vllm_server: ModelServer,
    second: ModelServer,
    adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Gateway]:
    pool = PoolSettings.model_validate(
        {
            "name": "vllm",
            "base_model": demo.BASE_NAME,
            "base_model_path": demo.MODEL_DIR,
            "max_lora_rank": MAX_LORA_RANK,
            "max_loras": SLOTS,
            "max_cpu_loras": 16,
            "replicas": (vllm_server.url, second.url),
        }
    )
    gateway = Gateway(
        Settings(
            data_dir=tmp_path_factory.mktemp("gateway"),
            import_dirs=(demo.MODEL_DIR.parent, next(reversed(adapters.values())).parent),
            pools=(pool,),
            embedded="off",
            health_period_s=0.2,
        )
    )
    try:
        wait_until(gateway.ready)
        for name, folder in adapters.items():
            gateway.register(name, folder)
        yield gateway
    finally:
        gateway.close()


class Clients:
    """Clients of a gateway that hold every answer against what is right.

    `answers` counts right ones by replica. `wrong` are the others, `failed` those that failed
    before their first byte, `cut` those that failed after it.
    """

    def __init__(self, gateway: Gateway, wanted: Wanted) -> None:
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.cut: list[str] = []
        self._wanted = wanted
        self._chance = random.Random(5)
        self._keys = list(wanted)
        http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [self._note]})
        self.client = gateway.async_openai_client(timeout=120, http_client=http)

    async def _note(self, response: httpx.Response) -> None:
        if response.is_success:  # a batch that was split names them all
            self.answers.update(response.headers["x-loragate-replica"].split(","))

    async def ask(self) -> None:
        key = self._chance.choice(self._keys)
        name, form, prompt = key
        about = f"{form.__name__} of {name}: {prompt!r}"
        try:
            said = await form(self.client, name, prompt)
        except CutShort as exc:
            self.cut.append(f"{about}: {exc}")
        except openai.APIError as exc:
            self.failed.append(f"{about}: {exc!r}")
        else:
            if said != self._wanted[key] or said.model != f"{name}@1":
                self.wrong.append(f"{about}: {said}, not {self._wanted[key]}")

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Ask without a pause, so many at once, for the length of a block."""
        over = False

        async def keep_asking() -> None:
            while not over:
                await self.ask()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(keep_asking())
            yield
            over = True


@pytest.fixture
async def clients(gateway: Gateway, wanted: Wanted) -> AsyncIterator[Clients]:
    clients = Clients(gateway, wanted)
    async with clients.client:
        yield clients


# --- the tests


def test_no_two_adapters_say_the_same(adapters: dict[str, Path], wanted: Wanted) -> None:
    """Else a mistake could not be seen."""
    assert len(adapters) == 2 * SLOTS
    same = [
        (form.__name__, prompt, one, other)
        for form, prompt in itertools.product(FORMS, PROMPTS)
        for one, other in itertools.combinations(adapters, 2)
        if wanted[one, form, prompt] == wanted[other, form, prompt]
    ]
    assert same == []


async def test_a_thousand_mixed_requests_get_the_right_weights(
    clients: Clients, gateway: Gateway
) -> None:
    left = iter(range(REQUESTS))

    async def work() -> None:
        for _ in left:
            await clients.ask()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(work())
    assert (clients.wrong, clients.failed, clients.cut) == ([], [], [])
    assert clients.answers.total() >= REQUESTS
    assert len(clients.answers) == 2
    assert min(clients.answers.values()) > REQUESTS / 10


async def test_a_replica_killed_under_load_fails_no_request_that_had_not_begun(
    clients: Clients, gateway: Gateway, second: ModelServer
) -> None:
    """And it comes back and is used again."""
    assert second.process is not None
    id, _ = await _replica(gateway, second)
    try:
        async with clients.asking():
            await until(lambda: _inflight(gateway, second, 4), within_s=60)
            await asyncio.to_thread(second.process.kill)
            before = clients.answers.total()
            await until(lambda: clients.answers.total() > before + 10 * AT_ONCE, within_s=120)
    finally:
        second.process.start()
    assert (clients.wrong, clients.failed) == ([], [])
    assert len(clients.cut) <= AT_ONCE
    await asyncio.to_thread(second.wait_healthy)
    clients.answers.clear()
    clients.cut.clear()
    async with clients.asking():
        await until(lambda: clients.answers[id] > 20, within_s=60)
    assert (clients.wrong, clients.failed, clients.cut) == ([], [], [])


async def _replica(gateway: Gateway, server: ModelServer) -> tuple[str, int]:
    listed = await asyncio.to_thread(gateway.client.get, "/admin/replicas")
    (found,) = [r for r in listed.json()["data"] if r["url"] == server.url]
    return found["id"], found["inflight"]


async def _inflight(gateway: Gateway, server: ModelServer, least: int) -> bool:
    return (await _replica(gateway, server))[1] >= least
