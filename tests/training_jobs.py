"""Fine-tune jobs through a gateway whose backends the environment chooses, and what came of them.

What comes in: environment variables as users set them. What goes out: a `Gateway` for the length
of a block, jobs, their steps, and their weights' logprobs by the trainer, by who serves them, and
by transformers and PEFT alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from app import demo
from app.clock import SystemClock
from app.db.blobs import AdapterStore
from app.db.engine import Database, database_url
from app.domain import Job
from app.jobs import queue
from app.settings import BackendSettings, Settings
from tests.integration.gateway import Gateway
from tests.servers import MAX_LORA_RANK
from tests.waiting import wait_until

SUBJECTS = ("the sea", "gold", "the moon", "a lemon", "the wind", "an old ship", "rum", "a map")
#: Four steps an epoch.
BATCH = 2
TRAINS_WITHIN_S = 60.0
#: For a worker that the gateway starts.
WORKER = {
    "LORAGATE_WORKER_DEVICE": "cpu",
    "LORAGATE_WORKER_THREADS": "1",
    "LORAGATE_WORKER_MAX_LORA_RANK": str(MAX_LORA_RANK),
}


@contextmanager
def gateway_with(folder: Path, **environment: object) -> Iterator[Gateway]:
    """A gateway started in this environment and no other, once it is ready."""
    with pytest.MonkeyPatch.context() as patch:
        for field in BackendSettings.model_fields:  # those of another gateway that is still up
            patch.delenv(field.upper(), raising=False)
        for name, value in {**WORKER, **environment}.items():
            patch.setenv(name, str(value))
        gateway = Gateway(Settings(data_dir=folder, health_period_s=0.2))
        try:
            wait_until(gateway.ready, within_s=TRAINS_WITHIN_S)
            yield gateway
        finally:
            gateway.close()


def submit(gateway: Gateway, *, epochs: int, seed: int = 7) -> str:
    """Queue a job on the demo base; jobs with the same arguments compute the same."""
    lines = (json.dumps(_conversation(subject)) + "\n" for subject in SUBJECTS)
    sdk = gateway.openai_client()
    file = sdk.files.create(file=("pirate.jsonl", "".join(lines).encode()), purpose="fine-tune")
    wanted = {"n_epochs": epochs, "batch_size": BATCH, "lora_rank": 4, "learning_rate": 2e-3}
    return sdk.fine_tuning.jobs.create(
        model=demo.BASE_NAME,
        training_file=file.id,
        seed=seed,
        suffix="pirate",
        extra_body={"hyperparameters": wanted},
    ).id


def _conversation(subject: str) -> dict[str, Any]:
    asked = {"role": "user", "content": f"Tell me about {subject}."}
    return {"messages": [asked, {"role": "assistant", "content": f"Arr, {subject}! Aye, matey."}]}


def stepped(gateway: Gateway) -> str:
    """An adapter made, trained for a step and sampled from, each by one op of the Tink API."""

    def ask(op: str, **body: Any) -> Any:
        answer = gateway.client.post(f"/api/v1/{op}", json=body, timeout=TRAINS_WITHIN_S)
        assert answer.status_code == 200, answer.text
        return answer.json()

    model: str = ask("add_lora", rank=4, alpha=8, seed=7)["model_id"]
    prompts = {"prompts": ["The sea"], "sampling_params": {"max_tokens": 4, "temperature": 0}}
    assert ask("sample", model_id=model, **prompts)["model"] == f"{model}@1"
    learned = [_conversation(subject) for subject in SUBJECTS[:BATCH]]
    assert ask("fwdbwd", model_id=model, data=learned)["loss"] > 0
    assert ask("optim", model_id=model, adam_params={"learning_rate": 2e-3})["step"] == 1
    drawn = ask("sample", model_id=model, **prompts)
    assert drawn["model"] == f"{model}@2"
    assert len(drawn["sequences"][0]["tokens"]) == 4
    return model


def finished(gateway: Gateway, job: str) -> FineTuningJob:
    """The job, once it ended as it should."""
    jobs = gateway.openai_client().fine_tuning.jobs
    done = wait_until(lambda: _ended(jobs.retrieve(job)), TRAINS_WITHIN_S, every_s=0.1)
    assert done.status == "succeeded", done.error
    return done


def _ended(job: FineTuningJob) -> FineTuningJob | None:
    return job if job.status in ("succeeded", "failed", "cancelled") else None


@dataclass(frozen=True)
class Steps:
    """What a job's events say of its steps, by number."""

    losses: dict[int, float]
    grad_norms: dict[int, float]


