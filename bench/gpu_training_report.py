"""From what training engines did on GPUs to a page: speed and memory side by side.

What comes in: the JSON that `bench.gpu_training` writes. What goes out: `gpu_training.md`. Pure,
but for these files; it imports no torch, so that the page can be written anywhere:

    python -m bench.gpu_training_report
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NAME = "gpu_training"

Engine = Mapping[str, Any]


def page(document: Mapping[str, Any]) -> str:
    """The whole page, in Markdown. The first engine is the one that the others are compared to."""
    c = document["conditions"]
    engines: Sequence[Engine] = document["engines"]
    done = [each for each in engines if "error" not in each]
    failed = [each for each in engines if "error" in each]
    versions = ", ".join(f"{name} {version}" for name, version in c["versions"].items())
    lines = [
        "# Training on GPUs: both engines",
        "",
        f"Measured {c['date']}. Machine: {c['machine']}; {versions}; no Transformer Engine.",
        "",
        f"A Llama of {c['parameters'] / 1e9:.1f} billion random weights ({c['layers']} layers, "
        f"hidden size {c['hidden_size']}) in {c['dtype']}, LoRA of rank {c['rank']} on every "
        f"linear module but the output layer. All engines train the same adapter on the same "
        f"random tokens, {c['batch']} sequences of {c['length']} a step, {c['steps']} steps, one "
        "engine after another, each in a process of its own. A step is forward, backward and "
        f"AdamW, and its time the median without the first {c['warm_up']}. Memory is torch's own "
        "peak in the first rank. Then transformers with PEFT reads the adapter that was saved "
        "and computes the trainer's logprobs anew.",
        "",
        "| | tokens/s | step, s | of the first | memory, GiB |",
        "|---|---:|---:|---:|---:|",
        *(_speed(each, done[0]) for each in done),
        "",
        "That they train the same:",
        "",
        "| | first loss | last loss | gradient norm | logprobs apart from PEFT's, max | mean |",
        "|---|---:|---:|---:|---:|---:|",
        *(_agreement(each) for each in done),
        "",
        _apart(done),
        "",
        *_failures(failed),
    ]
    if alone := document.get("alone"):
        lines += [
            "On a machine with one GPU, the same day: "
            + ", ".join(f"{title(name)} {speed:,} tokens/s" for name, speed in alone.items())
            + ".",
            "",
        ]
    return "\n".join(lines)


def title(engine: str) -> str:
    """`megatron:tp=2` in words."""
    name, _, cut = engine.partition(":tp=")
    words = {"hf": "transformers and PEFT", "megatron": "Megatron-Core"}[name]
    return f"{words}, each layer over {cut} GPUs" if cut else words


def write(document: Mapping[str, Any], folder: Path) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    (folder / f"{NAME}.md").write_text(page(document), "utf-8")


def _speed(engine: Engine, first: Engine) -> str:
    return (
        f"| {title(engine['engine'])} | {engine['tokens_per_s']:,} | {engine['step_s']:.4f} "
        f"| {engine['tokens_per_s'] / first['tokens_per_s']:.2f} | {engine['memory_gib'][0]:.2f} |"
    )


def _agreement(engine: Engine) -> str:
    first, last = engine["losses"]
    apart = engine["logprobs_apart"]
    return (
        f"| {title(engine['engine'])} | {first:.5f} | {last:.5f} | {engine['grad_norms'][0]:.5f} "
        f"| {apart['max']:.3f} | {apart['mean']:.3f} |"
    )


def _apart(engines: Sequence[Engine]) -> str:
    """How far the engines are from each other, in one sentence."""
    values = [[*each["losses"], each["grad_norms"][0]] for each in engines]
    worst = max((max(same) - min(same)) / min(same) for same in zip(*values, strict=True))
    return (
        f"The losses and the gradient norms, which are those of the first step before clipping, "
        f"of all engines are within {worst:.3%} of each other."
    )


def _failures(engines: Sequence[Engine]) -> list[str]:
    return [f"{title(each['engine'])} failed: {each['error']}\n" for each in engines]


if __name__ == "__main__":
    write(json.loads((RESULTS / f"{NAME}.json").read_text("utf-8")), RESULTS)
