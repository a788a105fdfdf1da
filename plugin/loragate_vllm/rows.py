"""Whose logits are computed: adapters for rows that are not the sampled ones.

vLLM applies an lm_head LoRA with one adapter per sampled row. For prompt logprobs it computes
logits of every prompt row without saying so: the rows then get the adapter of some other row, or
the shapes do not fit. What comes in: the hidden states of a step, and a `compute_logits`. What
goes out: a `compute_logits` that gives each row the adapter of the request it belongs to. Knows
nothing of requests: the rows are a slice of the step's rows, and vLLM knows the adapter of each.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

logger = logging.getLogger("vllm.plugins.loragate")

ComputeLogits = Callable[..., Any]


def start_of(rows: torch.Tensor, whole: torch.Tensor) -> int | None:
    """Which row of `whole` the slice `rows` starts at; None if it is no slice of its rows."""
    alike = rows.shape[1:] == whole.shape[1:] and rows.stride() == whole.stride()
    same = rows.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    if not alike or not same or whole.stride(0) <= 0:
        return None
    distance = int(rows.storage_offset()) - int(whole.storage_offset())
    start, rest = divmod(distance, whole.stride(0))
    inside = rest == 0 and 0 <= start <= whole.shape[0] - rows.shape[0]
    return start if inside else None


class PromptLogits:
    """`compute_logits` for slices of one step's hidden states.

    Args:
        compute: the model's own.
        punica: where vLLM keeps the adapter of each row; one for every LoRA logits processor.
        hidden_states: all rows of the step.
    """

    def __init__(
        self, compute: ComputeLogits, punica: Sequence[Any], hidden_states: torch.Tensor
    ) -> None:
        self._compute = compute
        self._punica = punica
        self._hidden_states = hidden_states

    def __call__(self, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        start = start_of(rows, self._hidden_states)
        count = rows.shape[0]
        with contextlib.ExitStack() as stack:
            for punica in self._punica:
                # As many tokens as rows, or the two are in different orders.
                whole = punica.indices_len[0] == self._hidden_states.shape[0]
                if not whole or start is None:
                    return self._refuse(rows, *args, **kwargs)
                adapters = punica._token_lora_indices[start : start + count]
                stack.enter_context(_sampled(punica, adapters))
            return self._compute(rows, *args, **kwargs)

    def _refuse(self, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """No number rather than a wrong one: NaN is not JSON, so the request fails alone."""
        logger.error(
            "loragate-vllm: cannot tell which prompt rows these logits are for; the requests fail."
        )
        with contextlib.ExitStack() as stack:
            for punica in self._punica:
                none = torch.full_like(punica._sampler_indices[: rows.shape[0]], -1)
                stack.enter_context(_sampled(punica, none))
            logits = self._compute(rows, *args, **kwargs)
        return None if logits is None else logits.fill_(float("nan"))


@contextlib.contextmanager
def _sampled(punica: Any, adapters: torch.Tensor) -> Iterator[None]:
    """While it lasts, the rows that vLLM takes for sampled have these adapters."""
    length = punica.indices_len[1]
    before = punica._sampler_indices[:length].clone()
    _set_sampled(punica, adapters.clone())
    try:
        yield
    finally:
        _set_sampled(punica, before)


def _set_sampled(punica: Any, adapters: torch.Tensor) -> None:
    punica.indices_len[1] = adapters.shape[0]
    punica._sampler_indices[: adapters.shape[0]].copy_(adapters)
    # The GPU's kernels read these instead.
    if (meta := getattr(punica, "prompt_mapping_meta", None)) is not None:
        meta.prepare_tensors(adapters)
