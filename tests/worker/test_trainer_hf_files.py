"""What a run leaves on disk: a state it goes on from exactly, an adapter that others load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from app.errors import InvalidRequest, RunLost
from app.ops import OptimStep
from app.worker import probe as plain_probe
from app.worker.samplers.lora import LoraLayers, read_adapter
from app.worker.trainers.base import Pass
from app.worker.trainers.hf import HfTrainer
from tests.worker.trainees import (
    ATTENTION,
    DEMO,
    LINEARS,
    examples,
    passes,
    peft,
    spec,
    stir,
    trainer,
)

STEP = OptimStep(learning_rate=1e-3, weight_decay=0.01, grad_clip_norm=1.0)
ROWS = ((5, 9, 2, 200, 17, 3), (7, 7, 7), (250, 1))


def learn(engine: HfTrainer, steps: range) -> list[float]:
    losses = []
    for number in steps:
        (result,) = passes(engine, Pass("run", examples(number, [20, 13])))
        losses.append(result.metrics["loss:sum"])
        engine.optim_step("run", STEP)
    return losses


@pytest.fixture
def engine(tiny: Path) -> HfTrainer:
    made, _ = trainer(tiny / "model")
    made.create("run", spec(3))
    return made


def test_a_restored_run_goes_on_exactly(engine: HfTrainer, tiny: Path, tmp_path: Path) -> None:
    """Saved between a pass and its step, so that the gradient matters too."""
    learn(engine, range(4))
    passes(engine, Pass("run", examples(50, [9])))
    engine.save_state("run", tmp_path)
    expected = learn(engine, range(4, 8))

    other, _ = trainer(tiny / "model")
    other.create("run", spec(99))
    other.load_state("run", tmp_path, optimizer=True)
    assert learn(other, range(4, 8)) == expected
    assert torch.equal(other._runs["run"].weights, engine._runs["run"].weights)


def test_weights_alone_start_the_optimizer_anew(engine: HfTrainer, tmp_path: Path) -> None:
    learn(engine, range(4))
    passes(engine, Pass("run", examples(50, [9])))
    engine.save_state("run", tmp_path)
    engine.create("other", spec(8))
    engine.load_state("other", tmp_path, optimizer=False)
    one, other = engine._runs["run"], engine._runs["other"]
    assert torch.equal(other.weights, one.weights)
    assert other.moments.steps == 0
    assert not any(vector.any() for vector in (other.gradient, other.moments.exp_avg))
    engine.optim_step("run", STEP)
    assert not torch.equal(other.weights, one.weights)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (spec(rank=8), "with rank 4; this run has 8"),
        (spec(alpha=1), "with alpha 8; this run has 1"),
        (spec(modules=ATTENTION), r"with target_modules \[.*'up_proj.*; this run has \['k_proj'"),
    ],
)
def test_the_state_of_another_shape_is_refused(
    engine: HfTrainer, tmp_path: Path, shape: object, message: str
) -> None:
    engine.save_state("run", tmp_path)
    engine.create("other", shape)  # type: ignore[arg-type]
    before = engine._runs["other"].weights.clone()
    with pytest.raises(InvalidRequest, match=message):
        engine.load_state("other", tmp_path, optimizer=True)
    assert torch.equal(engine._runs["other"].weights, before)


@pytest.mark.parametrize("modules", [LINEARS, ("q_proj", "lm_head")])
def test_a_saved_adapter_gives_the_probe_in_peft_and_in_the_sampler(
    tiny: Path, tmp_path: Path, modules: tuple[str, ...]
) -> None:
    engine, model = trainer(tiny / "model")
    engine.create("run", spec(3, rank=8, alpha=32, modules=modules))
    stir(engine, "run", size=0.1)
    learn(engine, range(3))
    engine.save_adapter("run", tmp_path)
    found = engine.probe("run", ROWS)
    assert found.token_ids == ROWS
    assert found.dtype == "float32"

    alone = plain_probe.compute(peft(tiny / "model", tmp_path), ROWS, "float32")
    layers = LoraLayers(model.model)
    layers.load("slot", read_adapter(str(tmp_path), max_rank=64))
    layers.use(["slot"])
    served = plain_probe.compute(model.model, ROWS, "float32")
    for ours, theirs, again in zip(found.logprobs, alone.logprobs, served.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert ours == pytest.approx(again, abs=1e-4)


def test_a_saved_adapter_of_the_demo_model_gives_the_probe(tmp_path: Path) -> None:
    engine, _ = trainer(DEMO)
    engine.create("run", spec(3, rank=16, alpha=32))
    learn(engine, range(2))
    engine.save_adapter("run", tmp_path)
    found = engine.probe("run", ROWS)
    alone = plain_probe.compute(peft(DEMO, tmp_path), ROWS, "float32")
    for ours, theirs in zip(found.logprobs, alone.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_the_same_weights_are_the_same_bytes(engine: HfTrainer, tmp_path: Path) -> None:
    learn(engine, range(1))
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        engine.save_adapter("run", tmp_path / name)
        written.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    assert written[0].keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_config_is_read_by_peft(engine: HfTrainer, tiny: Path, tmp_path: Path) -> None:
    engine.save_adapter("run", tmp_path)
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha, config.bias) == (4, 8, "none")
    assert config.target_modules == set(LINEARS)
    assert config.base_model_name_or_path == str(tiny / "model")
    written = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert written["task_type"] == "CAUSAL_LM"


def test_a_run_that_was_dropped_is_lost(engine: HfTrainer, tmp_path: Path) -> None:
    engine.drop("run")
    engine.drop("run")
    with pytest.raises(RunLost, match="no run 'run'"):
        engine.save_state("run", tmp_path)


def test_closing_lets_go_of_every_run(engine: HfTrainer) -> None:
    engine.close()
    with pytest.raises(RunLost):
        engine.probe("run", ROWS)
