"""The gateway on PostgreSQL: one database, several gateways, each sees the others' changes."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import Gateway, StartGateway, Workbench
from tests.waiting import wait_until

pytestmark = pytest.mark.postgres


@pytest.fixture
def database_url(new_database: Callable[[str], str]) -> str:
    return new_database("postgresql")


def asked(gateway: Gateway, model: str) -> str:
    body = {"model": model, "prompt": "hi"}
    answer = gateway.client.post("/v1/completions", json=body)
    return str(answer.json().get("model"))


def test_from_registration_to_answer(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench, database_url: str
) -> None:
    gateway = start_gateway(upstream.url, database_url=database_url)
    gateway.register("pirate", workbench.adapter())
    assert asked(gateway, "pirate") == "pirate@1"


def test_an_alias_moved_here_is_moved_there_within_a_second(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench, database_url: str
) -> None:
    one, two = (start_gateway(upstream.url, database_url=database_url) for _ in range(2))
    for _ in range(2):
        one.register("pirate", workbench.adapter())
    one.set_alias("pirate", "prod", version=1)
    wait_until(lambda: asked(two, "pirate:prod") == "pirate@1")
    for version in (2, 1, 2):
        moved = time.monotonic()
        one.set_alias("pirate", "prod", version=version)
        while asked(two, "pirate:prod") != f"pirate@{version}":
            assert time.monotonic() - moved < 1
            time.sleep(0.01)


def test_a_key_revoked_here_is_refused_there(
    start_gateway: StartGateway, upstream: FakeUpstream, database_url: str
) -> None:
    one, two = (start_gateway(upstream.url, database_url=database_url) for _ in range(2))
    one.create_key("admin")
    key = one.create_key("inference")
    headers = {"authorization": f"Bearer {key['secret']}"}

    def accepted() -> bool:
        return two.client.get("/v1/models", headers=headers).status_code == 200

    wait_until(accepted, within_s=1)
    one.client.delete(f"/admin/keys/{key['id']}").raise_for_status()
    wait_until(lambda: not accepted(), within_s=1)


def test_a_database_behind_the_code_is_not_served(
    start_gateway: StartGateway,
    upstream: FakeUpstream,
    request: pytest.FixtureRequest,
) -> None:
    """PostgreSQL is migrated on purpose, by `loragate migrate`, not by whoever starts first."""
    empty = request.getfixturevalue("postgres").create()
    with pytest.raises(RuntimeError, match="did not start"):
        start_gateway(upstream.url, database_url=empty)
    request.getfixturevalue("postgres").drop(empty)
