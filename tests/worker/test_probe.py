"""A probe says what the model says, of every kind of adapter and of nothing else."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from app.control.inspect_probe import checked_probe
from app.errors import InvalidRequest
from app.serving.verify import compare
from app.worker import probe
from app.worker.samplers.cache import KvRows
from app.worker.samplers.lora import read_adapter
from app.worker.samplers.model import CausalModel
from tests.worker.tiny import ADAPTERS

ROWS = [[10, 20, 30, 40, 50], [7, 7], [3, 1, 4, 1, 5, 9, 2, 6]]

pytestmark = pytest.mark.worker


def loaded(root: Path, name: str, dtype: str) -> Any:
    with warnings.catch_warnings():
        # PEFT uses what transformers deprecates; that is between the two.
        warnings.simplefilter("ignore")
        return probe.load(root / "model", root / name, dtype, "cpu")


def served(model: CausalModel, slot: str | None) -> list[list[float]]:
    """What the worker's own layers say."""
    found = []
    for row in ROWS:
        model.layers.use([slot])
        with torch.inference_mode():
            passes = model.prefill([row], KvRows(), every=True, pass_tokens=1000)
            logits = torch.cat([part for _, part in passes], dim=1)[0]
        scores = logits.log_softmax(-1)
        found.append([float(scores[at, token]) for at, token in enumerate(row[1:])])
    return found


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_worker_serves_what_the_probe_says(name: str, model: CausalModel, tiny: Path) -> None:
    found = probe.compute(loaded(tiny, name, "float32"), ROWS, "float32")
    model.layers.load(name, read_adapter(str(tiny / name), max_rank=8))
    right = compare(found, served(model, name), "float32")
    assert right.ok, str(right)
    assert not compare(found, served(model, None), "float32").ok


def test_what_is_computed_may_be_registered(tiny: Path) -> None:
    model = loaded(tiny, "narrow", "bfloat16")
    found = probe.compute(model, ROWS, "bfloat16")
    given: dict[str, Any] = {
        "token_ids": [list(row) for row in found.token_ids],
        "logprobs": [list(row) for row in found.logprobs],
        "dtype": found.dtype,
    }
    assert checked_probe(given, model.config.vocab_size) == found


def test_prompts_come_as_texts_or_token_ids(tiny: Path, tmp_path: Path) -> None:
    base = tiny / "model"
    file = tmp_path / "prompts"
    file.write_text("hello world\n\nonce upon a time\n")
    texts = probe.read_prompts(file)
    assert texts == ["hello world", "once upon a time"]
    file.write_text(json.dumps(["hello world", [5, 6, 7]]))
    mixed = probe.read_prompts(file)
    rows = probe.token_ids_of(mixed, base)
    assert (rows[0], rows[1]) == (probe.token_ids_of(texts, base)[0], [5, 6, 7])
    assert len(probe.token_ids_of([[1] * 600], base)[0]) == probe.MAX_IDS
    assert len(probe.token_ids_of(probe.read_prompts(None), base)) == len(probe.PROMPTS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[nonsense", "is not JSON"),
        ("[[1, -2]]", "not a list of texts"),
        ('["text", 7]', "not a list of texts"),
    ],
)
def test_prompts_that_are_none(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=says):
        probe.read_prompts(file)


def test_too_few_and_too_many(tiny: Path) -> None:
    for rows, says in (
        ([[1, 2], [3]], "prompt 1 has fewer than two tokens"),
        ([], "1 to 32 prompts, not 0"),
        ([[1, 2]] * 33, "1 to 32 prompts, not 33"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            probe.token_ids_of(rows, tiny)


def test_the_base_is_the_one_the_adapter_names(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(tiny / "model")}))
    assert probe.base_of(tmp_path) == tiny / "model"
    for named in ("meta-llama/Llama-3.1-8B", None):
        config.write_text(json.dumps({"base_model_name_or_path": named}))
        with pytest.raises(InvalidRequest, match="say where the base model's folder is"):
            probe.base_of(tmp_path)
