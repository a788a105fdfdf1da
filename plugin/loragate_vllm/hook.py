"""Where the plugin gets hold of a worker: the moment it wraps its model for LoRA.

What comes in: a model runner of vLLM's, either of its two kinds, and its model. What goes out: the
runner, its prompt logprobs patched. A runner that is not as known is left as it was, with one
warning; what it then can and cannot do is in `features`.
"""

from __future__ import annotations

import functools
import sys
from typing import Any
from weakref import WeakKeyDictionary

from loragate_vllm import cpu, logger
from loragate_vllm.known import Unknown, check_call, check_has, check_version, mark, patched
from loragate_vllm.rows import PromptLogits

#: On a runner that is patched.
MARK = "_loragate_patched"

_ROWS = ("_token_lora_indices", "_sampler_indices", "indices_len")
_KERNELS = ("PunicaWrapperCPU", "PunicaWrapperGPU")


def install() -> None:
    """Patch every runner of this process when it loads its LoRA model."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    original = LoRAModelRunnerMixin.load_lora_model
    if patched(original):
        return

    @functools.wraps(original)
    def load_lora_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, *args, **kwargs)
        import vllm

        patch(self, model, vllm.__version__)
        return model

    mark(load_lora_model)
    LoRAModelRunnerMixin.load_lora_model = load_lora_model


def patch(runner: Any, model: Any, version: str) -> None:
    """Patch the runner, or warn and leave it."""
    try:
        check_version(version)
        punica = wrappers(model)
        for wrapper in punica:
            _check_wrapper(wrapper)
        check_has(model.compute_logits, "__self__")
        replace = _second() if hasattr(runner, "lora_state") else _first(runner, punica)
        for kind in {type(wrapper) for wrapper in punica}:
            _patch_kernels(kind)
        replace()
    except Unknown as exc:
        logger.warning("loragate-vllm leaves prompt logprobs under LoRA as they are: %s.", exc)
        return
    setattr(runner, MARK, True)
    logger.info("loragate-vllm: prompt logprobs under LoRA are patched.")


def wrappers(model: Any) -> list[Any]:
    """The punica wrappers of the model's LoRA logits processors; few, mostly one."""
    found: dict[int, Any] = {}
    for module in model.modules():
        if type(module).__name__ == "LogitsProcessorWithLoRA":
            check_has(module, "punica_wrapper")
            found[id(module.punica_wrapper)] = module.punica_wrapper
    return list(found.values())


def _check_wrapper(wrapper: Any) -> None:
    name = type(wrapper).__name__
    if name not in _KERNELS:
        raise Unknown(f"{name} is not one of the LoRA kernels known ({', '.join(_KERNELS)})")
    check_has(wrapper, *_ROWS)
    if name == "PunicaWrapperGPU":
        check_has(wrapper, "prompt_mapping_meta")
        check_call(wrapper.prompt_mapping_meta.prepare_tensors, "token_lora_mapping")


def _patch_kernels(kind: type) -> None:
    if kind.__name__ != "PunicaWrapperCPU":
        return
    ops = sys.modules.get("vllm.lora.ops.torch_ops.lora_ops")
    if ops is None:
        raise Unknown("vllm.lora.ops.torch_ops.lora_ops is not there")
    cpu.check(ops, kind)
    cpu.install(ops, sys.modules[kind.__module__], kind)


def _first(runner: Any, punica: list[Any]) -> Any:
    """How to patch the first kind of runner: it calls `self.model.compute_logits` by request."""
    check_has(runner, "_get_prompt_logprobs_dict", "num_prompt_logprobs")
    original = runner._get_prompt_logprobs_dict
    check_call(original, "hidden_states", "num_scheduled_tokens")

    @functools.wraps(original)
    def by_request(hidden_states: Any, num_scheduled_tokens: Any) -> Any:
        if not punica or not runner.num_prompt_logprobs:
            return original(hidden_states, num_scheduled_tokens)
        model = runner.model
        model.compute_logits = PromptLogits(model.compute_logits, punica, hidden_states)
        try:
            return original(hidden_states, num_scheduled_tokens)
        finally:
            del model.compute_logits

    return lambda: setattr(runner, "_get_prompt_logprobs_dict", by_request)


def _second() -> Any:
    """How to patch the second kind: a worker of its own gets `compute_logits` as an argument."""
    module = sys.modules.get("vllm.v1.worker.gpu.sample.prompt_logprob")
    if module is None:
        raise Unknown("vllm.v1.worker.gpu.sample.prompt_logprob is not there")
    worker = module.PromptLogprobsWorker
    names = ["compute_prompt_logprobs"]
    if hasattr(worker, "compute_prompt_token_id_logprobs"):
        names.append("compute_prompt_token_id_logprobs")
    check_has(worker, *names)
    for name in names:
        check_call(getattr(worker, name), "self", "logits_fn", "hidden_states", "input_batch")

    def replace() -> None:
        for name in names:
            setattr(worker, name, by_rows(getattr(worker, name)))

    return replace


def by_rows(original: Any) -> Any:
    """A method of the second kind's worker, with the adapter of each row."""
    if patched(original):
        return original
    found: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()

    @functools.wraps(original)
    def method(self: Any, logits_fn: Any, hidden_states: Any, input_batch: Any, *rest: Any) -> Any:
        model = logits_fn.__self__
        # A walk over the model, too long for every step.
        punica = found.get(model)
        if punica is None:
            punica = found[model] = wrappers(model)
        if punica:
            # The rest is padding.
            rows = hidden_states[: input_batch.num_tokens]
            logits_fn = PromptLogits(logits_fn, punica, rows)
        return original(self, logits_fn, hidden_states, input_batch, *rest)

    mark(method)
    return method
