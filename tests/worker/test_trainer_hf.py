"""What the Hugging Face trainer computes: PEFT's gradients, whatever it computes beside them."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from app.errors import ConfigurationError, InvalidRequest
from app.ops import Loss, OptimStep
from app.worker.samplers.lora import LoraLayers, read_adapter
from app.worker.trainers import shared
from app.worker.trainers.base import Example, Pass
from app.worker.trainers.hf import HfTrainer
from app.worker.trainers.lora_init import init_lora_A
from tests.worker.trainees import (
    ATTENTION,
    DEMO,
    LINEARS,
    equal,
    examples,
    gradient,
    logprobs,
    passes,
    peft,
    sampled,
    spec,
    stir,
    trainer,
)

POLICY = ("importance_sampling", "ppo", "cispo")


def reference(model: Any, loss: Loss, given: list[Example]) -> Tensor:
    """The loss by autograd over one example after another, as the documents write it."""
    if loss == "dpo":
        return _dpo(model, given)
    total = torch.zeros(())
    for example in given:
        lp, advantages = logprobs(model, example), cast(Tensor, example.advantages)
        ratio = (lp - cast(Tensor, example.logprobs)).exp()
        terms = {
            "cross_entropy": -lp * example.weights,
            "importance_sampling": -ratio * advantages,
            "ppo": -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages),
            "cispo": -ratio.detach().clamp(0, 4) * lp * advantages,
        }
        total = total + terms[loss].sum()
    return total


def _dpo(model: Any, given: list[Example]) -> Tensor:
    total = torch.zeros(())
    for preferred, other in zip(given[0::2], given[1::2], strict=True):
        rewards = []
        for example in (preferred, other):
            policy = (logprobs(model, example) * example.weights).sum()
            with torch.no_grad(), model.disable_adapter():
                base = (logprobs(model, example) * example.weights).sum()
            rewards.append(0.1 * (policy - base))
        total = total - functional.logsigmoid(rewards[0] - rewards[1])
    return total


@pytest.mark.parametrize("loss", ["cross_entropy", "dpo", *POLICY])
def test_gradients_are_those_of_peft_and_autograd(loss: Loss, tiny: Path, tmp_path: Path) -> None:
    """GQA, an output layer of its own, sequences of many lengths, and company."""
    engine, _ = trainer(tiny / "model")
    engine.create("run", spec(modules=("q_proj", "v_proj", "down_proj", "lm_head")))
    engine.create("company", spec(9, rank=2, modules=("k_proj",)))
    stir(engine, "run")
    engine.save_adapter("run", tmp_path)
    given = sampled(engine, "run", examples(1, [3, 40, 17, 1, 64, 33]))
    _, result = passes(engine, Pass("company", examples(2, [5, 21])), Pass("run", given, loss))

    alone = peft(tiny / "model", tmp_path)
    value = reference(alone, loss, given)
    value.backward()
    assert result.metrics["loss:sum"] == pytest.approx(float(value.detach()), rel=1e-5)
    for example, found in zip(given, result.logprobs, strict=True):
        assert torch.allclose(found, logprobs(alone, example), atol=1e-4)
    wanted = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    equal(gradient(engine, "run"), wanted, 1e-5)


def test_gradients_on_the_demo_model_are_those_of_peft(tmp_path: Path) -> None:
    engine, _ = trainer(DEMO)
    engine.create("run", spec(rank=16, alpha=32))
    stir(engine, "run", size=0.01)
    engine.save_adapter("run", tmp_path)
    given = examples(3, [80, 64, 31], vocabulary=2048)
    passes(engine, Pass("run", given))
    alone = peft(DEMO, tmp_path)
    reference(alone, "cross_entropy", given).backward()
    wanted = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    equal(gradient(engine, "run"), wanted, 1e-5)


def test_runs_of_any_shape_share_a_pass(tiny: Path) -> None:
    """Ranks, alphas, modules and losses differ; some runs look only; each is as if alone."""
    shapes = {
        "a": spec(1),
        "b": spec(2),
        "c": spec(3, rank=8, alpha=4),
        "d": spec(4, modules=("lm_head", "o_proj")),
        "e": spec(5, rank=8, alpha=16, modules=ATTENTION),
    }
    tasks = [
        Pass("a", examples(1, [10, 20])),
        Pass("b", examples(2, [18, 12])),
        Pass("c", examples(3, [50]), "ppo", {"clip_high_threshold": 1.5}),
        Pass("d", examples(4, [9, 11, 7, 2]), "dpo"),
        Pass("e", examples(5, [30, 31]), forward_only=True),
        Pass("a", examples(6, [30])),
    ]

    def engine() -> HfTrainer:
        made, _ = trainer(tiny / "model")
        for seed, (run, shape) in enumerate(shapes.items()):
            made.create(run, shape)
            stir(made, run, seed)
        return made

    together, apart = engine(), engine()
    mixed = passes(together, *tasks)
    single = [passes(apart, task)[0] for task in tasks]
    for one, other in zip(mixed, single, strict=True):
        wanted = {name: number for name, number in other.metrics.items() if name != "seconds:max"}
        found = {name: one.metrics[name] for name in wanted}
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        for ours, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
    for run in "abcd":
        equal(gradient(together, run), gradient(apart, run), 1e-5)
    assert not together._runs["e"].gradient.any()


def test_a_pass_over_the_limit_is_done_in_several(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with few tokens at a time, few logits at a time, and activations twice."""
    whole, _ = trainer(tiny / "model")
    parts, _ = trainer(tiny / "model", worker_train_tokens=40, worker_gradient_checkpointing=True)
    tasks = [
        Pass("a", examples(1, [30, 3, 50, 12])),
        Pass("b", examples(2, [20, 8, 11, 45]), "dpo"),
    ]
    results = []
    for engine in (whole, parts):
        engine.create("a", spec(1, modules=(*LINEARS, "lm_head")))
        engine.create("b", spec(2))
        stir(engine, "a")
        stir(engine, "b")
        results.append(passes(engine, *tasks))
        monkeypatch.setattr(shared, "LOGITS_MAX", 7 * 400)
    for one, other in zip(*results, strict=True):
        assert one.metrics["loss:sum"] == pytest.approx(other.metrics["loss:sum"], rel=1e-5)
    for run in "ab":
        equal(gradient(parts, run), gradient(whole, run), 1e-5)