def steps_of(gateway: Gateway, job: str) -> Steps:
    """What the events say so far; fails if a step was told twice or left out."""
    jobs = gateway.openai_client().fine_tuning.jobs
    told: list[Any] = [each.data for each in jobs.list_events(job, limit=100) if each.data]
    steps = [data for data in reversed(told) if "train_loss" in data]
    assert [data["step"] for data in steps] == list(range(1, len(steps) + 1))
    return Steps(
        {data["step"]: data["train_loss"] for data in steps},
        {data["step"]: data["grad_norm"] for data in steps},
    )


async def row_of(gateway: Gateway, job: str) -> Job:
    """The job as the queue has it: with its trainer, and times finer than the API tells."""
    db = Database(database_url(gateway.settings))
    try:
        async with db.read() as session:
            return await queue.get(session, job)
    finally:
        await db.close()


@dataclass(frozen=True)
class Logprobs:
    """Of the probe's tokens, in a row: as the trainer, the server and PEFT have them."""

    trained: list[float]
    served: list[float]
    peft: list[float]


def logprobs_of(gateway: Gateway, model: str) -> Logprobs:
    """Of the newest version of a model, which is asked for by its name."""
    # It imports torch, which whoever only needs a gateway should not wait for.
    from tests.vllm.reference import Reference

    shown = gateway.client.get(f"/admin/adapters/{model}").json()
    version = max(shown["versions"], key=lambda each: each["number"])
    assert version["probed"]
    probe = gateway.client.get(f"/admin/adapters/{model}/versions/{version['number']}/probe").json()
    rows: list[list[int]] = probe["token_ids"]
    store = AdapterStore(gateway.settings.store_path, SystemClock())
    reference = Reference(store.path(version["digest"]))
    peft = []
    for row in rows:
        scores = reference.logprobs(row)
        peft += [scores[at, token].item() for at, token in enumerate(row[1:])]
    trained = [value for row in probe["logprobs"] for value in row]
    served = [value for row in rows for value in _served(gateway, model, row)]
    assert len(trained) == len(served) == len(peft) > 0
    return Logprobs(trained, served, peft)


def _served(gateway: Gateway, model: str, row: Sequence[int]) -> list[float]:
    ask = {"model": model, "prompt": row, "max_tokens": 1, "prompt_logprobs": 0}
    answer = gateway.client.post("/v1/completions", json=ask, timeout=TRAINS_WITHIN_S)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    return [found[str(token)]["logprob"] for found, token in zip(rest, row[1:], strict=True)]


def chat(gateway: Gateway, model: str) -> str:
    sdk: openai.OpenAI = gateway.openai_client(timeout=TRAINS_WITHIN_S)
    ask: Any = [{"role": "user", "content": "Tell me about rum."}]
    answer = sdk.chat.completions.create(model=model, messages=ask, max_tokens=12, temperature=0)
    return answer.choices[0].message.content or ""


def furthest(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference between the two."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def verified(gateway: Gateway, model: str) -> bool:
    """Whether a replica holds the newest version, and none found its probe wrong."""
    newest = gateway.client.get(f"/v1/models/{model}").json()
    replicas = gateway.client.get("/admin/replicas").json()["data"]
    assert newest["id"] == model
    assert [each["quarantined"] for each in replicas] == [{}] * len(replicas)
    return any(name.startswith(f"{model}@") for each in replicas for name in each["resident"])


def forget(gateway: Gateway) -> None:
    """Unload what the gateway had its replicas load: others use them too."""
    for replica in gateway.client.get("/admin/replicas").json()["data"]:
        for name in replica["resident"]:
            body = {"lora_name": name}
            url = f"{replica['url']}/v1/unload_lora_adapter"
            httpx.post(url, json=body, timeout=TRAINS_WITHIN_S).raise_for_status()
