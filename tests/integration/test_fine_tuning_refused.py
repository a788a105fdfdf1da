"""What no fine-tuning job can be: a clear error, and nothing in the queue."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs import queue
from app.settings import TrainerSettings
from tests.fakes.upstream import FakeUpstream
from tests.integration.fine_tuning import (
    LINE,
    PAIR,
    TALK,
    Worker,
    create,
    error_of,
    gateway,
    in_queue,
    lines,
    no_runner,
    sdk,
    trainer,
    upload,
    worker,
)
from tests.integration.gateway import BASE, Gateway, StartGateway, Workbench

__all__ = ["gateway", "no_runner", "sdk", "worker"]

BROKEN: list[tuple[bytes, str, int | None]] = [
    (b"", "is empty", None),
    (b"\n\n", "empty", None),
    (lines(LINE) + b"{not json\n" + lines(LINE), "line 2: ", 2),
    (lines(LINE, LINE, {"messages": [{"role": "pirate", "content": "x"}, TALK]}), "'pirate'", 3),
    (lines({"messages": LINE["messages"][:1]}), "'assistant'", 1),
    (lines(LINE, {"prompt": "x", "completion": "y"}), "line 2: ", 2),
    (lines(LINE, {"messages": [LINE["messages"][0], TALK | {"weight": 2}]}), "weight", 2),
    (b"\xff\xfe\n", "line 1: ", 1),
]


@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_a_file_that_cannot_be_trained_on(gateway: Gateway, sdk: openai.OpenAI, field: str) -> None:
    for content, message, line in BROKEN:
        with pytest.raises(openai.BadRequestError) as caught:
            create(sdk, **{field: upload(sdk, content)})
        error = error_of(caught)
        assert (error["code"], error["param"]) == ("invalid_training_file", field)
        assert message in error["message"]
        assert [fault["line"] for fault in error["details"]] == ([] if line is None else [line])
    assert sdk.fine_tuning.jobs.list().data == []


def test_conversations_are_not_preferences(sdk: openai.OpenAI) -> None:
    method: Any = {"type": "dpo"}
    with pytest.raises(openai.BadRequestError, match="line 1: "):
        create(sdk, method=method)
    with pytest.raises(openai.BadRequestError, match="line 1: "):
        create(sdk, training_file=upload(sdk, lines(PAIR)))


REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "tini"}, 404, "model_not_found", "Did you mean 'tiny'"),
    ({"training_file": "file-nope"}, 400, "invalid_request", "no file 'file-nope'"),
    ({"validation_file": "file-nope"}, 400, "invalid_request", "no file 'file-nope'"),
    ({"suffix": "ahoi!"}, 400, "invalid_request", "suffix is 1 to 64"),
    ({"suffix": "a" * 65}, 400, "invalid_request", "suffix is 1 to 64"),
    ({"seed": -1}, 400, "invalid_request", "seed"),
    ({"seed": 1 << 31}, 400, "invalid_request", "seed"),
    ({"integrations": [{"type": "wandb"}]}, 400, "invalid_request", "integrations are not"),
    ({"metadata": {str(n): "x" for n in range(17)}}, 400, "invalid_request", "16 pairs"),
    ({"metadata": {"k": "x" * 513}}, 400, "invalid_request", "16 pairs"),
    ({"method": {"type": "reinforcement"}}, 400, "invalid_request", "'reinforcement' is not"),
    ({"method": {"type": "magic"}}, 400, "invalid_request", "method.type"),
    ({"method": {"type": "dpo", "supervised": {}}}, 400, "invalid_request", "another has"),
    ({"hyperparameters": {"n_epochs": 0}}, 400, "invalid_request", "n_epochs"),
    ({"hyperparameters": {"n_epochs": "many"}}, 400, "invalid_request", "n_epochs"),
    ({"hyperparameters": {"beta": 0.1}}, 400, "invalid_request", "beta is for"),
    ({"hyperparameters": {"learning_rate": -1}}, 400, "invalid_request", "learning_rate"),
    ({"hyperparameters": {"lora_rank": 13}}, 400, "invalid_request", "at most 12"),
    ({"hyperparameters": {"max_length": 513}}, 400, "invalid_request", "has 512 tokens"),
    ({"hyperparameters": {"target_modules": ["x"]}}, 400, "invalid_request", "'x'; the base has q"),
    ({"hyperparameters": {"colour": 1}}, 400, "invalid_request", "colour"),
    ({"extra_body": {"priority": 11}}, 400, "invalid_request", "priority"),
    ({"extra_body": {"colour": "red"}}, 400, "invalid_request", "colour"),
    (
        {
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
            "hyperparameters": {"n_epochs": 2},
        },
        400,
        "invalid_request",
        "n_epochs is given twice",
    ),
]


def test_what_no_job_can_be(gateway: Gateway, sdk: openai.OpenAI) -> None:
    file = upload(sdk, lines(LINE))
    for fields, status, code, message in REFUSED:
        with pytest.raises(openai.APIStatusError) as caught:
            create(sdk, **{"training_file": file} | fields)
        error = error_of(caught)
        assert (caught.value.status_code, error["code"]) == (status, code), error
        assert message in error["message"]
    batch = upload(sdk, lines(LINE), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="uploaded for 'batch'"):
        create(sdk, training_file=batch)
    assert sdk.fine_tuning.jobs.list().data == []


@pytest.mark.parametrize("text", ["a\0", "\ud800"])
def test_what_a_database_cannot_look_into(gateway: Gateway, sdk: openai.OpenAI, text: str) -> None:
    known = {"model": BASE, "training_file": upload(sdk, lines(LINE))}
    for wrong in (
        {"metadata": {"team": text}},
        {"metadata": {text: "sea"}},
        {"hyperparameters": {"target_modules": [text]}},
        {"suffix": text},
        {"training_file": text},
    ):
        content = json.dumps(known | wrong).encode()
        answer = gateway.client.post("/v1/fine_tuning/jobs", content=content)
        assert answer.status_code == 400, answer.text
    query = {"metadata[team]": text.encode(errors="surrogatepass")}
    answer = gateway.client.get("/v1/fine_tuning/jobs", params=query)
    assert answer.status_code in (200, 400), answer.text


def test_a_rank_over_what_the_pool_serves(
    start_gateway: StartGateway, upstream: FakeUpstream, worker: Worker
) -> None:
    gateway = start_gateway(upstream.url, trainers=(trainer(url=worker.url),), max_lora_rank=4)
    sdk = gateway.openai_client()
    with pytest.raises(openai.BadRequestError, match="at most 4, which is what its pool serves"):
        create(sdk, extra_body={"hyperparameters": {"lora_rank": 8}})
    assert (create(sdk).hyperparameters.model_extra or {})["lora_rank"] == 4


def test_a_trainer_that_is_away_is_queued_for(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    gateway = start_gateway(upstream.url, trainers=(trainer(),))
    job = create(gateway.openai_client(), extra_body={"hyperparameters": {"lora_rank": 16}})
    assert job.status == "queued"


def test_a_base_that_nobody_trains(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    gateway = start_gateway(upstream.url, trainers=(trainer(base_model="other"),))
    sdk = gateway.openai_client()
    with pytest.raises(openai.BadRequestError, match="Trained here: 'other'") as caught:
        create(sdk)
    assert error_of(caught)["code"] == "model_not_trainable"
    gateway.register("pirate", workbench.adapter())
    with pytest.raises(openai.BadRequestError, match="adapter of 'tiny': name that base"):
        create(sdk, model="pirate")


def test_the_trainer_with_the_least_to_do(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    wanted = (trainer("one", max_jobs=1), trainer("three", max_jobs=3))
    gateway = start_gateway(upstream.url, trainers=wanted)
    sdk = gateway.openai_client()
    file = upload(sdk, lines(LINE))
    made = [create(sdk, training_file=file).id for _ in range(4)]

    async def given(session: AsyncSession) -> list[tuple[str | None, str | None]]:
        found = [await queue.get(session, job) for job in made]
        return [(job.trainer, job.lock) for job in found]

    assert in_queue(gateway, given) == [
        ("one", "trainer:one"),
        *[("three", None)] * 3,
    ]


@pytest.mark.parametrize(
    "wanted",
    [
        (trainer(), trainer()),
        (trainer(kind="megatron", max_jobs=2),),
    ],
)
def test_trainers_that_cannot_be(
    start_gateway: StartGateway, upstream: FakeUpstream, wanted: tuple[TrainerSettings, ...]
) -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        start_gateway(upstream.url, trainers=wanted)


def test_as_many_jobs_as_a_key_may_have(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    gateway = start_gateway(upstream.url, trainers=(trainer(),), max_queued_jobs=2)
    sdk = gateway.openai_client()
    file = upload(sdk, lines(LINE))
    first, _ = (create(sdk, training_file=file).id for _ in range(2))
    with pytest.raises(openai.ConflictError, match="has 2 jobs waiting") as caught:
        create(sdk, training_file=file)
    assert error_of(caught)["code"] == "too_many_jobs"
    sdk.fine_tuning.jobs.cancel(first)
    create(sdk, training_file=file)


def test_a_file_deleted_before_and_after(gateway: Gateway, sdk: openai.OpenAI) -> None:
    file = upload(sdk, lines(LINE))
    job = create(sdk, training_file=file)
    sdk.files.delete(file)
    assert sdk.fine_tuning.jobs.retrieve(job.id).training_file == file
    with pytest.raises(openai.BadRequestError, match="There is no file"):
        create(sdk, training_file=file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
FIELDS = (
    *("model", "training_file", "validation_file", "method", "hyperparameters", "suffix"),
    *("seed", "integrations", "metadata", "priority"),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON) | JSON)
def test_any_body_is_answered(gateway: Gateway, body: Any) -> None:
    known = {"model": BASE, "training_file": "file-nope"}
    body = known | body if isinstance(body, dict) else body
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    answer = gateway.client.post("/v1/fine_tuning/jobs", content=content, headers=headers)
    assert answer.status_code in (400, 403, 404), answer.text
    assert answer.json()["error"]["message"]
