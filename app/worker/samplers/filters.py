"""What changes the odds of a token before one is drawn. Pure functions of tensors.

What comes in: logits [rows, vocabulary] and one value per row. What goes out: logits, changed
in place where that is cheaper. It must not know: sequences, batches.
"""

from __future__ import annotations

from torch import Tensor

NEVER = float("-inf")


def penalize(
    logits: Tensor,
    *,
    prompt: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> Tensor:
    """Push down what was said: `prompt` marks tokens of the prompt, `counts` those since."""
    said = counts > 0
    factor = repetition[:, None].expand_as(logits)
    repeated = logits.where(logits > 0, logits * factor).where(logits <= 0, logits / factor)
    logits = repeated.where(said | prompt, logits)
    return logits - frequency[:, None] * counts - presence[:, None] * said


def keep_likely(logits: Tensor, min_p: Tensor) -> Tensor:
    """Drop tokens less likely than `min_p` times the likeliest."""
    probabilities = logits.softmax(dim=-1)
    least = min_p[:, None] * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill_(probabilities < least, NEVER)


def keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the `top_k` likeliest tokens, and of those the fewest that add up to `top_p`.

    Tokens as likely as the k-th stay too. `top_k` is the whole vocabulary where it is off.
    """
    ordered, order = logits.sort(dim=-1)
    kth = ordered.gather(1, (ordered.shape[1] - top_k)[:, None])
    ordered = ordered.masked_fill(ordered < kth, NEVER)
    reached = ordered.softmax(dim=-1).cumsum(dim=-1)
    beyond = reached <= 1 - top_p[:, None]
    beyond[:, -1] = False
    ordered.masked_fill_(beyond, NEVER)
    return logits.scatter_(1, order, ordered)
