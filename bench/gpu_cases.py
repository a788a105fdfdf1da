"""The cases of `bench.gpu_logprobs`: what is asked of which model and adapters.

What goes out: a case's record, and models, adapters and prompts, random but the same every time.
"""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parents[1] / "app" / "demo" / "model"
BASE = "base"
#: What each adapter changes. The last three change lm_head.
ADAPTERS = {
    "body-a": ("q_proj", "down_proj"),
    "body-b": ("v_proj", "o_proj", "gate_proj"),
    "head-a": ("lm_head", "q_proj", "down_proj"),
    "head-b": ("lm_head", "v_proj"),
    "head-only": ("lm_head",),
}
NAMES = (BASE, *ADAPTERS)
RANK = 8
PROMPTS, LONG = 36, 4


@dataclass
class Case:
    """A server to measure, and what it said."""

    name: str
    model: str
    dtype: str
    runner: str
    plugin: str
    graphs: bool
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    fault: str = ""
    features: Any = None
    start_s: float = 0.0
    #: By model name: prompt number to the logprobs of its tokens.
    prompts: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    #: By model name: token ids of prompt and answer, and logprobs of the answer.
    mixed: list[tuple[str, list[int], list[int], list[float]]] = field(default_factory=list)
    quiet: list[tuple[str, list[int], list[int], list[float]]] = field(default_factory=list)
    #: By kind of request: how many a second, one number a round.
    rates: dict[str, list[float]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def case_of(text: str) -> Case:
    """The case that a user wrote."""
    model, dtype, runner, plugin, *rest = text.split(":")
    return Case(text, model, dtype, runner, plugin, rest == ["graphs"])


def write_model(folder: Path, device: str, spread: float) -> None:
    """A Llama of 1.1 billion random weights; its logits have a deviation of about 0.9 * spread."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.fill_(spread)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(32000)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(folder)


def write_adapters(model: Path, folder: Path, device: str) -> None:
    """The adapters of `ADAPTERS`, as PEFT saves them, with random weights."""
    for seed, (name, targets) in enumerate(ADAPTERS.items()):
        generator = torch.Generator().manual_seed(seed)
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=list(targets), task_type="CAUSAL_LM"
        )
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
        found = get_peft_model(base, config)
        with torch.no_grad():
            for key, weight in found.named_parameters():
                if "lora_" in key:
                    weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
        found.save_pretrained(folder / name, save_embedding_layers=False)


def prompts_of(model: str, limit: int) -> list[list[int]]:
    """Rows of random token ids, most of them short, the last few of several chunks."""
    vocabulary = 2048 if model == "demo" else 32000
    drawn = random.Random(model)
    lengths = [drawn.randint(5, 200) for _ in range(PROMPTS)] + [limit * 3 // 4] * LONG
    return [[drawn.randrange(5, vocabulary) for _ in range(length)] for length in lengths]


def limit_of(model: str) -> int:
    return 1024 if model == "demo" else 2048
