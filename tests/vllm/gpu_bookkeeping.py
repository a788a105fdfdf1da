"""Run by vLLM's own Python, on a machine without a GPU: the plugin and the code vLLM has for one.

What comes in: nothing. What goes out: exit status 0 if every prompt row got its adapter's lm_head.
The wrapper, its index tensors and the second runner's worker are vLLM's; the two Triton kernels are
stood in for by torch code that reads the same index tensors, as the kernels document them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import vllm
import vllm.lora.ops.triton_ops.lora_kernel_metadata as metadata
import vllm.lora.punica_wrapper.punica_gpu as punica_gpu
import vllm.v1.worker.gpu.sample.prompt_logprob as second
from loragate_vllm import hook
from vllm.lora.layers import LoRAMapping

SLOTS, RANK, HIDDEN, VOCAB = 3, 4, 8, 16
ADAPTERS = [11, None, 12]
#: Adapter ids of requests, and how many prompt tokens of each are in the step.
REQUESTS = ((12, 5), (0, 3), (11, 4), (12, 2))


def each_adapter(
    mapping: Any, order: Any, counts: Any, starts: Any, ids: Any, none: Any, active: Any
) -> Any:
    """(slot, rows), as the kernels walk their arguments."""
    if none.item():
        return
    for i in range(int(active.item())):
        slot, count, start = int(ids[i]), int(counts[i]), int(starts[i])
        if slot >= 0:
            yield slot, order[start : start + count]


def lora_shrink(x: Any, down: Any, out: Any, *arguments: Any) -> None:
    out.zero_()
    for slot, rows in each_adapter(*arguments[:-1]):
        out[0][rows] = arguments[-1] * x[rows] @ down[0][slot, 0].T


def lora_expand(x: Any, up: Any, out: Any, *arguments: Any, add_inputs: bool) -> None:
    assert add_inputs
    for slot, rows in each_adapter(*arguments):
        out[rows] += x[0][rows] @ up[0][slot, 0].T


class LogitsProcessorWithLoRA(torch.nn.Module):
    def __init__(self, punica_wrapper: Any) -> None:
        super().__init__()
        self.punica_wrapper = punica_wrapper
        self.down = torch.randn(SLOTS, 1, RANK, HIDDEN)
        self.up = torch.randn(SLOTS, 1, VOCAB, RANK)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(rows.shape[0], VOCAB)
        self.punica_wrapper.add_lora_logits(logits, rows, self.down, self.up, 1.0)
        return logits

    def expected(self, row: torch.Tensor, adapter: int) -> torch.Tensor:
        if adapter == 0:
            return torch.zeros(VOCAB)
        slot = ADAPTERS.index(adapter)
        return self.up[slot, 0] @ (self.down[slot, 0] @ row)


class Model(torch.nn.Module):
    def __init__(self, processor: LogitsProcessorWithLoRA) -> None:
        super().__init__()
        self.logits_processor = processor

    def compute_logits(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logits_processor(rows)


def main() -> None:
    torch.manual_seed(0)
    punica_gpu.LoRAKernelMeta = metadata.LoRAKernelMeta
    punica_gpu.lora_shrink, punica_gpu.lora_expand = lora_shrink, lora_expand
    config = SimpleNamespace(max_loras=SLOTS, specialize_active_lora=False)
    punica = punica_gpu.PunicaWrapperGPU(64, 8, "cpu", lora_config=config)
    tokens = [adapter for adapter, count in REQUESTS for _ in range(count)]
    sampled = [adapter for adapter, _ in REQUESTS]
    punica.update_metadata(LoRAMapping(tuple(tokens), tuple(sampled)), ADAPTERS, SLOTS + 1, VOCAB)
    model = Model(LogitsProcessorWithLoRA(punica))

    rows = torch.randn(len(tokens) + 2, HIDDEN)
    computed: list[torch.Tensor] = []
    # The tail of the real method turns logits into logprobs by Triton.
    second.get_prompt_logprobs_token_ids = lambda *arguments: torch.zeros(len(tokens))

    def collect(ids: Any, hidden: torch.Tensor, logits_fn: Any, *rest: Any) -> Any:
        computed.extend(logits_fn(hidden[start : start + 4]) for start in range(0, len(tokens), 4))
        raise StopIteration

    second.compute_prompt_logprobs_with_chunking = collect
    runner = SimpleNamespace(lora_state=None, model=model)
    hook.patch(runner, model, vllm.__version__)
    assert hasattr(runner, hook.MARK)
    ask(model, rows, len(tokens))

    for row, adapter, found in zip(rows, tokens, torch.cat(computed), strict=False):
        torch.testing.assert_close(found, model.logits_processor.expected(row, adapter))
    # The sampled rows have theirs again.
    found = model.compute_logits(rows[: len(sampled)])
    for row, adapter, logits in zip(rows, sampled, found, strict=False):
        torch.testing.assert_close(logits, model.logits_processor.expected(row, adapter))


def ask(model: Model, rows: torch.Tensor, count: int) -> None:
    """One step of the second runner's worker: every request wants its prompt's logprobs."""
    import numpy as np

    worker = second.PromptLogprobsWorker(8, torch.device("cpu"))
    scheduled = np.array([n for _, n in REQUESTS], dtype=np.int32)
    for i in range(len(REQUESTS)):
        params = SimpleNamespace(prompt_logprobs=1, prompt_logprob_token_ids=None)
        worker.add_request(str(i), i, params)
    batch = SimpleNamespace(
        num_tokens=count,
        req_ids=[str(i) for i in range(len(REQUESTS))],
        idx_mapping=torch.arange(len(REQUESTS)),
        idx_mapping_np=np.arange(len(REQUESTS)),
        query_start_loc=None,
        num_computed_prefill_tokens_np=np.zeros(len(REQUESTS), dtype=np.int32),
        prefill_len_np=scheduled,
        num_scheduled_tokens=scheduled,
    )
    lengths = np.concatenate([scheduled, np.zeros(8 - len(REQUESTS), dtype=np.int32)])
    try:
        worker.compute_prompt_logprobs(model.compute_logits, rows, batch, None, None, lengths)
    except StopIteration:
        return
    raise AssertionError("the worker computed no logits")


if __name__ == "__main__":
    main()
