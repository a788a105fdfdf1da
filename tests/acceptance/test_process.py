"""The gateway as a process: starting, ending, its memory, and a second one beside it."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.acceptance.conftest import Serve, Served
from tests.fakes.adapters import write_adapter
from tests.fakes.faults import Flood, Stall
from tests.fakes.upstream import FakeUpstream
from tests.integration.wire import Wire
from tests.waiting import wait_until

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
ASK: Any = [{"role": "user", "content": "one two three"}]
MIB = 1 << 20
#: After a clean shutdown uvicorn ends by the signal it was sent, as a shell expects.
ENDED = (0, -signal.SIGTERM)


def test_sigterm_lets_a_stream_finish(
    serve: Serve, upstream: FakeUpstream, pool: dict[str, Any]
) -> None:
    served = serve(**pool)
    served.start()
    stall = Stall(after=2)
    upstream.script(CHAT, stall)
    with (
        served.openai_client() as client,
        ThreadPoolExecutor(1) as threads,
        client.chat.completions.create(model="tiny", messages=ASK, stream=True) as stream,
    ):
        assert stall.reached.wait(10)
        ending = threads.submit(served.process.terminate)
        wait_until(lambda: not _answers(served))
        stall.release()
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == "tiny heard: one two three"
        assert ending.result() in ENDED


def test_sigterm_does_not_wait_for_ever(
    serve: Serve, upstream: FakeUpstream, pool: dict[str, Any]
) -> None:
    served = serve(**pool, drain_timeout_s=1)
    served.start()
    stall = Stall(after=2)
    upstream.script(CHAT, stall)
    with (
        served.openai_client() as client,
        client.chat.completions.create(model="tiny", messages=ASK, stream=True),
    ):
        assert stall.reached.wait(10)
        began = time.monotonic()
        served.process.terminate()
        assert time.monotonic() - began < 15


def test_sigterm_of_an_idle_gateway_is_quick(
    serve: Serve, pool: dict[str, Any], upstream: FakeUpstream
) -> None:
    served = serve(**pool)
    served.start()
    with served.client() as kept_open:
        kept_open.get("/healthz")
        began = time.monotonic()
        assert served.process.terminate() in ENDED
        assert time.monotonic() - began < 5
    assert "Traceback" not in served.process.output()


def test_no_keys_no_public_address(serve: Serve, pool: dict[str, Any]) -> None:
    served = serve(**pool, host="0.0.0.0")
    served.process.start()
    assert served.process.wait() != 0
    output = served.process.output()
    assert "key" in output
    assert "Traceback" not in output


def test_a_public_address_with_an_admin_key(
    serve: Serve, pool: dict[str, Any], upstream: FakeUpstream
) -> None:
    served = serve(**pool, host="0.0.0.0", admin_key="first-of-all")
    served.start()
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    headers = {"authorization": "Bearer first-of-all"}
    assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code == 200


def test_settings_that_make_no_sense_are_named(serve: Serve) -> None:
    served = serve(pools="not json")
    served.process.start()
    assert served.process.wait() != 0
    assert "pools" in served.process.output().lower()
    assert "Traceback" not in served.process.output()


def test_a_port_in_use_is_named(serve: Serve, upstream: FakeUpstream, pool: dict[str, Any]) -> None:
    served = serve(**pool, port=upstream.port)
    served.process.start()
    assert served.process.wait() != 0
    assert str(upstream.port) in served.process.output()


def test_a_restart_remembers(
    serve: Serve, upstream: FakeUpstream, pool: dict[str, Any], tmp_path: Path
) -> None:
    served = serve(**pool)
    served.start()
    served.register("pirate", write_adapter(tmp_path / "pirate"))
    assert served.process.terminate() in ENDED
    served.start()
    with served.openai_client() as client:
        answer = client.completions.create(model="pirate", prompt="hi")
    assert answer.choices[0].text == "pirate@1 heard: hi"


def test_a_second_gateway_on_the_same_database(
    serve: Serve, upstream: FakeUpstream, pool: dict[str, Any], tmp_path: Path
) -> None:
    one, two = serve(**pool), serve(**pool)
    one.start()
    two.start()
    for seed in (1, 2):
        source = {"source": {"path": str(write_adapter(tmp_path / str(seed), seed=seed))}}
        path, body = ("", {"name": "pirate"}) if seed == 1 else ("/pirate/versions", {})
        answer = httpx.post(f"{one.url}/admin/adapters{path}", json=source | body)
        assert answer.status_code == 201, answer.text
    wait_until(lambda: httpx.get(f"{two.url}/v1/models/pirate@2").status_code == 200, within_s=2)
    for version in (1, 2):
        path = f"{one.url}/admin/adapters/pirate/aliases/prod"
        httpx.put(path, json={"version": version}).raise_for_status()
        wait_until(lambda v=version: _model_of(two, "pirate:prod") == f"pirate@{v}", within_s=2)  # type: ignore[misc]


def test_an_alias_moves_under_load_without_an_error(
    serve: Serve, upstream: FakeUpstream, pool: dict[str, Any], tmp_path: Path
) -> None:
    served = serve(**pool)
    served.start()
    served.register("pirate", write_adapter(tmp_path / "1", seed=1))
    body = {"source": {"path": str(write_adapter(tmp_path / "2", seed=2))}}
    with served.client() as admin:
        admin.post("/admin/adapters/pirate/versions", json=body).raise_for_status()
        alias = "/admin/adapters/pirate/aliases/prod"
        admin.put(alias, json={"version": 1}).raise_for_status()
        wait_until(lambda: admin.get("/v1/models/pirate:prod").status_code == 200)
        stop = threading.Event()
        answers: list[tuple[int, str]] = []

        def ask() -> None:
            with served.client() as client:
                while not stop.is_set():
                    payload = {"model": "pirate:prod", "prompt": "hi"}
                    answer = client.post(COMPLETIONS, json=payload)
                    answers.append((answer.status_code, answer.json().get("model", "")))

        with ThreadPoolExecutor(4) as threads:
            asking = [threads.submit(ask) for _ in range(4)]
            for move in range(10):
                version = 2 - move % 2
                admin.put(alias, json={"version": version}).raise_for_status()
                wait_until(lambda v=version: answers and answers[-1][1] == f"pirate@{v}")  # type: ignore[misc]
            stop.set()
            for asked in asking:
                asked.result()
    assert {status for status, _ in answers} == {200}
    assert {model for _, model in answers} == {"pirate@1", "pirate@2"}


def test_slow_readers_cost_no_more_than_promised(
    serve: Serve, upstream: FakeUpstream, pool: dict[str, Any]
) -> None:
    """Eight clients stop reading 200 MB each: at most 1 MiB a stream stays in the gateway."""
    served = serve(**pool)
    served.start()
    count = 8
    payload = {"model": "tiny", "messages": ASK, "stream": True}
    with served.client() as client:
        for _ in range(50):
            client.post(CHAT, json=payload)
    before = served.process.resident_bytes()
    upstream.script(CHAT, *[Flood(200 * 10**6) for _ in range(count)])
    port = int(served.url.rpartition(":")[2])
    wires = [Wire(port, receive_buffer=4096) for _ in range(count)]
    try:
        for wire in wires:
            wire.start(CHAT, payload)
            assert wire.head()[0] == 200
        floods = upstream.requests(CHAT)[-count:]
        pushed = [-1]

        def settled() -> bool:
            now = sum(seen.bytes_sent for seen in floods)
            same, pushed[0] = now == pushed[0], now
            return same and now > 0

        wait_until(settled, within_s=20, every_s=0.3)
        assert not any(seen.finished for seen in floods)
        assert served.process.resident_bytes() - before < count * MIB
    finally:
        for wire in wires:
            wire.reset()
    wait_until(lambda: all(seen.cancelled for seen in floods))


def _answers(served: Served) -> bool:
    try:
        return httpx.get(f"{served.url}/readyz", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def _model_of(served: Served, model: str) -> str:
    payload = {"model": model, "prompt": "hi"}
    answer = httpx.post(f"{served.url}{COMPLETIONS}", json=payload)
    return str(answer.json().get("model"))


def test_the_library_s_errors_from_a_gateway_that_is_gone(
    serve: Serve, upstream: FakeUpstream, pool: dict[str, Any]
) -> None:
    served = serve(**pool)
    served.start()
    stall = Stall(after=2)
    upstream.script(CHAT, stall)
    raised: list[BaseException] = []
    with (
        served.openai_client() as client,
        client.chat.completions.create(model="tiny", messages=ASK, stream=True) as stream,
    ):
        assert stall.reached.wait(10)
        served.process.kill()
        try:
            list(stream)
        except (openai.APIError, Exception) as exc:  # noqa: BLE001
            raised.append(exc)
    assert raised, "a stream whose gateway was killed must not look complete"
    (seen,) = upstream.requests(CHAT)
    wait_until(lambda: seen.cancelled)
