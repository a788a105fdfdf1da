"""Whole fine-tuning jobs through a gateway, asked for with OpenAI's client.

What comes in: a worker that trains and samples. What goes out: how long eight jobs take, and how
long after a job's last optimizer step its adapter says its first token.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from random import Random

import openai

from app import demo
from app.demo.corpus import exchanges
from app.domain import Trainer
from app.errors import RunLost
from app.training.trainers import TrainerClient
from bench.batching import until_200
from bench.client import Unready
from bench.processes import free_port, running
from bench.training_client import LEARNING_RATE, RANK, RUNS, fresh
from bench.training_report import Ending

POLL_S = 0.05
#: Steps of a job whose end is timed; and its batch.
SHORT_STEPS, SHORT_BATCH = 8, 4
TIMES_OUT_S = 600.0
PROMPT = demo.SAMPLE_PROMPTS[0]


@contextlib.contextmanager
def gateway_running(scratch: Path, trainer: Trainer, jobs: int) -> Iterator[openai.AsyncOpenAI]:
    """A gateway that gives the worker as many jobs at once, and a client of it."""
    port = free_port()
    pool = {
        "name": "bench",
        "base_model": demo.BASE_NAME,
        "base_model_path": str(demo.MODEL_DIR),
        "replicas": [trainer.url],
    }
    trains = {"name": "bench", "base_model": demo.BASE_NAME, "url": trainer.url, "max_jobs": jobs}
    env = {
        "LORAGATE_HOST": "127.0.0.1",
        "LORAGATE_PORT": str(port),
        "LORAGATE_DATA_DIR": str(scratch / f"gateway-{port}"),
        "LORAGATE_POOLS": json.dumps([pool]),
        "LORAGATE_TRAINERS": json.dumps([trains]),
        "LORAGATE_EMBEDDED": "off",
    }
    argv = [str(Path(sys.executable).with_name("loragate")), "serve"]
    log = scratch / f"gateway-{port}.log"
    with running(argv, core=None, log=log, env=env) as process:
        until_200(port, "/readyz", process, log, 30.0)
        url = f"http://127.0.0.1:{port}/v1"
        yield openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)


async def upload(client: openai.AsyncOpenAI, examples: int) -> str:
    """A file of questions and answers of the demo's world; its id."""
    made = exchanges(Random(next(fresh)))
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": each.question},
                    {"role": "assistant", "content": each.answer},
                ]
            }
        )
        for each, _ in zip(made, range(examples), strict=False)
    ]
    content = io.BytesIO("\n".join(lines).encode())
    return (await client.files.create(file=("bench.jsonl", content), purpose="fine-tune")).id


async def submit(client: openai.AsyncOpenAI, file: str, batch: int, suffix: str = "bench") -> str:
    """A job of one epoch; its id."""
    job = await client.fine_tuning.jobs.create(
        model=demo.BASE_NAME,
        training_file=file,
        suffix=suffix,
        seed=1,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": batch}},
        },
        extra_body={"hyperparameters": {"lora_rank": RANK, "learning_rate": LEARNING_RATE}},
    )
    return job.id


async def eight(client: openai.AsyncOpenAI, steps: int, batch: int) -> float:
    """Seconds from the first of eight jobs submitted until all have succeeded."""
    files = [await upload(client, steps * batch) for _ in range(RUNS)]
    began = time.perf_counter()
    jobs = [await submit(client, file, batch) for file in files]
    for job in jobs:
        await named(client, job)
    return time.perf_counter() - began


async def named(client: openai.AsyncOpenAI, job: str) -> str:
    """The model of a job, asked for every 50 ms until it has succeeded."""
    deadline = time.monotonic() + TIMES_OUT_S
    while time.monotonic() < deadline:
        found = await client.fine_tuning.jobs.retrieve(job)
        if found.status == "succeeded" and found.fine_tuned_model is not None:
            return found.fine_tuned_model
        if found.status in ("failed", "cancelled"):
            raise Unready(f"{job} {found.status}: {found.error}")
        await asyncio.sleep(POLL_S)
    raise Unready(f"{job} did not end in {TIMES_OUT_S:.0f} s")


async def listed(client: openai.AsyncOpenAI, suffix: str) -> str:
    """The model of a job by its suffix, as soon as it is among those that can be asked."""
    start = f"ft:{demo.BASE_NAME}:{suffix}:"
    deadline = time.monotonic() + TIMES_OUT_S
    while time.monotonic() < deadline:
        models = [each.id async for each in client.models.list()]
        if found := [name for name in models if name.startswith(start) and "@" not in name]:
            return min(found, key=len)
        await asyncio.sleep(POLL_S)
    raise Unready(f"no model {start}… in {TIMES_OUT_S:.0f} s")


#: How a client learns the name: from the job it asks for, or from the list of models.
WAYS: dict[str, Callable[[openai.AsyncOpenAI, str, str], Coroutine[None, None, str]]] = {
    "job": lambda client, job, _: named(client, job),
    "models": lambda client, _, suffix: listed(client, suffix),
}


async def ending(client: openai.AsyncOpenAI, worker: TrainerClient, file: str, way: str) -> Ending:
    """One short job, and a chat with what it made, streamed."""
    suffix = f"{way}{next(fresh)}"
    job = await submit(client, file, SHORT_BATCH, suffix)
    async with _last_step(worker, job) as stepped:
        model = await WAYS[way](client, job, suffix)
        known = time.perf_counter()
        await _first_token(client, model)
        said = time.perf_counter()
        done = await stepped
    return Ending(known - done, said - done)


@contextlib.asynccontextmanager
async def _last_step(worker: TrainerClient, job: str) -> AsyncIterator[asyncio.Task[float]]:
    """When the worker finished the last optimizer step: it is asked itself, by a long poll."""

    async def watch() -> float:
        while True:
            with contextlib.suppress(RunLost):
                await worker.run(job).outcome(2 * SHORT_STEPS)
                return time.perf_counter()
            await asyncio.sleep(POLL_S / 5)

    watching = asyncio.get_running_loop().create_task(watch())
    try:
        yield watching
    finally:
        watching.cancel()


async def _first_token(client: openai.AsyncOpenAI, model: str) -> None:
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=8,
        temperature=0,
        stream=True,
    )
    async with stream:
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                return
    raise Unready(f"{model} said nothing")
