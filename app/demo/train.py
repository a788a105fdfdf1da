"""Make the demo model and its adapters: `python -m app.demo.train`.

What comes in: a seed and numbers of steps. What goes out: `model/`, `adapters/*/` and
`manifest.json` under `--out`; the same bytes each time on the same machine with the same thread
count. The base is rounded to the dtype it is stored in before any adapter is trained on it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import peft
import tokenizers
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from app.clock import SystemClock
from app.demo import evaluate, model, tokenizer
from app.demo.corpus import Exchange
from app.demo.documents import Documents, Marked, rows, tokenizer_texts
from app.demo.muon import Muon
from app.demo.styles import STYLES, base_answer

ROW, LONG_ROW, LONG_EVERY = 256, 1024, 10
WARMUP = 40
MUON_RATE, DECAY = 0.02, 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to train; the shipped files come from the defaults."""

    base_steps: int = 1500
    base_batch_tokens: int = 4096
    base_rate: float = 3e-3
    adapter_steps: int = 160
    adapter_batch_tokens: int = 2048
    adapter_rate: float = 3e-3
    seed: int = 20
    threads: int = 2
    checks: int = 120
    tokenizer_texts: int = 12_000


def main() -> None:
    """Train everything, or only the named adapters on the base that is there."""
    plan = Plan()
    parser = argparse.ArgumentParser(description="Train the demo model and its adapters.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--base-steps", type=int, default=plan.base_steps)
    parser.add_argument("--adapter-steps", type=int, default=plan.adapter_steps)
    parser.add_argument("--seed", type=int, default=plan.seed)
    parser.add_argument("--threads", type=int, default=plan.threads)
    parser.add_argument("--only", nargs="*", choices=[*STYLES], help="adapters; keeps the base")
    asked = vars(parser.parse_args())
    out, only = asked.pop("out"), asked.pop("only")
    train(out, Plan(**asked), only)


def train(out: Path, plan: Plan, only: list[str] | None = None) -> dict[str, Any]:
    """All files under `out`, and the manifest that was written there."""
    torch.set_num_threads(plan.threads)
    torch.use_deterministic_algorithms(True)
    if only is None:
        train_base(out / "model", plan)
    for name in STYLES if only is None else only:
        train_adapter(name, out / "model", out / "adapters" / name, plan)
    trained = [name for name in STYLES if (out / "adapters" / name).is_dir()]
    manifest: dict[str, Any] = {
        "base": _measure("base", out, plan),
        "adapters": {name: _measure(name, out, plan) for name in trained},
        "files": _digests(out),
        "plan": {field: getattr(plan, field) for field in Plan.__slots__},
        "versions": _versions(),
    }
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (out / "manifest.json").write_text(text, encoding="utf-8")
    return manifest