def test_eight_runs_trained_together_are_each_as_if_alone(tiny: Path) -> None:
    runs = [f"run{number}" for number in range(8)]
    data = {run: examples(number, [12, 30, 7, 21]) for number, run in enumerate(runs)}

    def step(number: int) -> OptimStep:
        return OptimStep(
            learning_rate=1e-3 * (1 - number / 20), weight_decay=0.01, grad_clip_norm=1.0, eps=1e-8
        )

    def weights(engine: HfTrainer, chosen: list[str]) -> dict[str, Tensor]:
        for number, run in enumerate(runs):
            if run in chosen:
                engine.create(run, spec(number, rank=4 + 4 * (number % 2)))
        for number in range(20):
            passes(engine, *(Pass(run, data[run]) for run in chosen))
            for run in chosen:
                engine.optim_step(run, step(number))
        return {run: engine._runs[run].weights for run in chosen}

    together = weights(trainer(tiny / "model")[0], runs)
    for run in runs:
        alone = weights(trainer(tiny / "model")[0], [run])[run]
        assert float((together[run] - alone).abs().max()) < 1e-4
        assert float((alone - trainer_first(tiny, run)).abs().max()) > 1e-3


def trainer_first(tiny: Path, run: str) -> Tensor:
    engine, _ = trainer(tiny / "model")
    number = int(run[-1])
    engine.create(run, spec(number, rank=4 + 4 * (number % 2)))
    return engine._runs[run].weights


def test_adamw_is_that_of_torch(tiny: Path) -> None:
    engine, _ = trainer(tiny / "model")
    engine.create("run", spec())
    state = engine._runs["run"]
    theirs = state.weights.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.1)
    for seed in range(5):
        noise = torch.randn(len(theirs), generator=torch.Generator().manual_seed(seed))
        theirs.grad = noise.clone()
        torch.nn.utils.clip_grad_norm_([theirs], 2.0)
        optimizer.step()
        state.gradient += noise
        told = engine.optim_step("run", OptimStep(3e-3, 0.8, 0.97, 1e-6, 0.1, 2.0))
        assert told["grad_norm:mean"] == pytest.approx(float(noise.norm()), rel=1e-5)
        assert not state.gradient.any()
    assert torch.allclose(state.weights, theirs.detach(), atol=1e-6)


