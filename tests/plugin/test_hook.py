"""The runner of a vLLM that is known is patched; any other is left as it is, with a warning."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from loragate_vllm import features, hook

from tests.plugin.punica import (
    FirstRunner,
    Model,
    PromptLogprobsWorker,
    PunicaWrapperCPU,
    PunicaWrapperGPU,
)

TOKENS = (1, 1, -1, -1, 0)
SAMPLED = (1, -1, 0)
SLICES = {"a": slice(0, 2), "b": slice(2, 4), "c": slice(4, 5)}
SECOND = "vllm.v1.worker.gpu.sample.prompt_logprob"


def first(punica: PunicaWrapperCPU | None = None) -> FirstRunner:
    return FirstRunner(Model(punica or PunicaWrapperGPU(TOKENS, SAMPLED)), SLICES)


def ask(runner: FirstRunner) -> dict[str, list[int]]:
    found = runner._get_prompt_logprobs_dict(torch.randn(len(TOKENS), 3), {})
    return {name: logits.int().squeeze(1).tolist() for name, logits in found.items()}


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.24.0"])
def test_the_first_runner(version: str) -> None:
    runner = first()
    hook.patch(runner, runner.model, version)
    assert ask(runner) == {"a": [1, 1], "b": [-1, -1], "c": [0]}
    assert "compute_logits" not in vars(runner.model)
    assert runner.model.compute_logits(torch.zeros(3, 1)).squeeze(1).tolist() == list(SAMPLED)


def test_nobody_asks_for_prompt_logprobs() -> None:
    runner = first()
    hook.patch(runner, runner.model, "0.32.0")
    runner._slices = {}
    runner.num_prompt_logprobs = {}
    assert ask(runner) == {}


def test_a_model_whose_lm_head_takes_no_adapter() -> None:
    model = Model(None)
    runner = FirstRunner(model, SLICES)
    hook.patch(runner, model, "0.32.0")
    found = runner._get_prompt_logprobs_dict(torch.ones(5, 3), {})
    assert found["a"].shape == (2, 3)
    assert answers(runner) == {**SAYS, features.LM_HEAD: False}


def test_the_second_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(SECOND)
    kind = type("PromptLogprobsWorker", (PromptLogprobsWorker,), {})
    module.PromptLogprobsWorker = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, SECOND, module)
    model = Model(PunicaWrapperGPU(TOKENS, SAMPLED))
    for _ in range(2):
        runner = SimpleNamespace(lora_state=None, model=model)
        hook.patch(runner, model, "0.32.0")
    padded = torch.randn(len(TOKENS) + 3, 3)
    batch = SimpleNamespace(num_tokens=len(TOKENS))
    for _ in range(2):
        found = kind().compute_prompt_logprobs(model.compute_logits, padded, batch)
        assert found == list(TOKENS)
    assert model.compute_logits(torch.zeros(3, 1)).squeeze(1).tolist() == list(SAMPLED)


class PunicaWrapperNPU(PunicaWrapperCPU):
    """Kernels of some other device."""


class OtherRunner(FirstRunner):
    def _get_prompt_logprobs_dict(self, scheduled: Any, hidden_states: Any = None) -> Any:
        raise AssertionError("not asked here")


@pytest.mark.parametrize(
    ("runner", "version", "says"),
    [
        (first(), "0.33.0", "vLLM 0.33.0 is not one of the versions known (0.24, 0.32)"),
        (first(), "dev", "vLLM dev is not one of the versions known"),
        (first(PunicaWrapperNPU(TOKENS, SAMPLED)), "0.32.0", "PunicaWrapperNPU is not one of"),
        (OtherRunner(Model(None), {}), "0.32.0", "_get_prompt_logprobs_dict takes"),
        (SimpleNamespace(lora_state=None), "0.32.0", "prompt_logprob is not there"),
        (SimpleNamespace(), "0.32.0", "has no _get_prompt_logprobs_dict"),
    ],
)
def test_what_is_not_known_is_left_as_it_is(
    runner: Any, version: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = dict(vars(runner))
    hook.patch(runner, getattr(runner, "model", Model(None)), version)
    assert vars(runner) == before
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert says in record.getMessage()


ALL = {features.PROMPT: True, features.LORA: True, features.LM_HEAD: True}
SAYS = {**ALL, features.DTYPE: "bfloat16"}


def answers(runner: Any, device: str = "cuda:0", lora: object = "enabled") -> dict[str, Any]:
    return features.of_worker(
        SimpleNamespace(
            model_runner=runner,
            device=torch.device(device),
            lora_config=lora,
            model_config=SimpleNamespace(dtype=torch.bfloat16),
        )
    )


def test_a_worker_says_what_it_gets_right() -> None:
    runner = first()
    assert answers(runner, lora=None) == SAYS
    assert answers(runner, "cpu") == {**SAYS, **dict.fromkeys(ALL, False)}
    assert answers(runner, "cuda:1") == {**SAYS, features.LM_HEAD: False}
    hook.patch(runner, runner.model, "0.32.0")
    assert answers(runner) == SAYS


class Engine:
    def __init__(self, *found: dict[str, Any] | Exception) -> None:
        self.found = found
        self.asked = 0

    async def collective_rpc(self, method: str) -> list[Any]:
        assert method == features.METHOD
        self.asked += 1
        for one in self.found:
            if isinstance(one, Exception):
                raise one
        return list(self.found)


@pytest.mark.parametrize("other", [SAYS, {**SAYS, features.LM_HEAD: False}])
async def test_a_server_gets_right_what_all_its_workers_do(other: dict[str, Any]) -> None:
    state = SimpleNamespace(engine_client=Engine(SAYS, other))
    for _ in range(2):
        assert await features.of_server(state) == other
    assert state.engine_client.asked == 1


async def test_an_engine_that_does_not_say_is_asked_again() -> None:
    state = SimpleNamespace(engine_client=Engine(AttributeError(features.METHOD)))
    assert await features.of_server(state) == dict.fromkeys(ALL, False)
    state.engine_client = Engine(SAYS)
    assert await features.of_server(state) == SAYS
