"""The data of a forward_backward as clients write them, made into what a worker is sent.

What comes in: JSON items in any of these forms. What goes out: `ops.Datum`s, shifted, or
`InvalidRequest` with the item that is wrong. It must not know: losses, HTTP, SQL.

    [{"role": …, "content": …}, …]                        a conversation, through the chat template
    {"messages": […], "tools": […]}                       the same; weight 0 leaves a message out
    {"prompt": "…", "completion": "…"}                    the same, of one user and one assistant
    {"input_ids": […], "labels": […]}                     as transformers has it: -100 is left out
    {"input_ids": […], "weights": […]}                    a weight for each token
    {"model_input": […], "loss_fn_inputs": {"target_tokens": …, "weights": …, "logprobs": …,
     "advantages": …}}                                    as Tinker has it: shifted by the sender
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

from app.errors import InvalidRequest
from app.ops import Datum, Message, Rendered, Tensor
from app.training import conversations
from app.training.batches import PROBE_ROWS, PROBE_TOKENS
from app.training.conversations import BadLine
from app.training.run import TrainerHost

IGNORED_LABEL = -100
MAX_ITEMS = 4096
GREETING = [
    {"role": "user", "content": "Good morning! When does the ship with my two parcels arrive?"},
    {
        "role": "assistant",
        "content": "Good morning. It is due at noon, if the wind stays as it is.",
    },
    {"role": "user", "content": "And if it does not?"},
]


class _Labelled(msgspec.Struct, forbid_unknown_fields=True):
    input_ids: list[int]
    labels: list[int] | None = None
    weights: list[float] | None = None


class _Chunk(msgspec.Struct):
    tokens: list[int]


class _Chunks(msgspec.Struct):
    chunks: list[_Chunk]


class _Inputs(msgspec.Struct, forbid_unknown_fields=True):
    target_tokens: list[int]
    weights: list[float] | None = None
    logprobs: list[float] | None = None
    advantages: list[float] | None = None


class _Shifted(msgspec.Struct, forbid_unknown_fields=True):
    model_input: list[int] | _Chunks
    loss_fn_inputs: _Inputs


def check(data: Sequence[Any]) -> None:
    """Refuse what no worker need be asked about.

    Raises:
        InvalidRequest: an item has none of the forms.
    """
    if not 1 <= len(data) <= MAX_ITEMS:
        raise InvalidRequest(f"data has 1 to {MAX_ITEMS} items, not {len(data)}.", param="data")
    for at, item in enumerate(data):
        _read(at, item)


def probe_tokens(data: Sequence[Datum]) -> tuple[tuple[int, ...], ...]:
    """How the first items begin: what a run learned shows best whether it is served as trained."""
    return _beginnings(each.tokens for each in data)


async def first_probe_tokens(host: TrainerHost) -> tuple[tuple[int, ...], ...]:
    """The same for a run that was trained on nothing yet: of a greeting.

    Nothing if the base has no chat template.

    Raises:
        TrainerUnavailable: the worker cannot be asked.
    """
    greeting = Message(msgspec.json.encode(GREETING))
    rendered = await host.render([greeting], complete=False)
    return _beginnings(each.tokens for each in rendered if each.tokens is not None)


async def datums(host: TrainerHost, data: Sequence[Any]) -> list[Datum]:
    """The items as a worker wants them; its chat template renders the conversations.

    Raises:
        InvalidRequest: an item has none of the forms, or the template refuses it.
        TrainerUnavailable: the worker cannot be asked.
    """
    found = [_read(at, item) for at, item in enumerate(data)]
    asked = [one for one in found if isinstance(one, Message)]
    rendered = iter(await host.render(asked, complete=True) if asked else ())
    return [
        _rendered(at, next(rendered)) if isinstance(one, Message) else one
        for at, one in enumerate(found)
    ]


def _beginnings(sequences: Iterable[Tensor]) -> tuple[tuple[int, ...], ...]:
    rows = (tuple(memoryview(each.data).cast("i")[:PROBE_TOKENS]) for each in sequences)
    return tuple(islice((row for row in rows if len(row) > 1), PROBE_ROWS))


def _read(at: int, item: Any) -> Datum | Message:
    try:
        if isinstance(item, list):
            return conversations.supervised({"messages": item})[0]
        if not isinstance(item, Mapping):
            raise BadLine("it is an array of messages, or an object")
        if "messages" in item:
            return conversations.supervised(item)[0]
        if item.keys() == {"prompt", "completion"}:
            said = {"role": "assistant", "content": item["completion"]}
            asked = {"role": "user", "content": item["prompt"]}
            return conversations.supervised({"messages": [asked, said]})[0]
        if "input_ids" in item:
            return _labelled(msgspec.convert(item, _Labelled))
        return _shifted(msgspec.convert(item, _Shifted))
    except (BadLine, msgspec.ValidationError, UnicodeEncodeError) as exc:
        raise _wrong(at, str(exc)) from exc


def _labelled(item: _Labelled) -> Datum:
    ids, labels, weights = item.input_ids, item.labels, item.weights
    if len(ids) < 2:
        raise BadLine(f"input_ids: {len(ids)} of them, allowed are 2 or more")
    for name, column in (("labels", labels), ("weights", weights)):
        if column is not None and len(column) != len(ids):
            raise BadLine(f"{name}: {len(column)} for {len(ids)} input_ids")
    if labels is None:
        targets, counted = ids[1:], [1.0] * (len(ids) - 1)
    else:
        counted = [float(label != IGNORED_LABEL) for label in labels[1:]]
        targets = [label if label != IGNORED_LABEL else 0 for label in labels[1:]]
    if weights is not None:
        counted = [one * weight for one, weight in zip(counted, weights[1:], strict=True)]
    return Datum(_ids(ids[:-1]), _ids(targets), _floats(counted))


def _shifted(item: _Shifted) -> Datum:
    given, inputs = item.model_input, item.loss_fn_inputs
    chunks = [given] if isinstance(given, list) else [chunk.tokens for chunk in given.chunks]
    tokens = [token for chunk in chunks for token in chunk]
    if not tokens:
        raise BadLine("model_input: it has no token")
    columns = {
        "target_tokens": inputs.target_tokens,
        "weights": inputs.weights,
        "logprobs": inputs.logprobs,
        "advantages": inputs.advantages,
    }
    for name, column in columns.items():
        if column is not None and len(column) != len(tokens):
            raise BadLine(f"loss_fn_inputs.{name}: {len(column)} for {len(tokens)} tokens")
    return Datum(
        tokens=_ids(tokens),
        targets=_ids(inputs.target_tokens),
        weights=_floats(inputs.weights),
        logprobs=_floats(inputs.logprobs),
        advantages=_floats(inputs.advantages),
    )


def _rendered(at: int, one: Rendered) -> Datum:
    if one.problem is not None or one.tokens is None or one.weights is None:
        raise _wrong(at, one.problem or "the worker rendered nothing")
    length = one.tokens.shape[0]
    if length < 2:
        raise _wrong(at, f"{length} tokens in the chat template, allowed are 2 or more")
    shape = (length - 1,)
    return Datum(
        tokens=Tensor("int32", shape, one.tokens.data[:-4]),
        targets=Tensor("int32", shape, one.tokens.data[4:]),
        weights=Tensor("float32", shape, one.weights.data[4:]),
    )


def _ids(values: Sequence[int]) -> Tensor:
    if not all(0 <= value < 1 << 31 for value in values):
        raise BadLine("a token id is a whole number from 0 on")
    return Tensor("int32", (len(values),), array("i", values).tobytes())


def _floats(values: Sequence[float] | None) -> Tensor | None:
    if values is None:
        return None
    return Tensor("float32", (len(values),), array("f", values).tobytes())


def _wrong(at: int, why: str) -> InvalidRequest:
    return InvalidRequest(f"data[{at}]: {why}", param="data")
