"""Drives SkyRL's Tinker server with the Tinker SDK; runs in SkyRL's environment, not in ours.

    python skyrl_client.py < commands

What comes in: a line of JSON that says where the server is and what runs to make, then one line
for each round: a batch for each of the first runs, and how many steps to do on it. What goes out:
a line of JSON once the runs exist, then one for each round: its seconds, and every run's mean loss
at each step. `bench.training_client` does the same to our worker.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import tinker
from tinker import types


async def main() -> None:
    task = json.loads(sys.stdin.readline())
    service = tinker.ServiceClient(base_url=task["url"], api_key="tml-bench")
    # One after another: the server has no lock around making a run.
    clients = [
        await service.create_lora_training_client_async(
            task["base_model"], rank=task["rank"], seed=seed, train_unembed=False
        )
        for seed in range(task["runs"])
    ]
    say({"tinker": tinker.__version__, "runs": len(clients)})
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        batches = [[_datum(ids) for ids in rows] for rows in asked["batches"]]
        began = time.perf_counter()
        losses = await asyncio.gather(
            *(
                drive(client, batch, asked["steps"], task["ahead"], task["learning_rate"])
                for client, batch in zip(clients, batches, strict=False)
            )
        )
        say({"seconds": time.perf_counter() - began, "losses": losses})


async def drive(
    client: Any, batch: list[Any], steps: int, ahead: int, learning_rate: float
) -> list[float]:
    """Steps on one batch, up to `ahead` of them handed over before the first is awaited."""
    losses: list[float] = []
    waiting: list[tuple[Any, Any]] = []
    adam = types.AdamParams(learning_rate=learning_rate)
    for _ in range(steps):
        passed = await client.forward_backward_async(batch, "cross_entropy")
        waiting.append((passed, await client.optim_step_async(adam)))
        if len(waiting) == ahead:
            losses.append(await finish(*waiting.pop(0)))
    for pair in waiting:
        losses.append(await finish(*pair))
    return losses


async def finish(passed: Any, stepped: Any) -> float:
    """The mean loss over all tokens of a step that is done."""
    result = await passed
    await stepped
    logprobs: list[float] = [
        value for each in result.loss_fn_outputs for value in each["logprobs"].tolist()
    ]
    return -sum(logprobs) / len(logprobs)


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def _datum(ids: list[int]) -> Any:
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)},
    )


if __name__ == "__main__":
    asyncio.run(main())
