"""Adapters in a model: the same numbers as PEFT, and all of an adapter or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.errors import AdapterLoadFailed, NotFound
from app.worker.samplers import lora
from app.worker.samplers.cache import KvRows
from app.worker.samplers.lora import CONFIG, WEIGHTS, read_adapter
from app.worker.samplers.model import CausalModel
from tests.worker.tiny import ADAPTERS, plain, write_adapter

PROMPT = [10, 20, 30, 40, 50]

pytestmark = pytest.mark.worker


def logits(model: CausalModel, slots: list[str | None]) -> torch.Tensor:
    model.layers.use(slots)
    with torch.inference_mode():
        passes = model.prefill([PROMPT] * len(slots), KvRows(), every=True, pass_tokens=1000)
        return torch.cat([found for _, found in passes], dim=1)


def place(model: CausalModel, slot: str, folder: Path, max_rank: int = 8) -> None:
    model.layers.load(slot, read_adapter(str(folder), max_rank=max_rank))


def copy(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    known = json.loads((target / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps({**known, **config}))
    return target


def test_a_mixed_batch_gives_each_row_what_peft_gives_it_alone(
    model: CausalModel, tiny: Path
) -> None:
    for name in ADAPTERS:
        place(model, name, tiny / name)
    slots = [None, *ADAPTERS, "wide"]
    found = logits(model, slots)
    for row, name in enumerate(slots):
        with torch.inference_mode():
            expected = plain(tiny, name)(torch.tensor([PROMPT])).logits[0]
        assert torch.allclose(found[row], expected, atol=1e-4), name


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_second_one_of_a_kind_gives_what_peft_gives_it(
    model: CausalModel, tiny: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(tiny / "model")
    write_adapter(tiny / "model", tmp_path / name, seed=9, **ADAPTERS[name])
    place(model, "one", tiny / name)
    if name != "embedding":  # which is not kept as it is in the file

        def asked(*_: Any, **__: Any) -> None:
            raise AssertionError("PEFT knows nothing new of this one")

        monkeypatch.setattr(lora, "inject_adapter_in_model", asked)
    place(model, "two", tmp_path / name)
    one, two = logits(model, ["one", "two"])
    for found, root in ((one, tiny), (two, tmp_path)):
        with torch.inference_mode():
            expected = plain(root, name)(torch.tensor([PROMPT])).logits[0]
        assert torch.allclose(found, expected, atol=1e-4)


def test_one_with_other_settings_is_of_another_kind(
    model: CausalModel, tiny: Path, tmp_path: Path
) -> None:
    place(model, "one", tiny / "narrow")
    place(model, "two", copy(tiny / "narrow", tmp_path / "two", lora_alpha=32))
    one, two, base = logits(model, ["one", "two", None])
    assert not torch.allclose(one, two, atol=1e-3)
    assert not torch.allclose(two, base, atol=1e-3)


def test_the_same_files_may_be_there_twice(model: CausalModel, tiny: Path) -> None:
    place(model, "one", tiny / "wide")
    place(model, "two", tiny / "wide")
    one, two, base = logits(model, ["one", "two", None])
    assert torch.equal(one, two)
    assert not torch.allclose(one, base)
    model.layers.unload("one")
    assert torch.allclose(logits(model, ["two"])[0], two, atol=1e-5)


def test_nothing_is_left_of_an_unloaded_adapter(model: CausalModel, tiny: Path) -> None:
    before = logits(model, [None])
    place(model, "slot", tiny / "wide")
    model.layers.unload("slot")
    model.layers.unload("slot")
    assert torch.equal(logits(model, [None]), before)
    assert not [name for name, _ in model.model.named_parameters() if "slot" in name]


def missing_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / WEIGHTS)


def extra_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(8, 128)
    save_file(weights, folder / WEIGHTS)


def wrong_shape(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = sorted(weights)[-1]
    weights[name] = torch.zeros(3, 3)
    save_file(weights, folder / WEIGHTS)


def wrong_module(folder: Path) -> None:
    known = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**known, "target_modules": ["no_such"]}))


@pytest.mark.parametrize("damage", [missing_tensor, extra_tensor, wrong_shape, wrong_module])
def test_half_an_adapter_is_none(
    model: CausalModel, tiny: Path, tmp_path: Path, damage: Any
) -> None:
    place(model, "good", tiny / "narrow")
    before = logits(model, ["good", None])
    damage(copy(tiny / "wide", tmp_path / "bad"))
    with pytest.raises(AdapterLoadFailed):
        place(model, "bad", tmp_path / "bad")
    assert torch.equal(logits(model, ["good", None]), before)
    assert not [name for name, _ in model.model.named_parameters() if ".bad" in name]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"bias": "all"}, "bias=all"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_what_would_be_served_wrong_is_refused(
    tiny: Path, tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    folder = copy(tiny / "narrow", tmp_path / "odd", **config)
    with pytest.raises(AdapterLoadFailed, match=named):
        read_adapter(str(folder), max_rank=8)


def test_a_rank_above_the_limit(tiny: Path, tmp_path: Path) -> None:
    folder = write_adapter(
        tiny / "model", tmp_path / "big", target_modules=["q_proj"], rank_pattern={"q_proj": 32}
    )
    with pytest.raises(AdapterLoadFailed, match="LoRA rank 32 is greater than max_lora_rank 8"):
        read_adapter(str(folder), max_rank=8)


def test_no_files_and_broken_files(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="No adapter found"):
        read_adapter(str(tmp_path / "missing"), max_rank=8)
    folder = copy(tiny / "narrow", tmp_path / "torn")
    (folder / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(AdapterLoadFailed):
        read_adapter(str(folder), max_rank=8)
