"""Text from a run's weights as they are now, by the sampler that serves from the same process.

What comes in: a PEFT folder and what to generate. What goes out: token ids and their logprobs.
It must not know: runs, how the folder came to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from app.errors import InvalidRequest
from app.ops import Sample, Sampled
from app.worker.samplers.adapters import Adapter
from app.worker.samplers.delta import Delta
from app.worker.samplers.engine import Engine
from app.worker.samplers.params import SamplingParams, check

MAX_SEQUENCES = 4096


async def sample(engine: Engine, folder: Path, op: Sample) -> list[Sampled]:
    """`n` sequences for each prompt, those of a prompt next to each other.

    Raises:
        InvalidRequest: a value is out of range, or a prompt does not fit the model.
    """
    params = _params(engine, op)
    adapter = Adapter(folder.name, str(folder))
    await engine.load(adapter)
    try:
        ticket = engine.submit([list(prompt) for prompt in op.prompts], params, adapter)
        try:
            found = [delta async for deltas in ticket.deltas() for delta in deltas]
        except BaseException:
            ticket.cancel()
            raise
    finally:
        await engine.retire(adapter)
    return _collected(found, len(op.prompts) * op.n)


def _params(engine: Engine, op: Sample) -> SamplingParams:
    limits = engine.limits
    _check_prompts(op.prompts, limits.vocab_size, limits.max_model_len)
    if len(op.prompts) * op.n > MAX_SEQUENCES:
        raise InvalidRequest(
            f"{len(op.prompts)} prompts with n={op.n} are more than {MAX_SEQUENCES} sequences"
        )
    params = SamplingParams(
        n=op.n,
        max_tokens=op.max_tokens,
        temperature=op.temperature,
        top_p=op.top_p,
        top_k=op.top_k,
        stop=tuple(op.stop),
        seed=op.seed,
        logprobs=0,
    )
    check(params, vocab_size=limits.vocab_size, max_logprobs=0)
    return params


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, most: int) -> None:
    if not prompts:
        raise InvalidRequest("`prompts` is empty")
    for place, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < most:
            raise InvalidRequest(
                f"prompts[{place}] has {len(prompt)} tokens; 1 to {most - 1} leave room for more"
            )
        strange = next((each for each in prompt if not 0 <= each < vocab_size), None)
        if strange is not None:
            raise InvalidRequest(
                f"prompts[{place}] has the id {strange}; ids are 0 to {vocab_size - 1}"
            )


def _collected(found: Sequence[Delta], count: int) -> list[Sampled]:
    tokens: list[list[int]] = [[] for _ in range(count)]
    logprobs: list[list[float]] = [[] for _ in range(count)]
    reasons = ["length"] * count
    for delta in found:
        tokens[delta.index] += delta.token_ids
        logprobs[delta.index] += [each.logprobs[0] for each in delta.logprobs]
        reasons[delta.index] = delta.finish_reason or reasons[delta.index]
    return [Sampled(*each) for each in zip(tokens, logprobs, reasons, strict=True)]
