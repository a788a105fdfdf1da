"""Each loss against its formula written out, and its gradient against finite differences."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from app.errors import InvalidRequest
from app.ops import Loss
from app.worker import losses
from app.worker.losses import Targets
from app.worker.trainers.base import Example

VOCABULARY = 11
LENGTHS = (3, 5, 2, 4)
N = sum(LENGTHS)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Targets]:
    """Logits [N, V] in double precision, target ids, and everything a datum may say of them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = normal(N, VOCABULARY)
    ids = torch.randint(0, VOCABULARY, (N,), generator=generator)
    weights = normal(N).abs()
    weights[::4] = 0
    advantages = normal(N)
    advantages[::5] = 0
    logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return logits, ids, Targets(LENGTHS, weights, logprobs + normal(N), advantages, normal(N))


def value(loss: Loss, logits: Tensor, ids: Tensor, targets: Targets, **config: float) -> Tensor:
    found, _ = losses.evaluate(loss, config, *losses.target_logprobs(logits, ids), targets)
    return found


def plain(loss: Loss, logits: Tensor, ids: Tensor, given: Targets, **config: float) -> float:
    """One token at a time, with nothing but arithmetic."""
    if loss == "dpo":
        return plain_dpo(logits, ids, given, config["beta"])
    total = 0.0
    for place in range(N):
        logprob = plain_logprob(logits[place], int(ids[place]))
        weight = float(given.weights[place])
        ratio = math.exp(logprob - float(given.sampled[place]))  # type: ignore[index]
        advantage = float(given.advantages[place])  # type: ignore[index]
        clipped = min(max(ratio, config.get("low", 0)), config.get("high", math.inf))
        total -= {
            "cross_entropy": logprob * weight,
            "importance_sampling": ratio * advantage,
            "ppo": min(ratio * advantage, clipped * advantage),
            "cispo": clipped * logprob * advantage,
        }[loss]
    return total


def plain_dpo(logits: Tensor, ids: Tensor, given: Targets, beta: float) -> float:
    sums = []
    for length in given.lengths:
        start = sum(given.lengths[: len(sums)])
        rewards = [
            float(given.weights[place])
            * (plain_logprob(logits[place], int(ids[place])) - float(given.reference[place]))  # type: ignore[index]
            for place in range(start, start + length)
        ]
        sums.append(sum(rewards))
    return sum(
        math.log(1 + math.exp(-beta * (preferred - other)))
        for preferred, other in zip(sums[0::2], sums[1::2], strict=True)
    )


def plain_logprob(row: Tensor, target: int) -> float:
    return float(row[target]) - math.log(sum(math.exp(float(score)) for score in row))


CASES: dict[Loss, dict[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"low": 0.8, "high": 1.2},
    "cispo": {"low": 0.0, "high": 4.0},
    "dpo": {"beta": 0.1},
}


def test_every_loss_has_its_case() -> None:
    assert set(CASES) == set(get_args(Loss)) == set(losses.DEFAULTS)


@pytest.mark.parametrize("loss", CASES)
def test_a_loss_is_its_formula_with_the_documented_defaults(loss: Loss) -> None:
    logits, ids, targets = drawn()
    expected = plain(loss, logits, ids, targets, **CASES[loss])
    assert float(value(loss, logits, ids, targets)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "config", "named"),
    [
        (
            "ppo",
            {"low": 0.5, "high": 1.05},
            {"clip_low_threshold": 0.5, "clip_high_threshold": 1.05},
        ),
        (
            "cispo",
            {"low": 0.9, "high": 1.1},
            {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
        ),
        ("dpo", {"beta": 2.5}, {"beta": 2.5}),
    ],
)
def test_what_a_loss_is_told_counts(
    loss: Loss, config: dict[str, float], named: dict[str, float]
) -> None:
    logits, ids, targets = drawn(1)
    expected = plain(loss, logits, ids, targets, **config)
    assert float(value(loss, logits, ids, targets, **named)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [loss for loss in CASES if loss != "cispo"])
def test_the_gradient_is_that_of_finite_differences(loss: Loss) -> None:
    logits, ids, targets = drawn(2)

    def of(logits: Tensor) -> Tensor:
        return value(loss, logits, ids, targets)

    assert torch.autograd.gradcheck(of, (logits.requires_grad_(),))


def test_the_gradient_of_cispo_leaves_the_ratio_alone() -> None:
    logits, ids, targets = drawn(3)
    before = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    frozen = (before - targets.sampled).exp().clamp(0, 4)  # type: ignore[operator]

    def surrogate(logits: Tensor) -> Tensor:
        logprobs, _ = losses.target_logprobs(logits, ids)
        return -(frozen * logprobs * targets.advantages).sum()  # type: ignore[operator]

    logits.requires_grad_()
    assert torch.autograd.gradcheck(surrogate, (logits,))
    (wanted,) = torch.autograd.grad(surrogate(logits), logits)
    (found,) = torch.autograd.grad(value("cispo", logits, ids, targets), logits)
    assert torch.allclose(found, wanted, atol=1e-12)


