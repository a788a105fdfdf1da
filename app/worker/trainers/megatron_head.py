"""From the last layer's hidden states to the logprobs of targets, over ranks that share a
vocabulary.

What comes in: hidden states, Megatron's output layer. What goes out: logprobs, whole on every
rank. It must not know: layers, adapters, losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from app.worker.trainers.megatron_core import parallel_state, vocab_parallel_cross_entropy


class Head:
    """The words of the vocabulary that are real are the first `vocabulary`."""

    #: Logits of one slice are kept under this many numbers (256 MiB as float32).
    logits_max = 1 << 26

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def logprobs(
        self, hidden: Tensor, targets: Tensor, layer: Any, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A vocabulary times a long batch is more than all the layers: logits are made a slice
        of tokens at a time, and again on the way back.

        Args:
            hidden: [tokens, 1, hidden].
            targets: int64 [tokens].
            weight: of a `layer` that shares the embedding's.

        Returns:
            The targets' logprobs, float32 [tokens], and whether each is the likeliest.
        """
        size = max(1, self.logits_max // layer.output_size_per_partition)
        if size >= len(hidden):
            return self._slice(hidden, targets, layer, weight)
        parts = [
            twice(self._slice, piece, wanted, layer, weight)
            for piece, wanted in zip(
                torch.split(hidden, size), torch.split(targets, size), strict=True
            )
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _slice(
        self, hidden: Tensor, targets: Tensor, layer: Any, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits = layer(hidden, weight=weight)[0][:, 0]
        mine = logits.shape[-1]
        first = parallel_state.get_tensor_model_parallel_rank() * mine
        if first + mine > self.vocabulary:
            kept = max(0, self.vocabulary - first)
            logits = functional.pad(logits[:, :kept], [0, mine - kept], value=float("-inf"))
        correct = _likeliest(logits.detach(), first) == targets
        # Megatron computes in place what it is given in float32.
        losses = vocab_parallel_cross_entropy(logits.float().unsqueeze(1), targets.unsqueeze(1))
        return -losses[:, 0], correct


def twice(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Its result; what the gradient needs of it is computed again when it is needed."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _likeliest(logits: Tensor, first: int) -> Tensor:
    """The token of the greatest logit over all ranks, the lowest where several are equal."""
    group = parallel_state.get_tensor_model_parallel_group()
    top, index = logits.max(-1)
    greatest = top.clone()
    torch.distributed.all_reduce(greatest, torch.distributed.ReduceOp.MAX, group)
    index = torch.where(top == greatest, index + first, torch.iinfo(index.dtype).max)
    torch.distributed.all_reduce(index, torch.distributed.ReduceOp.MIN, group)
    return index
