"""The names of what jobs made: asked for, allowed, deleted."""

from __future__ import annotations

import re

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession

from app.control import adapters
from app.control.fine_tuning import model_name
from app.control.inspect_adapter import AdapterFacts
from app.domain import ADAPTER_NAME
from app.jobs import queue
from tests.integration.fine_tuning import (
    CLOCK,
    create,
    gateway,
    in_queue,
    no_runner,
    sdk,
    tuned,
    worker,
)
from tests.integration.gateway import BASE, Gateway, Workbench
from tests.integration.test_cli import Shell
from tests.waiting import wait_until

__all__ = ["gateway", "no_runner", "sdk", "worker"]


def cancel_all(sdk: openai.OpenAI) -> None:
    for job in sdk.fine_tuning.jobs.list():
        if job.status not in ("cancelled", "succeeded", "failed"):
            sdk.fine_tuning.jobs.cancel(job.id)


def test_every_name_of_a_fine_tuned_model(
    gateway: Gateway, sdk: openai.OpenAI, workbench: Workbench
) -> None:
    model = tuned(gateway, sdk, workbench, suffix="pirate")
    wait_until(lambda: f"{model}:ckpt-step-10" in {each.id for each in sdk.models.list()})
    names = {
        model: f"{model}@2",
        f"{model}@1": f"{model}@1",
        f"{model}:latest": f"{model}@2",
        f"{model}:ckpt-step-10": f"{model}@1",
    }
    assert {each.id for each in sdk.models.list()} == {BASE, f"{model}@2", *names}
    for name, served in names.items():
        assert sdk.models.retrieve(name).id == name
        assert sdk.completions.create(model=name, prompt="hi").model == served
    for wrong in (f"{model}:ckpt-step-11", f"{model}@3", model[:-1]):
        with pytest.raises(openai.NotFoundError, match=re.escape(f"Did you mean '{model}")):
            sdk.completions.create(model=wrong, prompt="hi")
    shown = gateway.client.get(f"/admin/adapters/{model}").json()
    assert (shown["name"], shown["aliases"].keys()) == (model, {"latest", "ckpt-step-10"})


def test_an_allow_list_covers_a_fine_tuned_model(
    gateway: Gateway, sdk: openai.OpenAI, workbench: Workbench
) -> None:
    model = tuned(gateway, sdk, workbench)
    gateway.create_key("admin")
    key = gateway.create_key("inference", models=["ft:tiny:*"])
    with gateway.openai_client(key["secret"]) as client:
        for name in (model, f"{model}@1", f"{model}:ckpt-step-10"):
            client.completions.create(model=name, prompt="hi")
        with pytest.raises(openai.PermissionDeniedError):
            client.completions.create(model=BASE, prompt="hi")


def test_a_model_whose_job_failed_is_its_checkpoints(
    gateway: Gateway, sdk: openai.OpenAI, workbench: Workbench
) -> None:
    """They can be used, the model itself is no name; both are deleted together."""
    made = create(sdk, suffix="pirate")
    job = in_queue(gateway, lambda session: queue.get(session, made.id))
    model = str(job.spec["model"])
    stored = gateway.register("other", workbench.adapter())["version"]

    async def fail(session: AsyncSession) -> None:
        await adapters.register(
            session,
            CLOCK,
            name=model,
            base_model=BASE,
            digest=stored["digest"],
            facts=AdapterFacts(stored["rank"], ("q_proj",), tensors=2, bytes=stored["bytes"]),
            source="test",
            alias="ckpt-step-6",
            move_latest=False,
        )
        await queue.request_cancel(session, CLOCK, job.id)

    in_queue(gateway, fail)
    names = {f"{model}@1", f"{model}:ckpt-step-6"}
    wait_until(lambda: names < {each.id for each in sdk.models.list()})
    assert {each.id for each in sdk.models.list() if each.id.startswith("ft:")} == names
    for name in names:
        assert sdk.completions.create(model=name, prompt="hi").model == f"{model}@1"
    told = re.escape(f"is not finished. There is '{model}:ckpt-step-6'.")
    for call in (
        lambda: sdk.completions.create(model=model, prompt="hi"),
        lambda: sdk.models.retrieve(model),
    ):
        with pytest.raises(openai.NotFoundError, match=told):
            call()
    told = Shell(gateway.url).error("adapters", "probe", model, "--file", "none.json")
    assert f"name one of its versions, {model}@1" in told
    assert sdk.models.delete(model).deleted
    for name in names:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            sdk.models.retrieve(name)


def test_a_model_is_deleted_by_whoever_trained_it(gateway: Gateway, workbench: Workbench) -> None:
    gateway.create_key("admin", "inference")
    keys = [gateway.create_key("training", "inference") for _ in range(2)]
    mine, yours = (gateway.openai_client(key["secret"]) for key in keys)
    model = tuned(gateway, mine, workbench)
    with pytest.raises(openai.ConflictError, match="is queued: cancel it first"):
        mine.models.delete(model)
    cancel_all(mine)
    with pytest.raises(openai.PermissionDeniedError, match="was not made by"):
        yours.models.delete(model)
    for name in (BASE, f"{model}@1", f"{model}:latest"):
        with pytest.raises(openai.PermissionDeniedError, match="was not made by"):
            mine.models.delete(name)
    gone = mine.models.delete(model)
    assert (gone.id, gone.object, gone.deleted) == (model, "model", True)
    for call in (mine.models.retrieve, mine.models.delete):
        with pytest.raises(openai.NotFoundError):
            call(model)
    with pytest.raises(openai.NotFoundError):
        yours.models.delete("ft:tiny::none0000")
    other = tuned(gateway, yours, workbench)
    cancel_all(yours)
    assert gateway.client.delete(f"/v1/models/{other}").json()["deleted"] is True
    assert gateway.client.delete("/v1/models/tiny").status_code == 404


@given(base=st.text(min_size=1, max_size=256), suffix=st.none() | st.from_regex(r"[\w.-]{1,64}"))
def test_every_jobs_model_has_a_name_that_an_adapter_may_have(
    base: str, suffix: str | None
) -> None:
    suffix = None if suffix is None else re.sub(r"[^A-Za-z0-9._-]", "-", suffix)[:64]
    name = model_name(base, suffix)
    assert ADAPTER_NAME.fullmatch(name)
    assert len(name) <= 128
    assert model_name(base, suffix) != name