def test_logprobs_are_those_of_log_softmax_and_take_half_precision_to_single() -> None:
    logits = torch.randn(2, 3, 50).bfloat16() * 30
    ids = logits.argmax(-1)
    ids[0, 0] = (ids[0, 0] + 1) % 50
    logprobs, correct = losses.target_logprobs(logits, ids)
    expected = functional.log_softmax(logits.float(), -1).gather(-1, ids[..., None])[..., 0]
    assert logprobs.dtype == torch.float32
    assert torch.allclose(logprobs, expected, atol=1e-5)
    assert correct.tolist() == [[False, True, True], [True, True, True]]


@pytest.mark.parametrize("loss", CASES)
def test_parts_add_up_to_the_whole(loss: Loss) -> None:
    logits, ids, whole = drawn(4)
    logprobs, correct = losses.target_logprobs(logits, ids)
    _, sums = losses.evaluate(loss, {}, logprobs, correct, whole)
    added: dict[str, float] = {}
    cut = sum(LENGTHS[:2])
    for span, lengths in ((slice(0, cut), LENGTHS[:2]), (slice(cut, N), LENGTHS[2:])):
        part = Targets(
            lengths,
            *(getattr(whole, name)[span] for name in ("weights", "sampled", "advantages")),
            whole.reference[span],  # type: ignore[index]
        )
        _, some = losses.evaluate(loss, {}, logprobs[span], correct[span], part)
        for name, number in some.items():
            added[name] = added.get(name, 0.0) + float(number)
    assert added == pytest.approx({name: float(number) for name, number in sums.items()})


def test_metrics_count_targets_with_a_weight_or_an_advantage() -> None:
    lengths = (4,)
    weights = torch.tensor([0.0, 2.0, 0.5, 1.0])
    advantages = torch.tensor([1.0, 0.0, 0.0, -1.0])
    targets = Targets(lengths, weights, torch.zeros(4), advantages)
    correct = torch.tensor([True, True, False, False])
    _, supervised = losses.evaluate("cross_entropy", {}, torch.zeros(4) - 1, correct, targets)
    assert {name: float(number) for name, number in supervised.items()} == {
        "loss:sum": 3.5,
        "weight:sum": 3.5,
        "tokens:sum": 3.0,
        "correct:sum": 1.0,
    }
    _, policy = losses.evaluate("importance_sampling", {}, torch.zeros(4), correct, targets)
    assert {name: float(number) for name, number in policy.items()} == {
        "loss:sum": 0.0,
        "weight:sum": 2.0,
        "tokens:sum": 2.0,
        "correct:sum": 1.0,
    }


def test_dpo_tells_margins_and_who_won() -> None:
    targets = Targets((1, 1, 1, 1), torch.ones(4), reference=torch.zeros(4))
    logprobs = torch.tensor([-1.0, -3.0, -5.0, -4.0])
    _, sums = losses.evaluate("dpo", {"beta": 0.5}, logprobs, torch.ones(4).bool(), targets)
    assert float(sums["pairs:sum"]) == 2
    assert float(sums["reward_margin:sum"]) == pytest.approx(0.5 * (2 - 1))
    assert float(sums["reward_accuracy:sum"]) == 1


def example(n: int = 3, **fields: Any) -> Example:
    ids = torch.arange(n)
    return Example(**{"tokens": ids, "targets": ids, "weights": torch.ones(n)} | fields)


@pytest.mark.parametrize(
    ("loss", "config", "data", "message"),
    [
        ("ppo", {"beta": 1}, [example()], "no config 'beta'; it takes clip_low_threshold, clip_"),
        ("cross_entropy", {"x": 1}, [example()], "it takes nothing"),
        ("dro", {}, [example()], "No loss 'dro'; there is cross_entropy"),
        ("dpo", {}, [example()] * 3, "in pairs .* found 3"),
        ("cross_entropy", {}, [], "at least one datum"),
        ("ppo", {}, [example()], r"data\[0\] has no logprobs, which ppo needs"),
        ("cross_entropy", {}, [example(), example(0)], r"data\[1\] has no tokens"),
        ("dpo", {}, [example(weights=torch.ones(2))] * 2, r"shape \[2\]; its 3 tokens want \[3\]"),
    ],
)
def test_what_no_engine_could_compute_is_refused(
    loss: Loss, config: dict[str, float], data: list[Example], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        losses.check(loss, config, data)
