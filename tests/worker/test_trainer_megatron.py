"""What the Megatron trainer computes: the same for every layout of ranks, and as the others do.

The demo model has three heads, so two tensor-parallel ranks pad it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from app.errors import InvalidRequest, NonFiniteLoss, RunLost
from app.ops import Loss
from app.settings import Settings
from app.worker.trainers.base import Example, Pass
from app.worker.trainers.hf import HfTrainer
from tests.worker.megatron_checks import (
    STATE,
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
from tests.worker.trainees import DEMO, examples, logprobs, peft, spec, trainer

pytestmark = [
    pytest.mark.worker,
    pytest.mark.skipif(find_spec("megatron") is None, reason="pip install 'loragate[megatron]'"),
]

LAYOUTS: dict[str, dict[str, object]] = {
    "tp1": {},
    "tp2": {"worker_tensor_parallel": 2},
    "dp2": {"worker_data_parallel": 2},
    "pp2": {"worker_pipeline_parallel": 2},
}
#: A few batches, of which some have one sequence and some have several.
SETTINGS = {"worker_model": DEMO, "worker_train_tokens": 64}

Labs = Callable[[str], Lab]


@pytest.fixture(scope="module")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Labs]:
    """A trainer of each layout, started when it is first asked for."""
    started: dict[str, Lab] = {}

    def lab(layout: str) -> Lab:
        if layout not in started:
            folder = tmp_path_factory.mktemp(layout)
            started[layout] = Lab(folder, **SETTINGS, **LAYOUTS[layout])
        return started[layout]

    yield lab
    with ThreadPoolExecutor() as pool:
        assert not any(pool.map(Lab.end, started.values()))


@pytest.fixture(scope="module")
def given() -> list[Example]:
    return weighted(examples(3, (40, 13, 70, 25, 12, 33), vocabulary=2048))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_run_is_the_base(layout: str, labs: Labs, given: list[Example]) -> None:
    lab = labs(layout)
    lab.create("base", spec())
    probe = lab.probe("base", rows(given))
    base, _ = trainer(DEMO)
    base.create("base", spec())
    close(flat(probe.logprobs), flat(base.probe("base", rows(given)).logprobs), 1e-5)
    assert probe.dtype == "float32"
    lab.drop("base")
    with pytest.raises(RunLost, match="'base'"):
        lab.probe("base", rows(given))


@pytest.mark.parametrize("loss", ["cross_entropy", "dpo", "ppo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_those_of_the_other_trainer(
    layout: str, loss: Loss, labs: Labs, given: list[Example], tmp_path: Path
) -> None:
    other, _ = trainer(DEMO)
    agree(labs(layout), other, given, loss, tmp_path)


def test_first_weights_depend_on_the_seed_alone(labs: Labs, tmp_path: Path) -> None:
    other, _ = trainer(DEMO)
    other.create("r", spec(5))
    wanted = vectors(other, "r", tmp_path / "hf")["weights"]
    for layout in LAYOUTS:
        labs(layout).create("r", spec(5))
        found = vectors(labs(layout), "r", tmp_path / layout)["weights"]
        assert torch.equal(found, wanted)
        labs(layout).drop("r")


def test_ten_steps_are_the_same_on_every_layout_and_in_peft(
    labs: Labs, given: list[Example], tmp_path: Path
) -> None:
    curves, probes = {}, {}
    for layout in LAYOUTS:
        lab = labs(layout)
        lab.create("r", spec(1))
        curves[layout] = learn(lab, "r", given, 10)
        probes[layout] = flat(lab.probe("r", rows(given)).logprobs)
        folder = tmp_path / layout
        folder.mkdir()
        lab.save_adapter("r", folder)
        lab.drop("r")
        model = peft(DEMO, folder)
        with torch.no_grad():
            wanted = torch.cat([logprobs(model, example) for example in given])
        close(probes[layout], wanted, 1e-4)
    assert curves["tp1"][-1] < 0.8 * curves["tp1"][0]
    for layout in LAYOUTS:
        close(curves[layout], curves["tp1"], 1e-4)
        close(probes[layout], probes["tp1"], 2e-3)


def test_padded_heads_stay_zero_and_are_not_exported(
    labs: Labs, given: list[Example], tmp_path: Path
) -> None:
    lab = labs("tp2")
    lab.create("r", spec(2))
    learn(lab, "r", given, 3)
    first, second = (part["weights"] for part in lab.ask("_team.call", "pieces", "r", ("weights",)))
    attention = "model.layers.5.self_attn"
    for name in ("q_proj", "k_proj", "v_proj"):
        # Three heads of 64: the second rank's are one of the model and one of zeros.
        rows = second[f"{attention}.{name}.lora_B.weight"]
        assert rows.shape[0] == 128
        assert rows[:64].abs().max() > 0
        assert torch.equal(rows[64:], torch.zeros_like(rows[64:]))
    columns = second[f"{attention}.o_proj.lora_A.weight"]
    assert torch.equal(columns[:, 64:], torch.zeros_like(columns[:, 64:]))
    lab.save_adapter("r", tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    prefix = f"base_model.model.{attention}"
    q, o = saved[f"{prefix}.q_proj.lora_B.weight"], saved[f"{prefix}.o_proj.lora_A.weight"]
    assert (q.shape, o.shape) == ((192, 4), (4, 192))
    assert torch.equal(q[:128], first[f"{attention}.q_proj.lora_B.weight"])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    lab.drop("r")


def test_a_state_goes_on_in_another_layout(
    labs: Labs, given: list[Example], tmp_path: Path
) -> None:
    """With the gradient of a pass that no step has used yet."""
    two, one = labs("tp2"), labs("tp1")
    two.create("r", spec(3))
    learn(two, "r", given, 3)
    two.forward_backward([Pass("r", given)])
    two.save_state("r", tmp_path)
    two.optim_step("r", STEP)
    one.create("r", spec(4))
    one.load_state("r", tmp_path, optimizer=True)
    one.optim_step("r", STEP)
    close(learn(one, "r", given, 3), learn(two, "r", given, 3), 1e-4)
    one.load_state("r", tmp_path, optimizer=False)
    found = vectors(one, "r", tmp_path / "weights only")
    assert torch.equal(found["weights"], load_file(tmp_path / STATE)["weights"])
    assert not found["exp_avg"].any()
    one.create("narrow", spec(4, modules=("q_proj",)))
    with pytest.raises(InvalidRequest, match="modules"):
        one.load_state("narrow", tmp_path, optimizer=True)
    for lab, run in ((one, "r"), (one, "narrow"), (two, "r")):
        lab.drop(run)


def test_runs_taking_turns_are_as_if_alone(labs: Labs, given: list[Example]) -> None:
    lab = labs("tp2")
    specs = {
        "a": spec(1, modules=("q_proj", "v_proj")),
        "b": spec(2, rank=8, modules=("mlp.up_proj", "o_proj")),
    }
    alone = {}
    for run, wanted in specs.items():
        lab.create(run, wanted)
        alone[run] = learn(lab, run, given, 3)
        lab.drop(run)
        lab.create(run, wanted)
    turns: dict[str, list[float]] = {"a": [], "b": []}
    for _ in range(3):
        results = lab.forward_backward([Pass("a", given), Pass("b", given)])
        for run, result in zip(specs, results, strict=True):
            turns[run].append(result.metrics["loss:sum"])
        for run in specs:
            lab.optim_step(run, STEP)
    assert turns == alone
    for run in specs:
        lab.drop(run)


def test_a_loss_that_is_not_finite_leaves_the_gradient(
    labs: Labs, given: list[Example], tmp_path: Path
) -> None:
    broken = [replace(given[0], weights=torch.full_like(given[0].weights, torch.inf))]
    for layout in ("tp2", "dp2"):
        lab = labs(layout)
        lab.create("r", spec())
        lab.forward_backward([Pass("r", given)])
        before = vectors(lab, "r", tmp_path / f"{layout} before")
        bad, good = lab.forward_backward([Pass("r", broken), Pass("r", given, forward_only=True)])
        assert isinstance(bad, NonFiniteLoss)
        assert good.metrics["loss:sum"] > 0
        after = vectors(lab, "r", tmp_path / f"{layout} after")
        assert all(torch.equal(after[kind], before[kind]) for kind in before)
        lab.drop("r")


def test_a_gradient_that_is_not_finite_changes_no_weight(labs: Labs, tmp_path: Path) -> None:
    lab = labs("tp1")
    lab.create("r", spec())
    before = vectors(lab, "r", tmp_path / "state")
    nan = torch.full_like(before["gradient"], torch.nan)
    lab.ask("_team.call", "restore", "r", {**before, "gradient": nan}, 0)
    with pytest.raises(NonFiniteLoss, match="'r'"):
        lab.optim_step("r", STEP)
    assert torch.equal(vectors(lab, "r", tmp_path / "after")["weights"], before["weights"])
    lab.drop("r")


def test_what_cannot_be_trained_is_refused(labs: Labs, given: list[Example]) -> None:
    lab = labs("tp2")
    with pytest.raises(InvalidRequest, match=r"no linear module 'lm_head'.*q_proj, k_proj"):
        lab.create("r", spec(modules=("q_proj", "lm_head")))
    with pytest.raises(InvalidRequest, match="needs one"):
        lab.create("r", spec(modules=()))
    lab.create("r", spec())
    (odd,) = lab.forward_backward([Pass("r", given[:1], "dpo")])
    assert isinstance(odd, InvalidRequest)
    lab.drop("r")


def test_activations_and_logits_computed_twice_give_the_same(
    labs: Labs, given: list[Example], tmp_path: Path
) -> None:
    lab = labs("tp1")
    found = {}
    for name in ("once", "twice"):
        lab.create("r", spec(9))
        learn(lab, "r", given, 1)
        lab.forward_backward([Pass("r", given)])
        found[name] = vectors(lab, "r", tmp_path / name)["gradient"]
        lab.drop("r")
        model = "_team.engine.base.model"
        for layer in range(6):
            lab.ask(f"{model}.decoder.layers.{layer}.__setattr__", "recompute", True)
        lab.ask(f"{model}.head.__setattr__", "logits_max", 10 * 2048)
    close(found["twice"], found["once"], 1e-6)


def qwen2(folder: Path) -> None:
    """Biases on q, k and v; the head tied; three groups of two heads; nothing that two divides."""
    config = Qwen2Config(
        vocab_size=301,
        hidden_size=60,
        intermediate_size=75,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


def qwen3(folder: Path) -> None:
    """Norms on q and k, one key-value group, in two files."""
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size="100KB")


def llama3(folder: Path) -> None:
    """Positions stretched as Llama 3 does."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.3,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    LlamaForCausalLM(config).save_pretrained(folder)


