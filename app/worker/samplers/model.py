"""The base model and its adapters as one function: tokens in, logits out.

What comes in: a model folder; token ids with their cache rows. What goes out: logits. It must
not know: requests, sampling, threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from app.errors import ConfigurationError
from app.settings import Settings
from app.worker.samplers.cache import KvRows
from app.worker.samplers.limits import Limits
from app.worker.samplers.lora import LoraLayers
from app.worker.samplers.tokens import Tokens

# Logits of one pass are kept under this many numbers (256 MiB as float32).
LOGITS_MAX = 1 << 26
# A model under this many parameters has steps of a millisecond: torch's threads would spend it
# waiting for each other, and far more when the cores are shared.
SMALL_MODEL = 50_000_000

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CausalModel:
    """A transformers model that serves several rows, each with its own adapter, at once."""

    def __init__(self, model: Any, tokens: Tokens) -> None:
        if getattr(model, "_is_stateful", False):
            raise ConfigurationError(
                f"{type(model).__name__} keeps a running state instead of keys and values; "
                "this worker cannot batch it."
            )
        self.model = model
        self.tokens = tokens
        self.layers = LoraLayers(model)
        self.limits = _limits(model, tokens)
        self.device = next(model.parameters()).device
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        text = model.config.get_text_config()
        windows = getattr(text, "sliding_window", None), getattr(text, "layer_types", None) or ()
        # A mask we build ourselves knows nothing of windows.
        self._windowed = bool(windows[0]) or any(kind != "full_attention" for kind in windows[1])

    def forward(self, ids: Tensor, rows: KvRows, keep: int) -> Tensor:
        """One pass over the next columns; logits of the last `keep` of them, 0 for all."""
        steps = ids.shape[1]
        rows.reserve(steps)
        mask, positions = rows.mask_and_positions(steps)
        if mask is not None and steps == 1 and not self._windowed:
            # The form attention takes in the end; building it from two dimensions costs more
            # than a layer of a small model.
            mask = mask[:, None, None, :]
        output = self.model(
            input_ids=ids.to(self.device),
            attention_mask=None if mask is None else mask.to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=rows.view,
            use_cache=True,
            logits_to_keep=keep,
        )
        rows.advance(steps)
        logits: Tensor = output.logits
        return logits.float()

    def prefill(
        self, prompts: Sequence[Sequence[int]], rows: KvRows, *, every: bool, pass_tokens: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Read prompts in passes of bounded size. Yields (first column, logits) of each pass.

        With `every`, logits of all columns; otherwise of a pass's last column only.
        """
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
        rows.open(lengths)
        limit = pass_tokens // len(prompts)
        if every:
            limit = min(limit, LOGITS_MAX // (len(prompts) * self.limits.vocab_size))
        size = max(1, limit)
        for start in range(0, width, size):
            part = ids[:, start : start + size]
            yield start, self.forward(part, rows, 0 if every else 1)


def load_model(settings: Settings, folder: Path) -> CausalModel:
    """Read a model folder onto the configured device."""
    if not (folder / "config.json").is_file():
        raise ConfigurationError(
            f"{folder} holds no model (no config.json). Set LORAGATE_WORKER_MODEL."
        )
    device = _device(settings.worker_device)
    if device.type == "cuda":
        # cuDNN plans its attention anew for every shape, and every step has another one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if settings.worker_dtype == "auto":
        dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    else:
        dtype = _DTYPES[settings.worker_dtype]
    # A bar would be torn lines in a log of JSON.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    tokens = Tokens(AutoTokenizer.from_pretrained(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.requires_grad_(False).eval()
    threads = settings.worker_threads
    if threads is None and device.type == "cpu" and model.num_parameters() < SMALL_MODEL:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    return CausalModel(model.to(device), tokens)


def _device(wanted: str) -> torch.device:
    if wanted != "auto":
        return torch.device(wanted)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _limits(model: Any, tokens: Tokens) -> Limits:
    text = model.config.get_text_config()
    generation = model.generation_config
    listed = generation.eos_token_id
    stops = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    return Limits(
        vocab_size=text.vocab_size,
        max_model_len=text.max_position_embeddings,
        eos_id=tokens.eos_id,
        stop_token_ids=tuple(token for token in stops if token != tokens.eos_id),
        sampling_defaults=_given(generation.to_diff_dict().get),
    )


def _given(get: Callable[[str], Any]) -> dict[str, Any]:
    """The sampling defaults a model folder sets, under the names requests use."""
    names = {"max_new_tokens": "max_tokens"} | {
        name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    return {ours: get(theirs) for theirs, ours in names.items() if get(theirs) is not None}
