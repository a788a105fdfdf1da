"""What ships is small, safe to open, known to the manifest, and nothing that a server refuses."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app import demo

FOLDERS = [demo.MODEL_DIR, *demo.ADAPTERS.values()]


def files() -> list[Path]:
    return [path for folder in FOLDERS for path in folder.iterdir()]


def header(path: Path) -> dict[str, Any]:
    """The safetensors header, read without any library."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return dict(json.loads(stream.read(length)))


def test_everything_together_is_small() -> None:
    assert sum(path.stat().st_size for path in files()) <= 12 * 1024 * 1024


def test_only_json_and_safetensors_are_shipped() -> None:
    assert {path.suffix for path in files()} == {".json", ".safetensors"}


def test_the_manifest_knows_every_file() -> None:
    manifest = json.loads(demo.MANIFEST.read_text(encoding="utf-8"))
    root = demo.MANIFEST.parent
    found = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files()
    }
    assert found == manifest["files"]
    assert set(manifest["adapters"]) == set(demo.ADAPTERS)


def test_the_base_is_a_small_llama_that_vllm_can_run() -> None:
    config = json.loads((demo.MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] // config["num_attention_heads"] == 64
    assert config["tie_word_embeddings"] is True
    assert config["bos_token_id"] is None
    assert config["dtype"] == "float32"
    assert config["max_position_embeddings"] >= 1024
    ends = json.loads((demo.MODEL_DIR / "generation_config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] in ends["eos_token_id"]


def test_the_base_is_stored_in_half_precision_without_a_head() -> None:
    tensors = header(demo.MODEL_DIR / "model.safetensors")
    tensors.pop("__metadata__")
    assert {tensor["dtype"] for tensor in tensors.values()} == {"F16"}
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize("name", demo.ADAPTERS)
def test_adapters_are_plain_lora_of_the_base(name: str) -> None:
    config = json.loads((demo.ADAPTERS[name] / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == demo.BASE_NAME
    assert config["r"] <= 16
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["use_rslora"]
    assert not config["modules_to_save"]
    tensors = header(demo.ADAPTERS[name] / "adapter_model.safetensors")
    tensors.pop("__metadata__", None)
    assert all(".lora_A." in tensor or ".lora_B." in tensor for tensor in tensors)


def test_adapters_differ_in_rank_and_targets() -> None:
    configs = [
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        for folder in demo.ADAPTERS.values()
    ]
    assert len({config["r"] for config in configs}) >= 3
    assert len({tuple(config["target_modules"]) for config in configs}) >= 3


def test_asking_where_the_model_is_does_not_import_torch() -> None:
    code = "import sys, app.demo; sys.exit('torch' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
