"""What the tests of trainers share: examples, a trainer beside a sampler, PEFT alone.

What comes in: a model folder and a seed. What goes out: things to train, and what PEFT and
autograd make of the same without packing or company.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.demo import about
from app.domain import LoraSpec
from app.settings import Settings
from app.worker.samplers.model import CausalModel, load_model
from app.worker.trainers.base import Example, Pass, PassResult
from app.worker.trainers.hf import HfTrainer

DEMO = Path(about.__file__).parent / "model"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def trainer(
    folder: Path, side_by_side: int | None = None, **settings: Any
) -> tuple[HfTrainer, CausalModel]:
    chosen = Settings(worker_model=folder, worker_threads=1, **settings)
    model = load_model(chosen, folder)
    made = HfTrainer(model.model, chosen, base_model=str(folder), side_by_side=side_by_side)
    return made, model


def spec(seed: int = 0, *, rank: int = 4, alpha: int = 8, modules: Sequence[str] = LINEARS) -> Any:
    return LoraSpec(rank, alpha, tuple(modules), seed)


def examples(seed: int, lengths: Sequence[int], vocabulary: int = 300) -> list[Example]:
    """With weights (some of them zero), and with logprobs and advantages."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(0, vocabulary, (length + 1,), generator=generator)
        weights = torch.rand(length, generator=generator)
        weights[: length // 4] = 0
        found.append(
            Example(
                ids[:-1],
                ids[1:],
                weights,
                -5 - torch.rand(length, generator=generator),
                torch.randn(length, generator=generator),
            )
        )
    return found


def trained(result: object) -> PassResult:
    assert isinstance(result, PassResult), result
    return result


def stir(trainer: HfTrainer, run: str, seed: int = 0, size: float = 0.05) -> None:
    """Away from the start, where B is zero and A has no gradient."""
    weights = trainer._runs[run].weights
    weights += size * torch.randn(len(weights), generator=torch.Generator().manual_seed(seed))


def sampled(trainer: HfTrainer, run: str, given: Sequence[Example]) -> list[Example]:
    """The same, with logprobs of a policy not far from the run's."""
    (result,) = passes(trainer, Pass(run, given, forward_only=True))
    generator = torch.Generator().manual_seed(0)
    return [
        replace(example, logprobs=found + 0.3 * torch.randn(len(found), generator=generator))
        for example, found in zip(given, result.logprobs, strict=True)
    ]


def gradient(trainer: HfTrainer, run: str) -> dict[str, Tensor]:
    """By the names PEFT has for its parameters."""
    state = trainer._runs[run]
    return {
        "base_model.model." + name.replace(".weight", ".default.weight"): tensor.clone()
        for name, tensor in state.layout.tensors(state.gradient)
    }


def peft(base: Path, adapter: Path) -> Any:
    """The adapter on the base, trainable, in transformers and PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        # PEFT uses what transformers deprecates; that is between the two.
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True).eval()


def logprobs(model: Any, example: Example) -> Tensor:
    """Of one example's targets, by itself."""
    scores = model(input_ids=example.tokens[None]).logits[0].log_softmax(-1)
    found: Tensor = scores.gather(1, example.targets[:, None])[:, 0]
    return found


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """The same names, and every tensor within the tolerance of the largest number in any."""
    assert found.keys() == wanted.keys()
    scale = max(float(tensor.abs().max()) for tensor in wanted.values())
    assert scale > 0
    for name, tensor in found.items():
        assert float((tensor - wanted[name]).abs().max()) <= tolerance * max(scale, 1.0), name


def passes(trainer: HfTrainer, *tasks: Pass) -> list[PassResult]:
    return [trained(result) for result in trainer.forward_backward(tasks)]
