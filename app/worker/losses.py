"""The losses of training, as functions of the targets' logprobs.

What comes in: logits or logprobs, and what a datum says about each token. What goes out: sums over
tokens, never means, and how they went. It must not know: models, runs, where tokens came from.

Names and defaults are those of the Tinker API. Throughout, `logprobs` are log p(target) under the
weights in training, `sampled` the same under those that sampled the tokens, and
r = exp(logprobs - sampled).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from app.errors import InvalidRequest
from app.ops import Loss
from app.worker.trainers.base import Example

#: What each loss may be told, and what holds where it is not.
DEFAULTS: Mapping[Loss, Mapping[str, float]] = {
    "cross_entropy": {},
    "dpo": {"beta": 0.1},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
}
#: Losses that a policy learns by; their tokens count where the advantage is not zero.
POLICY: frozenset[Loss] = frozenset(("importance_sampling", "ppo", "cispo"))


@dataclass(frozen=True, slots=True)
class Targets:
    """What is known about all tokens of some examples, laid end to end: float tensors of [n].

    `lengths` are the tokens of each example; `sampled` and `advantages` are there for policy
    losses, `reference` (the base's own logprobs) for DPO.
    """

    lengths: tuple[int, ...]
    weights: Tensor
    sampled: Tensor | None = None
    advantages: Tensor | None = None
    reference: Tensor | None = None

    def chosen(self, loss: Loss) -> Tensor:
        """1 for each target that counts, 0 for the others: [n]."""
        kind = self.advantages if loss in POLICY else self.weights
        return (cast(Tensor, kind) != 0).to(self.weights.dtype)

    def per_example(self, values: Tensor) -> Tensor:
        """Sums of [n] over each example: [examples]."""
        lengths = torch.tensor(self.lengths, device=values.device)
        owner = torch.repeat_interleave(lengths, output_size=len(values))
        return values.new_zeros(len(self.lengths)).index_add(0, owner, values)


def gather(
    examples: Sequence[Example], device: torch.device, reference: Tensor | None = None
) -> Targets:
    """Lay examples end to end on a device."""

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        if any(tensor is None for tensor in tensors):
            return None
        return torch.cat(cast(list[Tensor], tensors)).to(device)

    return Targets(
        tuple(len(example.tokens) for example in examples),
        cast(Tensor, joined([example.weights for example in examples])),
        joined([example.logprobs for example in examples]),
        joined([example.advantages for example in examples]),
        reference,
    )


def check(loss: Loss, config: Mapping[str, float], examples: Sequence[Example]) -> None:
    """Refuse what no engine could compute.

    Raises:
        InvalidRequest: a config key or a datum that does not fit the loss.
    """
    options(loss, config)
    if not examples:
        raise InvalidRequest(f"{loss} was given no data; give at least one datum.", param="data")
    if loss == "dpo" and len(examples) % 2:
        raise InvalidRequest(
            f"dpo takes data in pairs (preferred, then not); found {len(examples)} data.",
            param="data",
        )
    for index, example in enumerate(examples):
        _check_example(loss, f"data[{index}]", example)


def options(loss: Loss, config: Mapping[str, float]) -> dict[str, float]:
    """The config of a loss with its defaults filled in.

    Raises:
        InvalidRequest: a key the loss does not have.
    """
    if loss not in DEFAULTS:
        raise InvalidRequest(f"No loss {loss!r}; there is {_listed(DEFAULTS)}.", param="loss")
    defaults = DEFAULTS[loss]
    if unknown := sorted(config.keys() - defaults.keys()):
        raise InvalidRequest(
            f"{loss} has no config {unknown[0]!r}; it takes {_listed(defaults)}.",
            param=f"config.{unknown[0]}",
        )
    return {**defaults, **config}


def evaluate(
    loss: Loss, config: Mapping[str, float], logprobs: Tensor, correct: Tensor, targets: Targets
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss and its metrics, sums over all tokens: scalars that may be added up over parts.

    Args:
        logprobs: [n], with a gradient where one is wanted.
        correct: bool [n], where the target was the likeliest token.
    """
    given = options(loss, config)
    chosen = targets.chosen(loss)
    weights = chosen if loss in POLICY else targets.weights
    metrics = {
        "weight:sum": weights.sum(),
        "tokens:sum": chosen.sum(),
        "correct:sum": (chosen * correct).sum(),
    }
    if loss == "dpo":
        value, more = _dpo(logprobs, targets, given["beta"])
        metrics |= more
    else:
        value = _per_token(loss, given, logprobs, targets).sum()
    return value, {"loss:sum": value.detach(), **metrics}


def target_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(target), [...], and whether the target was the likeliest, bool [...].

    `logits` [..., vocabulary] of less than single precision are taken to it first.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    apply: Any = _TargetLogprobs.apply
    return cast(tuple[Tensor, Tensor], apply(logits, targets))


def cross_entropy(logprobs: Tensor, weights: Tensor) -> Tensor:
    """-w · logprob of each token."""
    return -logprobs * weights


def importance_sampling(logprobs: Tensor, sampled: Tensor, advantages: Tensor) -> Tensor:
    """-r · A of each token."""
    return -(logprobs - sampled).exp() * advantages


def ppo(logprobs: Tensor, sampled: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(r · A, clip(r, low, high) · A) of each token (Schulman et al. 2017, equation 7)."""
    ratio = (logprobs - sampled).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


def cispo(logprobs: Tensor, sampled: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-clip(r, low, high) · logprob · A, no gradient through r (MiniMax-M1 2025, equation 4)."""
    ratio = (logprobs.detach() - sampled).exp().clamp(low, high)
    return -ratio * logprobs * advantages


def dpo(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Loss and reward margin of each pair: [pairs] (Rafailov et al. 2023, equation 7).

    Args:
        policy, reference: logprobs of whole answers, [2 · pairs]: preferred, then not.
    """
    rewards = (policy - reference) * beta
    margins = rewards[0::2] - rewards[1::2]
    return -functional.logsigmoid(margins), margins


def _per_token(
    loss: Loss, given: Mapping[str, float], logprobs: Tensor, targets: Targets
) -> Tensor:
    if loss == "cross_entropy":
        return cross_entropy(logprobs, targets.weights)
    sampled, advantages = cast(Tensor, targets.sampled), cast(Tensor, targets.advantages)
    if loss == "importance_sampling":
        return importance_sampling(logprobs, sampled, advantages)
    low, high = given["clip_low_threshold"], given["clip_high_threshold"]
    return (ppo if loss == "ppo" else cispo)(logprobs, sampled, advantages, low, high)


def _dpo(logprobs: Tensor, targets: Targets, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    policy = targets.per_example(logprobs * targets.weights)
    reference = targets.per_example(cast(Tensor, targets.reference) * targets.weights)
    losses, margins = dpo(policy, reference, beta)
    margins = margins.detach()
    return losses.sum(), {
        "pairs:sum": margins.new_tensor(len(margins)),
        "reward_margin:sum": margins.sum(),
        "reward_accuracy:sum": (margins > 0).to(margins.dtype).sum(),
    }


def _check_example(loss: Loss, name: str, example: Example) -> None:
    n = len(example.tokens)
    if n == 0:
        raise InvalidRequest(f"{name} has no tokens.", param=f"{name}.tokens")
    fields: dict[str, Tensor | None] = {"targets": example.targets, "weights": example.weights}
    if loss in POLICY:
        fields |= {"logprobs": example.logprobs, "advantages": example.advantages}
    for field, tensor in fields.items():
        if tensor is None:
            raise InvalidRequest(
                f"{name} has no {field}, which {loss} needs.", param=f"{name}.{field}"
            )
        if tuple(tensor.shape) != (n,):
            raise InvalidRequest(
                f"{name}.{field} has shape {list(tensor.shape)}; its {n} tokens want [{n}].",
                param=f"{name}.{field}",
            )


def _listed(names: Mapping[Any, object]) -> str:
    return ", ".join(names) or "nothing"


class _TargetLogprobs(torch.autograd.Function):
    """log_softmax and gather in one, which keeps one tensor of the logits' size and no more."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        index = targets.unsqueeze(-1)
        top = logits.amax(-1, keepdim=True)
        wanted = logits.gather(-1, index)
        powers = (logits - top).exp_()
        total = powers.sum(-1, keepdim=True)
        ctx.save_for_backward(powers, total, index)
        correct = (wanted >= top).squeeze(-1)
        ctx.mark_non_differentiable(correct)
        return (wanted - top - total.log()).squeeze(-1), correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        powers, total, index = ctx.saved_tensors
        grad = grads[0].unsqueeze(-1)
        return (powers * (-grad / total)).scatter_add_(-1, index, grad), None
