"""A second module tree over the parameters of a model that serves.

What comes in: a transformers model. What goes out: logprobs of it, with gradients for adapters,
while the first goes on sampling on its own thread. It must not know: runs, losses.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from app.errors import ConfigurationError
from app.worker.losses import target_logprobs
from app.worker.trainers import attention
from app.worker.trainers.lora import Sites

# Logits of one slice are kept under this many numbers (256 MiB as float32).
LOGITS_MAX = 1 << 26


def twin(model: Any) -> Any:
    """Other modules with the same parameter and buffer tensors, frozen, in evaluation mode."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigurationError(
            f"{type(model).__name__} has PEFT layers already; start the trainer before adapters "
            "are loaded."
        )
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo).requires_grad_(False).eval()


class SharedModel:
    """The base as it is trained on: sequences end to end in one row, adapters at its `sites`.

    Raises:
        ConfigurationError: the model computes something else in that form.
    """

    def __init__(self, model: Any, *, checkpointing: bool = False) -> None:
        self._model = twin(model)
        self._model.set_attn_implementation(attention.NAME)
        self._head = self._model.get_output_embeddings()
        self.sites = Sites(self._model)
        first = next(self._model.parameters())
        self.device, self.dtype = first.device, first.dtype
        text = self._model.config.get_text_config()
        self.vocabulary: int = text.vocab_size
        self.max_length: int = text.max_position_embeddings
        self._compare(model)
        if checkpointing:
            self._checkpoint()

    def logprobs(
        self, ids: Tensor, targets: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Log p(target), float32, and whether it was the likeliest: [tokens] each.

        A vocabulary times a long batch is more than all the layers: logits are made for a slice of
        tokens at a time, and again on the way back.

        Args:
            ids, targets: sequences end to end, [tokens].
            lengths: how long each sequence is.
        """
        hidden = self._hidden(ids, lengths)
        targets = targets.to(self.device)
        size = max(1, LOGITS_MAX // self.vocabulary)
        if size >= len(targets):
            return self._slice(hidden, targets, 0)
        parts = [
            checkpoint(
                self._slice,
                hidden[:, start : start + size],
                targets[start : start + size],
                start,
                use_reentrant=False,
            )
            for start in range(0, len(targets), size)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _hidden(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        sequences = attention.Sequences(lengths, self.device)
        output = self._model.base_model(
            input_ids=ids[None].to(self.device),
            position_ids=sequences.positions.to(self.device),
            use_cache=False,
            sequences=sequences,
        )
        return cast(Tensor, output.last_hidden_state)

    def _slice(self, hidden: Tensor, targets: Tensor, start: int) -> tuple[Tensor, Tensor]:
        with self.sites.only(start, start + len(targets)):
            logits = self._head(hidden)[0]
        return target_logprobs(logits, targets)

    def _checkpoint(self) -> None:
        for module in self._model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = True
                again = partial(checkpoint, use_reentrant=False)
                setattr(module, "_gradient_checkpointing_func", again)  # noqa: B010
                # Its own flag alone: training would also turn on the dropout inside.
                module.training = True

    @torch.no_grad()
    def _compare(self, model: Any) -> None:
        """Two sequences in one row must give what each gives in the model that serves.

        Some models scale or cap their logits behind the output layer, or mix tokens elsewhere
        than in attention.
        """
        ids = torch.arange(7) % self.vocabulary
        ours, _ = self.logprobs(ids, ids, (4, 3))
        parts = []
        for part in torch.split(ids, [4, 3]):
            row = part[None].to(self.device)
            parts.append(target_logprobs(model(input_ids=row, use_cache=False).logits, row)[0][0])
        tolerance = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1
        if not torch.allclose(ours, torch.cat(parts), atol=tolerance, rtol=tolerance):
            raise ConfigurationError(
                f"{type(model).__name__} computes other logprobs for sequences in one row; this "
                "trainer cannot train it. Set LORAGATE_WORKER_TRAINER=off."
            )
