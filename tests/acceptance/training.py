"""What the tests of training as users see it share: examples, jobs, and proof of what came of them.

What comes in: a gateway in a process of its own. What goes out: calls of the real client.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
from openai.types.fine_tuning import FineTuningJob

from app import demo
from app.db.blobs import AdapterStore
from app.domain import Probe
from app.serving.verify import compare
from app.settings import Settings
from tests.acceptance.conftest import Served
from tests.acceptance.readme import ROOT
from tests.waiting import wait_until

PARROT = ROOT / "examples" / "parrot.jsonl"
HELD_OUT = ROOT / "examples" / "parrot-held-out.jsonl"
ENDED = ("succeeded", "failed", "cancelled")
SEED = 7


def examples(count: int) -> bytes:
    """The first so many of the parrot's."""
    return b"".join(PARROT.read_bytes().splitlines(keepends=True)[:count])


def submit(client: openai.OpenAI, content: bytes, **fields: Any) -> str:
    """Upload examples and queue a job on the demo's base."""
    file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    hyperparameters = fields.pop("hyperparameters", {})
    body: dict[str, Any] = {
        "model": demo.BASE_NAME,
        "training_file": file.id,
        "seed": SEED,
    } | fields
    extra = {"hyperparameters": hyperparameters}
    return client.fine_tuning.jobs.create(**body, extra_body=extra).id


def ended(client: openai.OpenAI, job: str, within_s: float = 100) -> FineTuningJob:
    """The job as it ended. A gateway that does not answer now is asked again."""

    def look() -> FineTuningJob | None:
        try:
            found = client.fine_tuning.jobs.retrieve(job)
        except (openai.APIConnectionError, openai.InternalServerError):
            return None
        return found if found.status in ENDED else None

    found = wait_until(look, within_s=within_s, every_s=0.05)
    assert found is not None
    return found


def succeeded(client: openai.OpenAI, job: str, within_s: float = 100) -> str:
    """The name of the model that the job made."""
    found = ended(client, job, within_s)
    assert found.status == "succeeded", found.error
    assert found.fine_tuned_model is not None
    return found.fine_tuned_model


def metrics(client: openai.OpenAI, job: str) -> list[dict[str, Any]]:
    """The numbers of the job's steps, as its events tell them, the first step first."""
    events = list(client.fine_tuning.jobs.list_events(job, limit=100))[::-1]
    return [dict(event.data) for event in events if event.type == "metrics"]  # type: ignore[call-overload]


def losses(client: openai.OpenAI, job: str) -> list[float]:
    """The loss of every step; fails if a step is missing, comes twice or out of order."""
    steps = metrics(client, job)
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert len(steps) == steps[-1]["total_steps"]
    return [step["train_loss"] for step in steps]


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference between the losses of two jobs, in nats."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def event_numbers(client: openai.OpenAI, job: str) -> list[int]:
    """The numbers in the ids of a job's events, the first event first."""
    events = list(client.fine_tuning.jobs.list_events(job, limit=100))
    return [int(event.id.rpartition("-")[2]) for event in events][::-1]


def nothing_is_left(gateway: Served, runs: Path) -> None:
    """On disk is what rows name, and nothing else; `runs` is the worker's state folder."""
    wait_until(lambda: not list(runs.glob("ftjob-*")), within_s=90, every_s=0.2)
    settings = Settings(data_dir=gateway.data_dir)
    with gateway.client() as http:
        adapters = http.get("/admin/adapters", params={"limit": 1000}).json()["data"]
        named = {version["digest"] for each in adapters for version in each["versions"]}
        assert set(AdapterStore(settings.store_path).digests()) == named
        files = http.get("/v1/files", params={"limit": 1000}).json()["data"]
        contents = {http.get(f"/v1/files/{file['id']}/content").content for file in files}
    kept = [path for path in settings.files_path.rglob("*") if path.is_file()]
    assert len(kept) == len(contents)


def served_as_trained(url: str, model: str) -> None:
    """Each version gives its trainer's logprobs through the gateway, which found that itself."""
    with httpx.Client(base_url=url, timeout=60) as http:
        versions = http.get(f"/admin/adapters/{model}").raise_for_status().json()["versions"]
        assert versions
        for version in versions:
            assert version["probed"], version
            _agrees(http, version["model"])
        for replica in http.get("/admin/replicas").json()["data"]:
            assert replica["quarantined"] == {}


def _agrees(http: httpx.Client, version: str) -> None:
    name, _, number = version.rpartition("@")
    found = http.get(f"/admin/adapters/{name}/versions/{number}/probe").raise_for_status().json()
    body = {
        "model": version,
        "prompt": found["token_ids"],
        "max_tokens": 1,
        "prompt_logprobs": 0,
    }
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    served = [
        [each[str(token)]["logprob"] for token, each in zip(ids[1:], rows[1:], strict=True)]
        for ids, rows in zip(
            found["token_ids"],
            (choice["prompt_logprobs"] for choice in answer.json()["choices"]),
            strict=True,
        )
    ]
    verdict = compare(Probe(**found), served, "float32")
    assert verdict.ok, f"{version}: {verdict}"


def conversations(path: Path) -> list[list[dict[str, str]]]:
    """The messages of each line."""
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]
