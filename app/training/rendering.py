"""From a training file to tokens, through the trainer's own chat template.

What comes in: a file that is on this machine, and a worker that renders. What goes out: examples
as tokens, or one `InvalidTrainingFile` that names the lines: too long for the model, refused by
its template, nothing to learn. It must not know: the database, plans.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from app.errors import LineFault
from app.ops import Rendered
from app.training import dataset
from app.training.dataset import MAX_FAULTS, Example
from app.training.patience import Patience
from app.training.run import TrainerHost
from app.training.spec import Method
from app.training.tokens import Examples, weight_of

#: Most conversations, and about most bytes of them, in one request to the worker.
CHUNK, CHUNK_BYTES = 128, 1 << 20


async def render(
    host: TrainerHost,
    patience: Patience,
    path: Path,
    into: Examples,
    *,
    method: Method,
    max_length: int,
    param: str = "training_file",
) -> None:
    """Fill `into` with the examples of a file. No example is cut: a part of an answer would teach
    the model to stop there.

    Raises:
        InvalidTrainingFile: with the first lines that are wrong.
        TrainerUnavailable: the worker does not come back.
        StorageUnavailable: the disk does not take the tokens.
    """
    found = _chunks(dataset.examples(path, method, param=param))
    faults: list[LineFault] = []
    while len(faults) < MAX_FAULTS and (chunk := await asyncio.to_thread(next, found, None)):
        conversations = [one for example in chunk for one in example.conversations]
        ask = partial(host.render, conversations, complete=True)
        rendered = iter(await patience.again(ask))
        for example in chunk:
            sequences = list(islice(rendered, len(example.conversations)))
            problem = _problem(sequences, max_length)
            if problem is not None:
                faults.append(LineFault(example.line, problem))
            elif not faults:
                into.add(sequences)
    if faults:
        raise dataset.invalid(faults[:MAX_FAULTS], method, param=param)
    await asyncio.to_thread(into.seal)


def _chunks(examples: Iterator[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    size = 0
    for example in examples:
        chunk.append(example)
        size += sum(len(one.messages) + len(one.tools or b"") for one in example.conversations)
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _problem(sequences: Sequence[Rendered], max_length: int) -> str | None:
    for rendered in sequences:
        if rendered.problem is not None:
            return rendered.problem
        length = rendered.tokens.shape[0] if rendered.tokens is not None else 0
        if length > max_length:
            return f"{length} tokens in the model's chat template, {max_length} are allowed"
        if weight_of(rendered) <= 0:
            return "nothing to learn: the chat template leaves no token of an assistant message"
    return None
