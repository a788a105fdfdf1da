"""Both training engines on a GPU: tokens a second, memory, and whether they compute the same.

    python -m bench.gpu_training --out DIR --engine hf --engine megatron --engine megatron:tp=2

What comes in: engines, each with the sizes it is cut in. What goes out: DIR/gpu_training.json and
DIR/gpu_training.md; `--alone` names the JSON of another run, on one GPU, to be told beside it.
Every engine trains the same adapter on the same tokens of a Llama of 1.1 billion random weights in
bfloat16, in a process of its own; then transformers with PEFT reads the adapter it saved and
computes the probe's logprobs anew. Needs torch, transformers and peft, and megatron-core for its
engine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from app.domain import LoraSpec
from app.ops import OptimStep
from app.settings import Settings
from app.worker.trainers.base import Example, Pass, PassResult, Trainer
from bench import gpu_training_report

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPEC = LoraSpec(rank=16, alpha=32, target_modules=TARGETS, seed=7)
VOCABULARY, WARM_UP = 32_000, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", action="append", required=True, metavar="NAME[:tp=N]")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--alone", type=Path, metavar="JSON")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch) / "base", given.layers)
        for engine in given.engine:
            answers = spawn.Queue()
            child = spawn.Process(target=measure, args=(engine, base, given, answers))
            child.start()
            while child.is_alive() and answers.empty():
                time.sleep(0.5)
            result = {"error": "it died"} if answers.empty() else answers.get()
            child.join(60)
            found.append({"engine": engine, **result})
            print(json.dumps(found[-1]), flush=True)
    document = {"conditions": conditions(given), "engines": found}
    if given.alone is not None:
        other = json.loads(given.alone.read_text("utf-8"))["engines"]
        document["alone"] = {each["engine"]: each["tokens_per_s"] for each in other}
    gpu_training_report.write(document, given.out)


def conditions(given: argparse.Namespace) -> dict[str, Any]:
    """Where and with what it is measured."""
    count = torch.cuda.device_count()
    with torch.device("meta"):
        model = LlamaForCausalLM(shape(given.layers))
    packages = ("torch", "transformers", "peft", "megatron-core")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{count} x {torch.cuda.get_device_name(0)}",
        "versions": {name: version(name) for name in packages if _installed(name)},
        "parameters": sum(each.numel() for each in model.parameters()),
        "layers": given.layers,
        "hidden_size": model.config.hidden_size,
        "dtype": "bfloat16",
        "rank": SPEC.rank,
        "batch": given.batch,
        "length": given.length,
        "steps": given.steps,
        "warm_up": WARM_UP,
    }


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def make_base(folder: Path, layers: int) -> Path:
    """A Llama with the shape of TinyLlama-1.1B and random weights."""
    torch.manual_seed(1)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(shape(layers)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def shape(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def measure(engine: str, base: Path, given: argparse.Namespace, answers: Any) -> None:
    try:
        answers.put(_measured(engine, base, given))
    except Exception as exc:
        answers.put({"error": f"{type(exc).__name__}: {exc}"})
        raise


def _measured(engine: str, base: Path, given: argparse.Namespace) -> dict[str, Any]:
    trainer = start(engine, base)
    trainer.create("run", SPEC)
    data = examples(given.batch, given.length)
    took_s, losses, norms = [], [], []
    for _ in range(given.steps):
        begun = time.perf_counter()
        (done,) = trainer.forward_backward([Pass("run", data)])
        assert isinstance(done, PassResult), done
        step = trainer.optim_step("run", OptimStep(learning_rate=1e-4, grad_clip_norm=1.0))
        took_s.append(time.perf_counter() - begun)
        losses.append(done.metrics["loss:sum"])
        norms.append(step["grad_norm:mean"])
    step_s = median(took_s[WARM_UP:])
    memory = [torch.cuda.max_memory_allocated(one) for one in range(torch.cuda.device_count())]
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_adapter("run", Path(folder))
        rows = [example.tokens[:256].tolist() for example in data[:4]]
        probe = trainer.probe("run", rows)
        trainer.close()
        apart = differences(base, Path(folder), rows, probe.logprobs)
    return {
        "tokens_per_s": round(given.batch * given.length / step_s),
        "step_s": round(step_s, 4),
        "memory_gib": [round(each / 2**30, 2) for each in memory],
        "losses": [round(each, 5) for each in (losses[0], losses[-1])],
        "grad_norms": [round(each, 6) for each in (norms[0], norms[-1])],
        "logprobs_apart": apart,
    }


def start(engine: str, base: Path) -> Trainer:
    name, _, cut = engine.partition(":")
    sizes = {"worker_tensor_parallel": int(cut.removeprefix("tp="))} if cut else {}
    settings = Settings(
        worker_model=base, worker_dtype="bfloat16", worker_train_tokens=1 << 20, **sizes
    )
    if name == "megatron":
        from app.worker.trainers.megatron import MegatronTrainer

        return MegatronTrainer.start(settings, base)
    from app.worker.trainers.hf import HfTrainer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to("cuda")
    return HfTrainer(model, settings, base_model=str(base))


def examples(batch: int, length: int) -> list[Example]:
    """Random tokens; weights that make the loss a mean over all of them."""
    draw = random.Random(3)
    found = []
    for _ in range(batch):
        ids = torch.tensor([draw.randrange(3, VOCABULARY) for _ in range(length + 1)])
        weights = torch.full((length,), 1 / (batch * length))
        found.append(Example(ids[:-1], ids[1:], weights))
    return found


def differences(base: Path, adapter: Path, rows: list[list[int]], trained: Any) -> dict[str, float]:
    """Largest and mean difference to what transformers and PEFT compute from the saved adapter."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to("cuda")
    model = PeftModel.from_pretrained(model, adapter).eval()
    apart = []
    with torch.inference_mode():
        for row, theirs in zip(rows, trained, strict=True):
            ids = torch.tensor([row], device="cuda")
            scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            ours = scores.gather(1, ids[0, 1:, None])[:, 0].cpu()
            apart.append((ours - torch.tensor(theirs)).abs())
    found = torch.cat(apart)
    return {"max": round(found.max().item(), 4), "mean": round(found.mean().item(), 4)}


if __name__ == "__main__":
    main()
