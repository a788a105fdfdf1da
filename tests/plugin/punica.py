"""vLLM's bookkeeping of a step, as far as the plugin touches it, and a model on top.

What comes in: the adapter of each token and of each sampled row. What goes out: wrappers, layers
and runners with vLLM 0.32's names. A layer's logits show which adapter each row was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

ROOM = 64


class PunicaWrapperCPU:
    """Which adapter each row has; -1 is none."""

    def __init__(self, tokens: Sequence[int], sampled: Sequence[int]) -> None:
        self._token_lora_indices = torch.full((ROOM,), 99)
        self._sampler_indices = torch.full((ROOM,), 99)
        self._token_lora_indices[: len(tokens)] = torch.tensor(tokens)
        self._sampler_indices[: len(sampled)] = torch.tensor(sampled)
        self.indices_len: list[int | None] = [len(tokens), len(sampled), None, None]

    @property
    def sampler_indices(self) -> torch.Tensor:
        return self._sampler_indices[: self.indices_len[1]]

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
    ) -> None:
        raise AssertionError("the plugin puts its own here")


class PunicaWrapperGPU(PunicaWrapperCPU):
    """The kernels read `meta` and not the indices."""

    def __init__(self, tokens: Sequence[int], sampled: Sequence[int]) -> None:
        super().__init__(tokens, sampled)
        self.prompt_mapping_meta = Meta()
        self.prompt_mapping_meta.prepare_tensors(self.sampler_indices)


class Meta:
    def __init__(self) -> None:
        self.rows: list[int] = []

    def prepare_tensors(self, token_lora_mapping: torch.Tensor) -> None:
        self.rows = token_lora_mapping.tolist()


class LogitsProcessorWithLoRA(torch.nn.Module):
    """Logits that are the adapter of the row."""

    def __init__(self, punica_wrapper: PunicaWrapperCPU) -> None:
        super().__init__()
        self.punica_wrapper = punica_wrapper

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        punica = self.punica_wrapper
        meta = getattr(punica, "prompt_mapping_meta", None)
        adapters = punica.sampler_indices if meta is None else torch.tensor(meta.rows)
        assert adapters.shape[0] == rows.shape[0]
        return adapters.float().unsqueeze(1)


class Model(torch.nn.Module):
    def __init__(self, punica: PunicaWrapperCPU | None) -> None:
        super().__init__()
        self.logits_processor = torch.nn.Identity()
        if punica is not None:
            self.logits_processor = LogitsProcessorWithLoRA(punica)

    def compute_logits(self, rows: torch.Tensor) -> Any:
        return self.logits_processor(rows)


class FirstRunner:
    """Computes the prompt logits of each request by itself."""

    def __init__(self, model: Model, slices: dict[str, slice]) -> None:
        self.model = model
        self.num_prompt_logprobs = dict.fromkeys(slices, 1)
        self._slices = slices

    def get_model(self) -> Model:
        return self.model

    def _get_prompt_logprobs_dict(
        self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, torch.Tensor]:
        return {
            name: self.model.compute_logits(hidden_states[rows])
            for name, rows in self._slices.items()
        }


class PromptLogprobsWorker:
    """The second runner's: computes the logits of all rows, some at a time."""

    def compute_prompt_logprobs(
        self,
        logits_fn: Callable[[torch.Tensor], torch.Tensor],
        hidden_states: torch.Tensor,
        input_batch: SimpleNamespace,
    ) -> list[int]:
        rows = hidden_states[: input_batch.num_tokens]
        parts = [logits_fn(rows[start : start + 2]) for start in range(0, rows.shape[0], 2)]
        return [int(adapter) for adapter in torch.cat(parts).squeeze(1).tolist()]
