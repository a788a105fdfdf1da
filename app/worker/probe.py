"""Computes a probe: the logprobs that a trainer would see for some token ids.

What comes in: the folders of a base model and of an adapter, and prompts. What goes out: a
probe.json on stdout. It is transformers with PEFT as they are, and none of the worker's own
layers, so that a fault of those would show. Run as `python -m app.worker.probe`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from app.domain import Probe
from app.errors import InvalidRequest, LoragateError

MAX_ROWS = 32
MAX_IDS = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Text of several kinds: an adapter shows itself on some of it, whatever it was trained on.
PROMPTS = (
    "Once upon a time there was a small village by the sea, and everyone in it knew the old man.",
    "User: Where is my parcel?\nAssistant: I am sorry to hear that it has not arrived yet.",
    'def mean(values):\n    """The arithmetic mean."""\n    return sum(values) / len(values)\n',
    "The capital of France is Paris. The capital of Japan is Tokyo. 2 + 2 = 4, and 3 * 7 = 21.",
)


def compute(model: Any, token_ids: Sequence[Sequence[int]], dtype: str) -> Probe:
    """The logprob of every id but the first of each row; one row at a time, without padding."""
    logprobs = []
    with torch.inference_mode():
        for row in token_ids:
            ids = torch.tensor([list(row)], device=model.device)
            # Of half-precision logits too the softmax is taken in float32, as engines do.
            scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            logprobs.append(tuple(scores.gather(1, ids[0, 1:, None])[:, 0].tolist()))
    return Probe(tuple(map(tuple, token_ids)), tuple(logprobs), dtype)


def load(base: Path, adapter: Path, dtype: str, device: str) -> Any:
    """The base with the adapter on it."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=DTYPES[dtype], local_files_only=True
    )
    return PeftModel.from_pretrained(model.to(device), str(adapter)).eval()


def base_of(adapter: Path) -> Path:
    """The folder of the base that the adapter's own config names, if it is one."""
    named = json.loads((adapter / "adapter_config.json").read_bytes()).get(
        "base_model_name_or_path"
    )
    if isinstance(named, str) and (Path(named) / "config.json").is_file():
        return Path(named)
    raise InvalidRequest(f"say where the base model's folder is: the adapter names {named!r}")


def read_prompts(file: Path | None) -> list[str | list[int]]:
    """The prompts of a file: JSON (a list of texts or of token ids), or a text a line."""
    if file is None:
        return list(PROMPTS)
    text = file.read_text("utf-8")
    if not text.lstrip().startswith("["):
        return [line for line in text.splitlines() if line.strip()]
    try:
        found = json.loads(text)
    except ValueError as exc:
        raise InvalidRequest(f"{file} is not JSON: {exc}") from exc
    if not all(isinstance(each, str) or _is_ids(each) for each in found):
        raise InvalidRequest(f"{file} is not a list of texts or of lists of token ids")
    return list(found)


def token_ids_of(prompts: Sequence[str | list[int]], base: Path) -> list[list[int]]:
    """The prompts as rows of token ids, each cut at its limit."""
    if not 1 <= len(prompts) <= MAX_ROWS:
        raise InvalidRequest(f"a probe has 1 to {MAX_ROWS} prompts, not {len(prompts)}")
    if any(isinstance(prompt, str) for prompt in prompts):
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    rows = [
        list(tokenizer(each)["input_ids"] if isinstance(each, str) else each)[:MAX_IDS]
        for each in prompts
    ]
    if short := [at for at, row in enumerate(rows) if len(row) < 2]:
        raise InvalidRequest(f"prompt {short[0]} has fewer than two tokens: nothing to predict")
    return rows


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def main() -> None:
    """Print the probe, or one line that says what is wrong."""
    parser = argparse.ArgumentParser(description="Compute an adapter's probe.")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    try:
        base = given.model or base_of(given.adapter)
        rows = token_ids_of(read_prompts(given.prompts), base)
        model = load(base, given.adapter, given.dtype, given.device)
        probe = compute(model, rows, given.dtype)
    except (LoragateError, OSError, ValueError, RuntimeError) as exc:
        sys.exit(" ".join(str(exc).split()))
    found = {"token_ids": probe.token_ids, "logprobs": probe.logprobs, "dtype": probe.dtype}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
