"""Versions change under load: no request notices, and what is left behind goes."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import openai
import pytest

from tests.acceptance.conftest import Serve, Served
from tests.acceptance.crowd import Answer, Connection, crowd
from tests.fakes.adapters import write_adapter
from tests.fakes.faults import Stall
from tests.fakes.upstream import FakeUpstream
from tests.waiting import until, wait_until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
PROD = "bot:prod"

REPLICAS = 3
FLIPS = 1000
#: Every so many flips a new version is registered.
REGISTER_EVERY = 50
#: The alias flips among the newest so many versions.
AMONG = 5


@pytest.fixture
def upstreams() -> Iterator[list[FakeUpstream]]:
    started = [FakeUpstream() for _ in range(REPLICAS)]
    yield started
    for upstream in started:
        upstream.close()
    assert [problem for upstream in started for problem in upstream.problems] == []


@dataclass
class Registry:
    """An adapter `bot` behind a gateway, over the admin API."""

    admin: httpx.AsyncClient
    folder: Path
    digests: dict[int, str] = field(default_factory=dict)

    async def register(self) -> int:
        """The next version; it is served when this returns."""
        number = len(self.digests) + 1
        folder = write_adapter(self.folder / str(number), seed=number)
        body = {"source": {"path": str(folder)}}
        if number == 1:
            answer = await self.admin.post("/admin/adapters", json={"name": "bot"} | body)
        else:
            answer = await self.admin.post("/admin/adapters/bot/versions", json=body)
        assert answer.status_code == 201, answer.text
        version = answer.json()["version"]
        assert version["number"] == number
        self.digests[number] = version["digest"]
        return number

    async def point(self, **target: Any) -> dict[str, Any]:
        """Move `prod`; what is asked for after this gets the new target."""
        answer = await self.admin.put("/admin/adapters/bot/aliases/prod", json=target)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest.fixture
def served(serve: Serve, upstreams: list[FakeUpstream]) -> Served:
    pool = {
        "name": "pool",
        "base_model": "tiny",
        "max_lora_rank": 16,
        "replicas": [upstream.url for upstream in upstreams],
    }
    gateway = serve(
        pools=[pool],
        embedded="off",
        unload_grace_s=0.3,
        reap_period_s=0.2,
        reap_grace_s=0.5,
        health_period_s=0.2,
    )
    gateway.start()
    listed = f"{gateway.url}/admin/replicas"

    def all_healthy() -> bool:
        states = [replica["state"] for replica in httpx.get(listed).json()["data"]]
        return states == ["healthy"] * REPLICAS

    wait_until(all_healthy)
    return gateway


@pytest.fixture
async def registry(served: Served, tmp_path: Path) -> AsyncIterator[Registry]:
    async with httpx.AsyncClient(base_url=served.url, timeout=30) as admin:
        yield Registry(admin, tmp_path / "adapters")


# --- a thousand flips


@dataclass(frozen=True)
class Flip:
    """The alias came to `version` at some time between these two."""

    version: str
    began_at: float
    ended_at: float


@dataclass(frozen=True)
class Heard:
    """One answer: whose it was, and between which times it was decided whose it is."""

    version: str
    sent_at: float
    began_at: float


def right_at(flips: list[Flip], sent_at: float, began_at: float) -> set[str]:
    """The versions that a request may have got: those the alias may have had meanwhile."""
    left_at = [flip.ended_at for flip in flips[1:]] + [float("inf")]
    return {
        flip.version
        for flip, left in zip(flips, left_at, strict=True)
        if flip.began_at <= began_at and left >= sent_at
    }


def test_what_may_be_heard_during_flips() -> None:
    flips = [Flip("a", 0, 1), Flip("b", 5, 6), Flip("c", 9, 10)]
    assert right_at(flips, 2, 4) == {"a"}
    assert right_at(flips, 2, 5.5) == {"a", "b"}
    assert right_at(flips, 5.5, 8) == {"a", "b"}
    assert right_at(flips, 7, 8) == {"b"}
    assert right_at(flips, 4, 9) == {"a", "b", "c"}
    assert right_at(flips, 11, 12) == {"c"}


def _whole(answer: Answer) -> str:
    """Which version an answer is from; all of it must be from one."""
    assert answer.status == 200, bytes(answer.body)
    return answer.version


async def ask_chat(connection: Connection, prompt: str) -> Heard:
    messages = [{"role": "user", "content": prompt}]
    answer = await connection.post(CHAT, {"model": PROD, "messages": messages})
    version = _whole(answer)
    found = answer.json()
    assert found["model"] == version
    assert found["choices"][0]["message"]["content"] == f"{version} heard: {prompt}"
    return Heard(version, answer.sent_at, answer.began_at)


async def ask_chat_stream(connection: Connection, prompt: str) -> Heard:
    messages = [{"role": "user", "content": prompt}]
    body = {"model": PROD, "messages": messages, "stream": True}
    answer = await connection.post(CHAT, body)
    version = _whole(answer)
    events = answer.events()
    assert {event["model"] for event in events} == {version}
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == f"{version} heard: {prompt}"
    return Heard(version, answer.sent_at, answer.began_at)


async def ask_batch(connection: Connection, prompt: str) -> Heard:
    """A batch is spread over the replicas; its parts must not be of different versions."""
    prompts = [f"{prompt} {n}" for n in range(6)]
    answer = await connection.post(COMPLETIONS, {"model": PROD, "prompt": prompts})
    version = _whole(answer)
    found = answer.json()
    assert found["model"] == version
    texts = [choice["text"] for choice in found["choices"]]
    assert texts == [f"{version} heard: {one}" for one in prompts]
    return Heard(version, answer.sent_at, answer.began_at)


async def ask_score(connection: Connection, prompt: str) -> Heard:
    """Calls like this are merged; those of different versions must not be."""
    body = {"model": PROD, "prompt": prompt, "max_tokens": 1, "logprobs": 1, "temperature": 0}
    answer = await connection.post(COMPLETIONS, body)
    version = _whole(answer)
    found = answer.json()
    assert (found["model"], found["choices"][0]["text"]) == (version, f"{version} ")
    return Heard(version, answer.sent_at, answer.began_at)


async def ask_as_users_do(client: openai.AsyncOpenAI, prompt: str) -> Heard:
    sent_at = monotonic()
    raw = await client.chat.completions.with_raw_response.create(
        model=PROD, messages=[{"role": "user", "content": prompt}]
    )
    began_at = monotonic()
    version = raw.headers["x-loragate-adapter-version"]
    found = raw.parse()
    assert (found.model, found.choices[0].message.content) == (
        version,
        f"{version} heard: {prompt}",
    )
    return Heard(version, sent_at, began_at)


FORMS: list[Callable[[Connection, str], Any]] = [ask_chat, ask_chat_stream, ask_batch, ask_score]


class Load:
    """Clients that ask whenever a flip begins or ends, until they are told to stop.

    So requests are sent just before, during and just after a flip, and are under way in the next
    one, however fast the machine is. `heard` is what they got.
    """

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.stopped = False
        self._turn = asyncio.Event()

    def go(self) -> None:
        """Let everyone who waits ask once more."""
        self._turn.set()
        self._turn = asyncio.Event()

    def stop(self) -> None:
        self.stopped = True
        self.go()

    async def keep_asking(self, ask: Callable[[str], Any], name: str, every: int = 1) -> None:
        """Ask at one turn of `every`."""
        for n in itertools.count():
            await self._turn.wait()
            if self.stopped:
                return
            if n % every == 0:
                self.heard.append(await ask(f"{name} {n}"))


def in_all_forms(connection: Connection) -> Callable[[str], Any]:
    forms = itertools.cycle(FORMS)
    return lambda prompt: next(forms)(connection, prompt)


async def flip(registry: Registry, load: Load) -> list[Flip]:
    """Flip the alias among the newest versions, while new ones come and clients ask."""
    chance = random.Random(7)
    at = max(registry.digests)
    flips = [Flip(f"bot@{at}", 0.0, 0.0)]
    for n in range(FLIPS):
        if n % REGISTER_EVERY == 0:
            await registry.register()
        newest = max(registry.digests)
        choices = range(max(1, newest - AMONG + 1), newest + 1)
        at = chance.choice([number for number in choices if number != at])
        load.go()
        began_at = monotonic()
        await registry.point(version=at)
        flips.append(Flip(f"bot@{at}", began_at, monotonic()))
        load.go()
    load.stop()
    return flips


@pytest.mark.timeout(300)
async def test_a_thousand_flips_under_load(
    served: Served, registry: Registry, upstreams: list[FakeUpstream]
) -> None:
    await registry.register()
    await registry.point(version=await registry.register())
    load = Load()
    users = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)
    async with users, crowd(served.port, 4) as connections, asyncio.TaskGroup() as tasks:
        for n, connection in enumerate(connections):
            tasks.create_task(load.keep_asking(in_all_forms(connection), f"client {n}"))
        tasks.create_task(load.keep_asking(partial(ask_as_users_do, users), "user", every=10))
        flipping = tasks.create_task(flip(registry, load))
    flips = flipping.result()

    assert len(flips) == FLIPS + 1
    assert len(load.heard) > FLIPS
    rights = [right_at(flips, heard.sent_at, heard.began_at) for heard in load.heard]
    wrong = [
        pair for pair in zip(load.heard, rights, strict=True) if pair[0].version not in pair[1]
    ]
    assert wrong == []
    choices = Counter(map(len, rights))
    assert sum(count for among, count in choices.items() if among < AMONG - 1) > FLIPS / 2
    assert choices.total() - choices[1] > FLIPS / 2, "many must have been under way in a flip"
    assert len({heard.version for heard in load.heard}) > FLIPS / REGISTER_EVERY

    await _only_aliased_are_loaded(registry, upstreams, flips[-1].version)
    await _files_of_deleted_versions_go(served, registry, flips[-1].version)
    _nothing_was_loaded_from_other_files(registry, upstreams)
    assert '"level":"ERROR"' not in served.process.output().replace(" ", "")


async def _only_aliased_are_loaded(
    registry: Registry, upstreams: list[FakeUpstream], prod: str
) -> None:
    wanted = {prod, f"bot@{max(registry.digests)}"}
    await until(
        lambda: all(upstream.engine.adapters.keys() <= wanted for upstream in upstreams),
        within_s=10,
    )
    replicas = (await registry.admin.get("/admin/replicas")).json()["data"]
    by_url = {upstream.url: sorted(upstream.engine.adapters) for upstream in upstreams}
    assert {replica["url"]: replica["resident"] for replica in replicas} == by_url
    assert any(prod in loaded for loaded in by_url.values())


async def _files_of_deleted_versions_go(served: Served, registry: Registry, prod: str) -> None:
    newest = max(registry.digests)
    for number in registry.digests:
        if number != newest and f"bot@{number}" != prod:
            url = f"/admin/adapters/bot/versions/{number}"
            (await registry.admin.delete(url)).raise_for_status()
    kept = {registry.digests[newest], registry.digests[int(prod.partition("@")[2])]}
    store = served.data_dir / "store"
    await until(
        lambda: {path.parent.name for path in store.glob("*/*/adapter_config.json")} == kept,
        within_s=10,
    )


def _nothing_was_loaded_from_other_files(registry: Registry, upstreams: list[FakeUpstream]) -> None:
    loads = [load.json for upstream in upstreams for load in upstream.loads()]
    assert loads
    for load in loads:
        number = int(load["lora_name"].removeprefix("bot@"))
        assert load["lora_path"].endswith(f"/{registry.digests[number]}")


# --- a crash in between


def test_a_gateway_killed_before_the_release_heals_when_the_weights_come_again(
    served: Served, upstreams: list[FakeUpstream], tmp_path: Path
) -> None:
    first, second = (write_adapter(tmp_path / "adapters" / f"{n}", seed=n) for n in (1, 2))
    served.register("bot", first)

    def heard() -> str:
        body = {"model": "bot", "prompt": "hi"}
        answer = httpx.post(f"{served.url}{COMPLETIONS}", json=body).raise_for_status()
        return answer.headers["x-loragate-adapter-version"]

    def register_second() -> httpx.Response:
        url = f"{served.url}/admin/adapters/bot/versions"
        return httpx.post(url, json={"source": {"path": str(second)}}, timeout=30)

    assert heard() == "bot@1"
    (home,) = [upstream for upstream in upstreams if upstream.loads()]
    stall = Stall()
    home.script("/v1/load_lora_adapter", stall)
    with ThreadPoolExecutor(1) as threads:
        registering = threads.submit(register_second)
        assert stall.reached.wait(10)
        served.process.kill()
        stall.release()
        assert isinstance(registering.exception(), httpx.TransportError)
    served.start()
    assert heard() == "bot@1"
    shown = httpx.get(f"{served.url}/admin/adapters/bot").json()
    assert [version["number"] for version in shown["versions"]] == [1, 2]
    again = register_second()
    assert again.status_code == 200, again.text
    assert again.json()["created"] is False
    assert heard() == "bot@2"


# --- canaries

CANARY = [{"version": 1, "weight": 90}, {"version": 2, "weight": 10}]
REQUESTS = 20_000
#: Of the share. A fair draw of so many requests is off by more once in 400,000 times.
WITHIN = 0.01


async def ask_all(
    port: int, requests: Iterable[tuple[dict[str, Any], dict[str, str]]]
) -> list[str]:
    """Which version answered each request, given as what to add to its body and its headers."""
    queue = list(enumerate(requests))
    answers = [""] * len(queue)

    async def work(connection: Connection) -> None:
        while queue:
            n, (fields, headers) = queue.pop()
            body = {"model": PROD, "prompt": "hi", "max_tokens": 2, **fields}
            answers[n] = _whole(await connection.post(COMPLETIONS, body, **headers))

    async with crowd(port, 16) as connections, asyncio.TaskGroup() as tasks:
        for connection in connections:
            tasks.create_task(work(connection))
    return answers


@pytest.fixture
async def canary(registry: Registry) -> AsyncIterator[Registry]:
    """bot@1 with nine tenths of `bot:prod`, bot@2 with one."""
    await registry.register()
    await registry.register()
    await registry.point(targets=CANARY)
    yield registry  # noqa: PT022  # the hook that awaits fixtures awaits generators


def share(answers: list[str]) -> float:
    counts = Counter(answers)
    assert counts.keys() <= {"bot@1", "bot@2"}
    return counts["bot@2"] / len(answers)


async def test_a_canary_gets_its_share_of_the_users(served: Served, canary: Registry) -> None:
    """And a user keeps a version, except those that the growing canary takes."""
    users = [({"user": f"user-{n}"}, {}) for n in range(REQUESTS)]
    answers = await ask_all(served.port, users)
    assert abs(share(answers) - 0.1) < WITHIN
    some = range(0, REQUESTS, 20)
    again = await ask_all(served.port, [users[n] for n in some])
    assert again == [answers[n] for n in some]
    grown = [{"version": 1, "weight": 80}, {"version": 2, "weight": 20}]
    await canary.point(targets=grown)
    moved = Counter(
        (answers[n], now)
        for n, now in zip(some, await ask_all(served.port, [users[n] for n in some]), strict=True)
    )
    assert moved["bot@2", "bot@1"] == 0
    assert abs(moved["bot@1", "bot@2"] / len(some) - 0.1) < 0.05


async def test_a_canary_gets_its_share_of_requests_that_name_nobody(
    served: Served, canary: Registry
) -> None:
    answers = await ask_all(served.port, [({}, {})] * REQUESTS)
    assert abs(share(answers) - 0.1) < WITHIN


async def test_a_session_keeps_its_version(served: Served, canary: Registry) -> None:
    """Whatever user it names, as conversations have one session and gateways one user."""
    requests = [
        ({"user": f"user-{n}-{turn}"}, {"x_session_id": f"session-{n}"})
        for turn in range(4)
        for n in range(300)
    ]
    answers = await ask_all(served.port, requests)
    assert answers[:300] * 4 == answers
    assert {"bot@1", "bot@2"} == set(answers)


async def test_a_key_keeps_its_version_if_the_alias_says_so(
    served: Served, canary: Registry
) -> None:
    secrets = []
    for n in range(40):
        scopes = ["inference"] if n else ["admin", "inference"]
        made = await canary.admin.post("/admin/keys", json={"name": f"{n}", "scopes": scopes})
        assert made.status_code == 201, made.text
        secrets.append(made.json()["secret"])
        canary.admin.headers["authorization"] = f"Bearer {secrets[0]}"
    halves = [{"version": 1, "weight": 1}, {"version": 2, "weight": 1}]
    await canary.point(targets=halves, sticky="key")
    requests = [
        ({"user": f"user-{turn}"}, {"authorization": f"Bearer {secret}"})
        for turn in range(5)
        for secret in secrets
    ]
    answers = await ask_all(served.port, requests)
    assert answers[:40] * 5 == answers
    assert {"bot@1", "bot@2"} == set(answers)
    await canary.point(targets=halves, sticky="none")
    answers = await ask_all(served.port, requests)
    assert answers[:40] * 5 != answers