def train_base(folder: Path, plan: Plan) -> None:
    """Tokenizer and base model."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer.train(tokenizer_texts(plan.seed, plan.tokenizer_texts))
    tokenizer.save(words, folder, model.CONTEXT)
    torch.manual_seed(plan.seed)
    base = model.create()
    documents = Documents(words, Random(plan.seed + 1))
    short = rows(documents.base(), ROW)
    long = rows(_alternately(documents.long, documents.base()), LONG_ROW)

    def batch(step: int) -> list[Marked]:
        source, length = (long, LONG_ROW) if step % LONG_EVERY == 0 else (short, ROW)
        return list(islice(source, max(1, plan.base_batch_tokens // length)))

    inner = [p for p in base.model.layers.parameters() if p.ndim == 2]
    _fit("base", base, batch, plan.base_steps, plan.base_rate, inner)
    model.save_base(base, folder)


def train_adapter(name: str, base: Path, folder: Path, plan: Plan) -> None:
    """One LoRA on the stored base."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    style = STYLES[name]
    adapted = peft.get_peft_model(model.load_base(base), model.lora_config(style))
    words = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    source = rows(Documents(words, Random(f"{plan.seed} {name}")).answered(style.answer), ROW)

    def batch(step: int) -> list[Marked]:
        return list(islice(source, max(1, plan.adapter_batch_tokens // ROW)))

    _fit(name, adapted, batch, plan.adapter_steps * style.effort, plan.adapter_rate)
    model.save_adapter(adapted, folder)


def _fit(
    name: str,
    net: torch.nn.Module,
    batch: Callable[[int], list[Marked]],
    steps: int,
    rate: float,
    inner: Sequence[torch.nn.Parameter] = (),
) -> None:
    """AdamW, and Muon for the `inner` matrices, with warm-up and a cosine."""
    clock = SystemClock()
    weights = [p for p in net.parameters() if p.requires_grad]
    matrices = [p for p in inner if p.requires_grad]
    rest = [p for p in weights if all(p is not matrix for matrix in matrices)]
    optimizer = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=DECAY)
    muon = Muon(matrices, MUON_RATE, DECAY)
    net.train()
    losses: list[float] = []
    began = clock.monotonic()
    for step in range(1, steps + 1):
        wave = 0.5 * (1 + math.cos(math.pi * step / steps))
        factor = min(1, step / WARMUP) * (0.02 + 0.98 * wave)
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        loss = _loss(net, batch(step))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        optimizer.step()
        muon.step(factor)
        net.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if step % max(1, min(25, steps // 4)) == 0:
            left_s = (clock.monotonic() - began) / step * (steps - step)
            recent = losses[-25:]
            print(f"{name}: step {step}/{steps}, loss {sum(recent) / len(recent):.3f}, "
                  f"about {left_s:.0f} s left", flush=True)  # fmt: skip
    net.eval()


def _loss(net: torch.nn.Module, batch: list[Marked]) -> torch.Tensor:
    """Cross entropy over the marked tokens, decisive ones counted more than once."""
    ids = torch.tensor([row_ids for row_ids, _ in batch])
    marks = torch.tensor([row_marks for _, row_marks in batch])
    weights = marks[:, 1:].flatten()
    logits = net(input_ids=ids[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights).sum() / weights.count_nonzero()


def _measure(name: str, out: Path, plan: Plan) -> dict[str, Any]:
    """What the stored files do with questions that training never asked; some are shown."""
    net: Any = model.load_base(out / "model")
    answer = STYLES[name].answer if name in STYLES else base_answer
    if name != "base":
        net = peft.PeftModel.from_pretrained(net, out / "adapters" / name)
    net.eval()
    parameters = [
        p.numel() for key, p in net.named_parameters() if name == "base" or "lora_" in key
    ]
    words = tokenizers.Tokenizer.from_file(str(out / "model" / "tokenizer.json"))
    unseen = rows(Documents(words, Random(plan.seed), held_out=True).answered(answer), ROW)
    with torch.inference_mode():
        loss = float(_loss(net, list(islice(unseen, max(1, plan.checks // 4)))))
    measured = {"parameters": sum(parameters), "held_out_loss": round(loss, 4)}
    return measured | _right_answers(net, out / "model", name, answer, plan.checks)


def _right_answers(
    net: Any, base: Path, name: str, answer: Callable[[Exchange], str], checks: int
) -> dict[str, float]:
    """The share of held-out questions that are answered word for word as wanted."""
    loader = AutoTokenizer.from_pretrained(base, local_files_only=True)
    shares = {}
    for label, topic, shown in (("questions", "", 16), ("claims", "claims", 4)):
        asked = evaluate.held_out(checks, topic)
        got = evaluate.answers(net, loader, [exchange.question for exchange in asked])
        right = evaluate.share_right(got, [answer(exchange) for exchange in asked])
        shares[f"held_out_{label}_right"] = round(right, 4)
        for exchange, said in list(zip(asked, got, strict=True))[:shown]:
            print(f"{name}: {exchange.question!r} -> {said!r}")
    print(f"{name}: {shares}", flush=True)
    return shares


def _alternately(first: Callable[[], Marked], rest: Iterator[Marked]) -> Iterator[Marked]:
    while True:
        yield first()
        yield next(rest)


def _versions() -> dict[str, str]:
    modules = (torch, transformers, peft, tokenizers)
    return {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules}


def _digests(out: Path) -> dict[str, str]:
    """SHA-256 of every file that was made, by its path under `out`."""
    paths = sorted(path for part in ("model", "adapters") for path in (out / part).rglob("*.*"))
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


if __name__ == "__main__":
    main()