FAMILIES: dict[Callable[[Path], None], dict[str, object]] = {
    llama3: {},
    qwen3: {},
    qwen2: {"worker_tensor_parallel": 2},
}


def test_families(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = weighted(examples(1, (50, 7, 100, 64, 64), vocabulary=300))
    lab = None
    for make, layout in FAMILIES.items():
        folder = tmp_path / make.__name__
        make(folder)
        settings = {"worker_model": folder, **layout}
        if lab is None:
            lab = Lab(tmp_path, **settings)
        else:
            lab.ask("close")
            lab.again(**settings)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        other = HfTrainer(model, Settings(), base_model=make.__name__)
        found: dict[str, Any] = {}
        wanted: dict[str, Any] = {}
        for engine, into in ((lab, found), (other, wanted)):
            engine.create("r", spec())
            (result,) = engine.forward_backward([Pass("r", given)])
            into["logprobs"] = torch.cat(list(result.logprobs))
            into["correct"] = result.metrics["correct:sum"]
            state = folder / type(engine).__name__
            into["gradient"] = vectors(engine, "r", state)["gradient"]
        assert found["correct"] == wanted["correct"]
        close(found["logprobs"], wanted["logprobs"], 1e-5)
        close(found["gradient"], wanted["gradient"], 1e-4)
    assert lab is not None
    assert lab.end() == 0
