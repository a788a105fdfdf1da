"""The demo model's shape, and how it and its adapters are written down and read back.

What comes in: folders and models. What goes out: models in float32, files that do not depend on the
day they were written. It must not know about the corpus.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from app.demo import BASE_NAME
from app.demo.styles import Style
from app.demo.tokenizer import END_OF_TEXT_ID, TURN_END_ID, VOCABULARY

CONTEXT = 1024


def create() -> LlamaForCausalLM:
    """A new base model with random weights; seed torch first."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=TURN_END_ID,
        pad_token_id=END_OF_TEXT_ID,
        dtype=torch.float32,
    )
    return LlamaForCausalLM(config)


def save_base(model: LlamaForCausalLM, folder: Path) -> None:
    """Weights as float16 (half the bytes), a config that says float32: that is how it is served."""
    tensors = {
        name: tensor.detach().half().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = model.config.to_diff_dict()
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "head_dim": 64}
    config |= {"tie_word_embeddings": True, "rope_theta": 10000.0, "bos_token_id": None}
    _write_json(folder / "config.json", config)
    ends = {"eos_token_id": [TURN_END_ID, END_OF_TEXT_ID], "pad_token_id": END_OF_TEXT_ID}
    _write_json(folder / "generation_config.json", ends)


def load_base(folder: Path) -> LlamaForCausalLM:
    """The stored base in float32: its weights are float16 values, as every server sees them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert isinstance(model, LlamaForCausalLM)
    return model


def lora_config(style: Style) -> LoraConfig:
    """Plain LoRA, nothing that an engine could refuse."""
    return LoraConfig(
        r=style.rank,
        lora_alpha=2 * style.rank,
        target_modules=list(style.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """As PEFT saves it, but the base is called by its name and lists have one order."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").chmod(0o644)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    _write_json(path, config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
