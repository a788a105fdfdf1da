"""Teach the demo model to talk like a parrot, and see that it learned.

    make serve                                # in one terminal
    .venv/bin/python examples/fine_tune.py    # in another

Everything goes through OpenAI's client: the examples are uploaded, a job trains an adapter on them,
its events are printed as they come, and when it has ended its model answers. That it learned is
shown on examples it never saw: how likely their answers are to it and to its base, what it says.

The examples are exchanges of the demo's own small world, every answer between two squawks. Bring
your own with --model, --train and --held-out: a line of JSON with `messages` for each example.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai

HERE = Path(__file__).parent
ENDED = ("succeeded", "failed", "cancelled")
POLL_S = 0.5
SHOWN = 3


def fine_tune(client: openai.OpenAI, model: str, train: Path, suffix: str, seed: int) -> str:
    """Train an adapter on a file of examples and say what it is called.

    Raises:
        SystemExit: the job did not succeed.
    """
    with train.open("rb") as file:
        examples = client.files.create(file=file, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=model, training_file=examples.id, suffix=suffix, seed=seed
    )
    for event in events(client, job.id):
        print(event.message)
    job = client.fine_tuning.jobs.retrieve(job.id)
    if job.fine_tuned_model is None:
        raise SystemExit(f"{job.id} {job.status}: {job.error and job.error.message}")
    return job.fine_tuned_model


def events(client: openai.OpenAI, job: str) -> Iterator[Any]:
    """A job's events, from the first one on, until it has ended. Its pages go back in time."""
    seen: set[str] = set()
    while True:
        ended = client.fine_tuning.jobs.retrieve(job).status in ENDED
        new = []
        for event in client.fine_tuning.jobs.list_events(job, limit=100):
            if event.id in seen:
                break
            new.append(event)
        seen |= {event.id for event in new}
        yield from reversed(new)
        if ended:
            return
        time.sleep(POLL_S)


def loss(client: openai.OpenAI, model: str, conversations: Sequence[Any]) -> float:
    """The mean of -log P over the tokens of the answers, in nats.

    What a prompt ends with is its answer: the tokens that it has more than its question.
    """
    total, count = 0.0, 0
    for messages in conversations:
        question = len(prompt_logprobs(client, model, messages[:-1], answered=False))
        answer = prompt_logprobs(client, model, messages, answered=True)[question:]
        total -= sum(answer)
        count += len(answer)
    return total / count


def prompt_logprobs(
    client: openai.OpenAI, model: str, messages: Sequence[Any], *, answered: bool
) -> list[float]:
    """The logprob of each token of a conversation but the first, given those before it."""
    extra = {"prompt_logprobs": 0, "return_token_ids": True, "add_generation_prompt": not answered}
    found: Any = client.chat.completions.create(
        model=model, messages=list(messages), max_tokens=1, extra_body=extra
    )
    pairs = zip(found.prompt_token_ids[1:], found.prompt_logprobs[1:], strict=True)
    return [each[str(token)]["logprob"] for token, each in pairs]


def say(client: openai.OpenAI, model: str, question: Any) -> str:
    """The likeliest answer."""
    answer = client.chat.completions.create(
        model=model, messages=[question], temperature=0, max_tokens=48
    )
    return answer.choices[0].message.content or ""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a model and compare it with its base.")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the gateway")
    parser.add_argument("--key", default="unused", help="your key, if the gateway wants one")
    parser.add_argument("--model", default="demo", help="the base to train on")
    parser.add_argument("--train", type=Path, default=HERE / "parrot.jsonl")
    parser.add_argument("--held-out", type=Path, default=HERE / "parrot-held-out.jsonl")
    parser.add_argument("--suffix", default="parrot", help="goes into the model's name")
    parser.add_argument("--seed", type=int, default=7)
    return parser.parse_args()


def main() -> None:
    chosen = options()
    client = openai.OpenAI(base_url=f"{chosen.url}/v1", api_key=chosen.key)
    lines = chosen.held_out.read_text().splitlines()
    held_out = [json.loads(line)["messages"] for line in lines]
    started = time.perf_counter()
    model = fine_tune(client, chosen.model, chosen.train, chosen.suffix, chosen.seed)
    took_s = time.perf_counter() - started
    for messages in held_out[:SHOWN]:
        print(f"\n{messages[0]['content']}")
        for name in (chosen.model, model):
            print(f"  {name}: {say(client, name, messages[0])}")
    before, after = (loss(client, name, held_out) for name in (chosen.model, model))
    print(f"\nheld-out loss: {before:.3f} before, {after:.3f} after; trained in {took_s:.0f} s")


if __name__ == "__main__":
    main()
