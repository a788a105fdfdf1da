"""What the Megatron trainer computes with Megatron-Bridge: as alone, and as the others do.

It runs in a Python of its own (`make bridge`), on a stand-in for Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from app.errors import ConfigurationError, InvalidRequest
from app.ops import Loss
from app.settings import Settings
from app.worker.trainers.base import Example, Pass
from app.worker.trainers.hf import HfTrainer
from tests.servers import ROOT, bridge_python
from tests.worker.megatron_checks import (
    STEP,
    agree,
    close,
    flat,
    learn,
    rows,
    vectors,
    weighted,
)
from tests.worker.megatron_lab import Lab
from tests.worker.trainees import examples, logprobs, peft, spec

pytestmark = [
    pytest.mark.worker,
    pytest.mark.bridge,
    # Three processes that import for seconds each: on a busy machine it adds up.
    pytest.mark.timeout(300),
]

ENGINE = ROOT / "tests" / "fakes" / "te"
#: A few batches, of which some have one sequence and some have several.
SETTINGS: dict[str, Any] = {"worker_megatron_engine": "bridge", "worker_train_tokens": 64}
SIZES: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary that two ranks have to pad, two groups of two heads."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Lab]]:
    """A trainer on one rank, and one on two that share every layer."""
    python = bridge_python()

    def start(ranks: int) -> Lab:
        return Lab(
            tmp_path_factory.mktemp(f"tp{ranks}"),
            launcher=(python, "-m"),
            env={"PYTHONPATH": f"{ROOT}:{ENGINE}"},
            worker_model=llama,
            worker_tensor_parallel=ranks,
            **SETTINGS,
        )

    with ThreadPoolExecutor() as pool:
        started = dict(zip(("tp1", "tp2"), pool.map(start, (1, 2)), strict=True))
        yield started
        assert not any(pool.map(Lab.end, started.values()))


@pytest.fixture(scope="module")
def given() -> list[Example]:
    """Of 193 tokens, which two ranks have to pad."""
    return weighted(examples(3, (40, 13, 70, 25, 12, 33)))


def hf(folder: Path) -> HfTrainer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return HfTrainer(model, Settings(), base_model=str(folder))


@pytest.mark.parametrize("loss", ["cross_entropy", "dpo"])
@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_loss_and_gradient_are_those_of_the_other_trainer(
    layout: str,
    loss: Loss,
    labs: dict[str, Lab],
    llama: Path,
    given: list[Example],
    tmp_path: Path,
) -> None:
    agree(labs[layout], hf(llama), given, loss, tmp_path)


def test_ten_steps_are_those_of_the_other_trainer_and_what_is_saved_is_what_peft_computes(
    labs: dict[str, Lab], llama: Path, given: list[Example], tmp_path: Path
) -> None:
    other = hf(llama)
    other.create("r", spec(1))
    first = vectors(other, "r", tmp_path / "first")["weights"]
    wanted = learn(other, "r", given, 10)
    assert wanted[-1] < 0.8 * wanted[0]
    for layout, trainer in labs.items():
        trainer.create("r", spec(1))
        assert torch.equal(vectors(trainer, "r", tmp_path / f"{layout} first")["weights"], first)
        close(learn(trainer, "r", given, 10), wanted, 1e-4)
        probe = flat(trainer.probe("r", rows(given)).logprobs)
        folder = tmp_path / layout
        folder.mkdir()
        trainer.save_adapter("r", folder)
        trainer.drop("r")
        model = peft(llama, folder)
        with torch.no_grad():
            found = torch.cat([logprobs(model, example) for example in given])
        close(probe, found, 1e-4)


def test_what_is_saved_is_what_bridge_exports(
    labs: dict[str, Lab], given: list[Example], tmp_path: Path
) -> None:
    trainer = labs["tp1"]
    trainer.create("r", spec(2))
    learn(trainer, "r", given, 1)
    trainer.probe("r", rows(given))
    trainer.save_adapter("r", tmp_path)
    ours = load_file(tmp_path / "adapter_model.safetensors")
    theirs = trainer.ask("exported_by_bridge")
    trainer.drop("r")
    assert ours.keys() == {f"base_model.model.{name}" for name in theirs}
    for name, tensor in theirs.items():
        assert torch.equal(ours[f"base_model.model.{name}"], tensor)


def test_a_state_goes_on_in_another_trainer_and_back(
    labs: dict[str, Lab], llama: Path, given: list[Example], tmp_path: Path
) -> None:
    """With the gradient of a pass that no step has used yet."""
    two, other, one = labs["tp2"], hf(llama), labs["tp1"]
    two.create("r", spec(3))
    learn(two, "r", given, 2)
    two.forward_backward([Pass("r", given)])
    for giver, taker, name in ((two, other, "there"), (other, one, "back")):
        folder = tmp_path / name
        folder.mkdir()
        giver.save_state("r", folder)
        taker.create("r", spec(4))
        taker.load_state("r", folder, optimizer=True)
        for each in (giver, taker):
            each.optim_step("r", STEP)
        close(learn(taker, "r", given, 2), learn(giver, "r", given, 2), 1e-4)
        giver.drop("r")
        taker.forward_backward([Pass("r", given)])
    one.drop("r")


def test_runs_of_other_shapes_taking_turns_are_as_if_alone(
    labs: dict[str, Lab], llama: Path, given: list[Example], tmp_path: Path
) -> None:
    """Bridge computes q, k and v together or not at all: those not asked for learn nothing."""
    trainer, other = labs["tp2"], hf(llama)
    specs = {
        "a": spec(1, modules=("q_proj", "mlp.up_proj")),
        "b": spec(2, rank=8, modules=("o_proj", "model.layers.1.mlp.down_proj")),
    }
    alone = {}
    for run, wanted in specs.items():
        other.create(run, wanted)
        alone[run] = learn(other, run, given, 3)
        trainer.create(run, wanted)
    turns: dict[str, list[float]] = {"a": [], "b": []}
    for _ in range(3):
        for run, result in zip(
            specs, trainer.forward_backward([Pass(run, given) for run in specs]), strict=True
        ):
            turns[run].append(result.metrics["loss:sum"])
        for run in specs:
            trainer.optim_step(run, STEP)
    close(turns, alone, 1e-4)
    for run in specs:
        folder = tmp_path / run
        folder.mkdir()
        trainer.save_adapter(run, folder)
        assert {
            name.split(".")[-3] for name in load_file(folder / "adapter_model.safetensors")
        } == {module.rpartition(".")[2] for module in specs[run].target_modules}
        trainer.drop(run)


def test_what_cannot_be_trained_is_refused(labs: dict[str, Lab]) -> None:
    trainer = labs["tp2"]
    with pytest.raises(InvalidRequest, match=r"no linear module 'lm_head'.*q_proj, k_proj"):
        trainer.create("r", spec(modules=("q_proj", "lm_head")))
    with pytest.raises(InvalidRequest, match=r"multiple of 2.*TENSOR_PARALLEL.*; 3 is not"):
        trainer.create("r", spec(rank=3))


def qwen2(folder: Path) -> None:
    """Biases on q, k and v; the head tied."""
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


def gemma(folder: Path) -> None:
    """One that Megatron-Core alone is not taught: other norms, another activation."""
    model = GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=32, hidden_act="gelu_pytorch_tanh"))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    model.save_pretrained(folder)


def stretched(folder: Path) -> None:
    """As Llama 3 does, by other numbers."""
    positions = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=positions)).save_pretrained(folder)


def experts(folder: Path) -> None:
    config = Qwen3MoeConfig(**SIZES, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def unknown(folder: Path) -> None:
    MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)).save_pretrained(folder)


REFUSED = {
    stretched: "positions of the type 'llama3', which Bridge computes otherwise",
    experts: "has experts, and only dense models",
    unknown: "cannot be built: Model architecture 'MixtralForCausalLM' is not yet supported",
}


def test_families_number_formats_and_the_other_engine(
    labs: dict[str, Lab], llama: Path, given: list[Example], tmp_path: Path
) -> None:
    """In one process: most of the time of another would be imports."""
    torch.manual_seed(0)
    folders = {make: tmp_path / make.__name__ for make in (qwen2, gemma, *REFUSED)}
    for make, folder in folders.items():
        make(folder)
    trainer = labs["tp1"]
    for folder, changed, tolerance in (
        (folders[gemma], {}, 1e-4),
        (folders[qwen2], {"worker_gradient_checkpointing": True, "worker_data_parallel": 2}, 1e-4),
        (llama, {"worker_dtype": "bfloat16"}, 0.1),
        (llama, {"worker_megatron_engine": "core"}, 1e-4),
    ):
        trainer.ask("close")
        trainer.again(worker_model=folder, **{**SETTINGS, **changed})
        other, curves = hf(folder), []
        for engine in (trainer, other):
            engine.create("r", spec())
            curves.append(learn(engine, "r", given, 3))
        close(*curves, tolerance)
    trainer.ask("close")
    for make, why in REFUSED.items():
        with pytest.raises(ConfigurationError, match=rf"{why}.*ENGINE=core"):
            trainer.again(worker_model=folders[make], **SETTINGS)
    trainer.again(worker_model=llama, **SETTINGS)
