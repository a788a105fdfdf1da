"""Prompt logprobs of a real vLLM on a GPU, with the plugin and without, against PEFT's.

    python -m bench.gpu_logprobs --out DIR --case demo:bfloat16:v2:on --case demo:bfloat16:v2:off

What comes in: cases, MODEL:DTYPE:RUNNER:PLUGIN[:graphs]. MODEL is `demo`, or `1b` or `1b-sharp`,
which are Llamas of 1.1 billion random weights with an lm_head of their own, the second with logits
four times as far apart. DTYPE is `bfloat16` or `float16`: on a GPU vLLM's LoRA takes no float32.
RUNNER is vLLM's model runner, v1 or v2. PLUGIN is `on` or `off`; any other word is `off` too, for a
second server to see what differs between two without it. Cases with `graphs` run as vLLM does by
default and are timed, the others eagerly and in small chunks. What goes out: DIR/gpu_logprobs.json
and a table.

It runs in one environment with vLLM, loragate-vllm, transformers, peft and httpx. All servers share
the one GPU: a case takes about 6 GiB of it. A server that does not start or dies is reported
and the others go on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from bench import gpu_cases
from bench.gpu_cases import (
    ADAPTERS,
    BASE,
    DEMO,
    LONG,
    NAMES,
    PROMPTS,
    RANK,
    Case,
    limit_of,
    prompts_of,
)

ALONE, GENERATED = 12, 24
ROUNDS, CLIENTS = 3, 48
START_S = 240


def start(case: Case, model: Path, out: Path, python: str, device: str) -> None:
    """Start the case's server; it is not up yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        case.port = probe.getsockname()[1]
    limit = limit_of(case.model)
    options: dict[str, Any] = {
        "model": model,
        "served-model-name": BASE,
        "host": "127.0.0.1",
        "port": case.port,
        "dtype": case.dtype,
        "max-model-len": limit,
        "max-num-batched-tokens": limit if case.graphs else 256,
        "max-num-seqs": 64,
        "max-loras": len(ADAPTERS),
        "max-cpu-loras": len(ADAPTERS),
        "max-lora-rank": RANK,
    }
    if device == "cuda":
        # The servers share the GPU, so none may take its measure.
        options |= {"kv-cache-memory-bytes": 1 << 30, "gpu-memory-utilization": 0.03}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora"]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += [] if case.graphs else ["--enforce-eager"]
    env = os.environ | {
        "VLLM_PLUGINS": "loragate" if case.plugin == "on" else "",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(case.runner == "v2")),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(out / "cache" / case.name.replace(":", "-")),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
    }
    with (out / f"{case.name.replace(':', '-')}.log").open("wb") as log:
        case.process = subprocess.Popen(
            command, env=env, stdout=log, stderr=log, start_new_session=True
        )


def stop(case: Case) -> None:
    if case.process is None:
        return
    if case.process.poll() is None:
        os.killpg(case.process.pid, signal.SIGTERM)
    try:
        case.process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(case.process.pid, signal.SIGKILL)
        case.process.wait()


async def until_up(case: Case, http: httpx.AsyncClient, adapters: Path) -> None:
    """Wait for the server, load the adapters, ask the plugin what it says."""
    begun = time.monotonic()
    while True:
        if case.process is None or case.process.poll() is not None:
            raise RuntimeError("ended before it was up")
        if time.monotonic() - begun > START_S:
            raise RuntimeError("was not up in time")
        try:
            if (await http.get(f"{case.url}/health")).status_code == 200:
                break
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.5)
    case.start_s = time.monotonic() - begun
    for name in ADAPTERS:
        body = {"lora_name": name, "lora_path": str(adapters / name)}
        answer = await http.post(f"{case.url}/v1/load_lora_adapter", json=body)
        if answer.status_code != 200:
            raise RuntimeError(f"{name} was not loaded: {answer.text}")
    answer = await http.get(f"{case.url}/loragate/features")
    case.features = answer.json() if answer.status_code == 200 else None


