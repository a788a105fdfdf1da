"""What transformers and PEFT say: adapters made for a test, and logprobs to compare with.

What comes in: a folder to write to, token ids. What goes out: logprobs of every next token, from a
forward pass of the whole row, in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from app import demo


def write_random_adapter(
    folder: Path, targets: Sequence[str], *, seed: int, spread: float = 0.05
) -> Path:
    """A LoRA of the demo model with random weights on `targets`, as PEFT saves it."""
    generator = torch.Generator().manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(targets), task_type="CAUSAL_LM")
    with _quiet():
        model = get_peft_model(_base(), config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.copy_(spread * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


class Reference:
    """The demo model, with an adapter or without."""

    def __init__(self, adapter: Path | None) -> None:
        with _quiet():
            model = _base()
            self._model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        self._model.eval()

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """[position, token]: row i is about the token at position i + 1."""
        logits = self._model(torch.tensor([list(tokens)])).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)


def _base() -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    return model


class _quiet(warnings.catch_warnings):
    """PEFT warns that an lm_head tied to the embeddings cannot be merged; nothing here merges."""

    def __init__(self) -> None:
        super().__init__(action="ignore")