def test_the_first_weights_depend_on_the_seed_alone(tiny: Path) -> None:
    first, _ = trainer(tiny / "model")
    first.create("before", spec(5))
    first.create("run", spec(7, modules=("v_proj", "q_proj")))
    second, _ = trainer(tiny / "model")
    second.create("run", spec(7, modules=LINEARS))
    some = dict(first._runs["run"].layout.tensors(first._runs["run"].weights))
    every = dict(second._runs["run"].layout.tensors(second._runs["run"].weights))
    for name, tensor in some.items():
        assert torch.equal(tensor, every[name])
        module, _, part = name.removesuffix(".weight").rpartition(".lora_")
        if part == "A":
            assert torch.equal(tensor, init_lora_A(7, module, 4, tensor.shape[1]))
            assert float(tensor.abs().max()) <= 1 / math.sqrt(tensor.shape[1])
            assert float(tensor.std()) == pytest.approx(1 / math.sqrt(3 * tensor.shape[1]), 0.1)
        else:
            assert not tensor.any()
    assert not torch.equal(init_lora_A(7, "x", 2, 8), init_lora_A(8, "x", 2, 8))
    assert not torch.equal(init_lora_A(7, "x", 2, 8), init_lora_A(7, "y", 2, 8))


def test_a_module_that_is_not_there_is_named_with_those_that_are(tiny: Path) -> None:
    engine, _ = trainer(tiny / "model")
    with pytest.raises(InvalidRequest, match=r"'c_attn'; it has q_proj, .*down_proj, lm_head"):
        engine.create("run", spec(modules=("q_proj", "c_attn")))
    with pytest.raises(InvalidRequest, match="needs a target module"):
        engine.create("run", spec(modules=()))


def test_facts(tiny: Path) -> None:
    facts = trainer(tiny / "model")[0].facts
    assert (facts.kind, facts.dtype, facts.max_length) == ("hf", "float32", 256)
    assert facts.target_modules == (*LINEARS, "lm_head")
    assert trainer(tiny / "model", worker_dtype="bfloat16")[0].facts.dtype == "bfloat16"


def test_half_precision_bases_train_weights_of_single_precision(tiny: Path) -> None:
    full, _ = trainer(tiny / "model")
    half, _ = trainer(tiny / "model", worker_dtype="bfloat16")
    given = examples(1, [40, 30])
    for engine in (full, half):
        engine.create("run", spec())
        stir(engine, "run", size=0.01)
        passes(engine, Pass("run", given))
    found, wanted = half._runs["run"].gradient, full._runs["run"].gradient
    assert found.dtype == torch.float32
    assert float(functional.cosine_similarity(found, wanted, dim=0)) > 0.98


def test_it_trains_while_the_same_tensors_sample(tiny: Path) -> None:
    """Two threads, one set of parameters; the sampler's adapters are none of the trainer's."""
    engine, model = trainer(tiny / "model")
    shared_tensors = {p.data_ptr() for p in model.model.parameters()}
    assert {p.data_ptr() for p in engine._model._model.parameters()} == shared_tensors
    engine.create("run", spec())
    task = Pass("run", examples(1, [30, 20]))
    before = passes(engine, task)[0].metrics["loss:sum"]

    layers = LoraLayers(model.model)
    layers.load("slot", read_adapter(str(tiny / "wide"), max_rank=64))
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        layers.use(["slot"])
        expected = model.model(input_ids=ids).logits
    wrong = []
    done = threading.Event()

    def sample() -> None:
        with torch.inference_mode():
            while not done.is_set():
                if not torch.allclose(model.model(input_ids=ids).logits, expected, atol=1e-5):
                    wrong.append(ids)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        found = [passes(engine, task)[0].metrics["loss:sum"] for _ in range(20)]
    finally:
        done.set()
        thread.join()
    assert found == pytest.approx([before] * 20, rel=1e-5)
    assert not wrong


def test_a_model_with_adapters_in_it_is_refused(tiny: Path, model: Any) -> None:
    model.layers.load("slot", read_adapter(str(tiny / "narrow"), max_rank=64))
    with pytest.raises(ConfigurationError, match="PEFT layers already"):
        shared.twin(model.model)


def test_a_model_that_changes_its_logits_afterwards_is_refused(model: Any) -> None:
    plain = model.model.forward

    def capped(**given: Any) -> Any:
        output = plain(**given)
        output.logits = output.logits.tanh()
        return output

    model.model.forward = capped
    with pytest.raises(ConfigurationError, match="computes other logprobs"):
        shared.SharedModel(model.model)