async def complete(case: Case, http: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    """The choices of one request."""
    body = {"temperature": 0, "ignore_eos": True, "return_token_ids": True} | body
    answer = await http.post(f"{case.url}/v1/completions", json=body)
    if answer.status_code != 200:
        raise RuntimeError(f"{answer.status_code}: {answer.text[:300]}")
    return sorted(answer.json()["choices"], key=lambda choice: choice["index"])


async def ask_all(case: Case, http: httpx.AsyncClient, prompts: list[list[int]]) -> None:
    """Everything at once: prompts alone and in arrays, of every adapter, and generation."""

    async def score(name: str, numbers: Sequence[int]) -> None:
        rows = [prompts[number] for number in numbers]
        choices = await complete(
            case, http, model=name, prompt=rows, max_tokens=1, prompt_logprobs=0
        )
        for number, row, choice in zip(numbers, rows, choices, strict=True):
            pairs = zip(row[1:], choice["prompt_logprobs"][1:], strict=True)
            found = [given[str(token)]["logprob"] for token, given in pairs]
            case.prompts.setdefault(name, {})[number] = found

    async def generate(name: str, row: list[int]) -> None:
        case.mixed.append(await generated(case, http, name, row))

    arrays = [range(at, min(at + 6, PROMPTS)) for at in range(ALONE, PROMPTS, 6)]
    alone = [(number,) for number in (*range(ALONE), *range(PROMPTS, PROMPTS + LONG))]
    async with asyncio.TaskGroup() as group:
        for numbers in (*alone, *arrays):
            for name in NAMES:
                group.create_task(score(name, numbers))
        for row in prompts[:4]:
            for name in NAMES:
                group.create_task(generate(name, row))


async def ask_one_by_one(case: Case, http: httpx.AsyncClient, prompts: list[list[int]]) -> None:
    """Generation alone, the same steps for every server."""
    for name in NAMES:
        for number in (0, 5, 9):
            salt = f"{name}-{number}"
            row = prompts[number]
            case.quiet.append(await generated(case, http, name, row, cache_salt=salt))


async def generated(
    case: Case, http: httpx.AsyncClient, name: str, row: list[int], **more: Any
) -> tuple[str, list[int], list[int], list[float]]:
    options = {"max_tokens": GENERATED, "logprobs": 0} | more
    (choice,) = await complete(case, http, model=name, prompt=row, **options)
    return name, row, choice["token_ids"], choice["logprobs"]["token_logprobs"]


async def rate(case: Case, http: httpx.AsyncClient, kind: str) -> float:
    """Prompts scored a second, or tokens generated a second, all adapters mixed."""
    drawn = random.Random(kind)
    options: dict[str, Any] = {"max_tokens": 1, "prompt_logprobs": 0}
    count, length, worth = 192, 256, 1
    if kind == "tokens":
        options = {"max_tokens": 128}
        count, length, worth = 96, 32, 128
    rows = [[drawn.randrange(5, 2000) for _ in range(length)] for _ in range(count)]
    free = asyncio.Semaphore(CLIENTS)

    async def one(number: int, row: list[int]) -> None:
        async with free:
            name, salt = NAMES[number % len(NAMES)], str(time.monotonic())
            await complete(case, http, model=name, prompt=row, cache_salt=salt, **options)

    begun = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number, row in enumerate(rows):
            group.create_task(one(number, row))
    return count * worth / (time.monotonic() - begun)


async def measure(cases: list[Case], folder: Path) -> None:
    """Everything that needs the servers."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=180, limits=limits) as http:

        async def answers(case: Case) -> None:
            try:
                await until_up(case, http, folder / case.model / "adapters")
                prompts = prompts_of(case.model, limit_of(case.model))
                await ask_all(case, http, prompts)
                await ask_one_by_one(case, http, prompts)
            except (RuntimeError, httpx.HTTPError, ExceptionGroup) as exc:
                case.fault = " ".join(map(repr, getattr(exc, "exceptions", (exc,))))[:2000]

        async with asyncio.TaskGroup() as group:
            for case in cases:
                group.create_task(answers(case))
        timed = [case for case in cases if case.graphs and not case.fault]
        for number in range(ROUNDS + 1):
            for case in timed:
                for kind in ("prompts", "tokens"):
                    found = await rate(case, http, kind)
                    # The first round warms up.
                    if number:
                        case.rates.setdefault(kind, []).append(found)


class Reference:
    """transformers with PEFT, one adapter of a model."""

    def __init__(self, model: Path, adapter: Path | None, dtype: str, device: str) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)
        self._model = base if adapter is None else PeftModel.from_pretrained(base, adapter)
        self._model.eval()
        self._device = device

    @torch.inference_mode()
    def logprobs(self, row: Sequence[int]) -> list[float]:
        """Of every token of the row but the first."""
        ids = torch.tensor([list(row)], device=self._device)
        scores = self._model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        return list(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())


def differences(case: Case, name: str, reference: Reference) -> dict[str, list[list[float]]]:
    """By what was asked: a row of absolute differences for each prompt."""
    rows = prompts_of(case.model, limit_of(case.model))
    found: dict[str, list[list[float]]] = {"prompt": [], "generated": []}
    for number, theirs in case.prompts.get(name, {}).items():
        found["prompt"].append(apart(theirs, reference.logprobs(rows[number])))
    for who, prompt, tokens, theirs in (*case.mixed, *case.quiet):
        if who == name:
            ours = reference.logprobs(prompt + tokens)[len(prompt) - 1 :]
            found["generated"].append(apart(theirs, ours))
    return found


def apart(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    return [abs(one - other) for one, other in zip(theirs, ours, strict=True)]


def statistics(rows: list[list[float]]) -> dict[str, float]:
    """Of absolute differences; `row_mean` is the largest mean of one prompt."""
    every = sorted(value for row in rows for value in row)
    if not every:
        return {}
    return {
        "count": len(every),
        "max": every[-1],
        "p999": every[int(0.999 * (len(every) - 1))],
        "mean": sum(every) / len(every),
        "row_mean": max(sum(row) / len(row) for row in rows if row),
    }


def compare(cases: list[Case], folder: Path, device: str) -> dict[str, Any]:
    """By case, dtype of the reference, what was asked and kind of adapter: `statistics`."""
    found: dict[str, Any] = {}
    wanted = {(case.model, dtype) for case in cases for dtype in ("float32", case.dtype)}
    for model, dtype in sorted(wanted):
        path = DEMO if model == "demo" else folder / model / "model"
        for name in NAMES:
            adapter = None if name == BASE else folder / model / "adapters" / name
            reference = Reference(path, adapter, dtype, device)
            for case in cases:
                if case.model == model and dtype in ("float32", case.dtype):
                    of_dtype = found.setdefault(case.name, {}).setdefault(dtype, {})
                    for asked, rows in differences(case, name, reference).items():
                        kind = name.partition("-")[0]
                        of_dtype.setdefault(asked, {}).setdefault(kind, []).extend(rows)
            del reference
    return {
        name: {
            dtype: {
                asked: {kind: statistics(rows) for kind, rows in kinds.items()}
                for asked, kinds in of_dtype.items()
            }
            for dtype, of_dtype in dtypes.items()
        }
        for name, dtypes in found.items()
    }


def by_pair(case: Case) -> tuple[Any, ...]:
    return case.model, case.dtype, case.runner, case.graphs, case.plugin


def unchanged(cases: list[Case]) -> dict[str, Any]:
    """Of pairs that differ in the plugin alone: their generation, one request at a time."""
    found = {}
    for off, on in pairwise(sorted(cases, key=by_pair)):
        if by_pair(off)[:-1] != by_pair(on)[:-1] or not (off.quiet and on.quiet):
            continue
        pairs = list(zip(off.quiet, on.quiet, strict=False))
        found[f"{off.name} {on.name}"] = {
            "requests": len(pairs),
            "same_tokens": sum(one[2] == other[2] for one, other in pairs),
            "max": max([max(apart(a[3], b[3])) for a, b in pairs if a[2] == b[2]], default=-1),
        }
    return found


def print_table(results: dict[str, Any]) -> None:
    for name, dtypes in results["differences"].items():
        for dtype, asked in dtypes.items():
            for what, kinds in asked.items():
                cells = [
                    f"{kind} " + " ".join(f"{key}={value:.3g}" for key, value in numbers.items())
                    for kind, numbers in kinds.items()
                ]
                print(f"{name} against {dtype}, {what}: " + "; ".join(cells))
    for name, case in results["cases"].items():
        rates = {kind: f"{median(values):.1f}" for kind, values in case["rates"].items()}
        print(name, "FAULT " + case["fault"] if case["fault"] else "ok", rates, case["features"])
    print("generation with and without:", json.dumps(results["unchanged"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", type=gpu_cases.case_of, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    disable_progress_bar()
    cases: list[Case] = given.case
    given.out.mkdir(parents=True, exist_ok=True)
    for model in sorted({case.model for case in cases}):
        folder = given.out / model
        if model != "demo" and not (folder / "model").exists():
            gpu_cases.write_model(
                folder / "model", given.device, 4.0 if model == "1b-sharp" else 1.0
            )
        path = DEMO if model == "demo" else folder / "model"
        for case in cases:
            if case.model == model:
                start(case, path, given.out, given.vllm_python, given.device)
        if not (folder / "adapters").exists():
            gpu_cases.write_adapters(path, folder / "adapters", given.device)
    try:
        asyncio.run(measure(cases, given.out))
    finally:
        for case in cases:
            stop(case)
    results = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "cases": {
            case.name: {
                "fault": case.fault,
                "features": case.features,
                "start_s": round(case.start_s, 1),
                "rates": case.rates,
            }
            for case in cases
        },
        "unchanged": unchanged(cases),
        "differences": compare([case for case in cases if case.prompts], given.out, given.device),
    }
    (given.out / "gpu_logprobs.json").write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)


if __name__ == "__main__":
    main()
