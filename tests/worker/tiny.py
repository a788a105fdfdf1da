"""A model small enough to build in a second: random Llama, a tokenizer trained in memory, adapters.

What comes in: nothing. What goes out: folders that the worker, PEFT and vLLM load alike, and an
engine or a server over them. Head size 64, so that vLLM would take it too.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import warnings
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.settings import Settings
from app.worker.main import create_app
from app.worker.samplers.adapters import Adapter
from app.worker.samplers.delta import Delta
from app.worker.samplers.engine import Engine
from app.worker.samplers.model import CausalModel, load_model
from app.worker.samplers.params import SamplingParams
from app.worker.samplers.ticket import Ticket
from tests.waiting import until

TEXT = (
    "the quick brown fox jumps over the lazy dog",
    "hello world, how are you today? I am fine.",
    "naïve café 日本語 😀 emoji",
    "once upon a time there was a pirate who said arr",
)
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if not (loop.last and continue_final_message|default(false)) %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 256
ADAPTERS: dict[str, dict[str, Any]] = {
    "narrow": {"target_modules": ["q_proj", "v_proj"]},
    "wide": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 4},
    },
    "head": {"target_modules": ["o_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Spaces are markers inside pieces, unknown characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    octets = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", *octets], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT[:2] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and one folder for each of ADAPTERS."""
    root = tmp_path_factory.mktemp("tiny")
    write_model(root / "model")
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        write_adapter(root / "model", root / name, seed=seed, **options)
    return root


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("wide"))


def write_wide(folder: Path) -> Path:
    """A model whose logits are nearly all that it takes memory for, in one piece each time.

    256 KiB a token: what C's library has free for small things never has room for a long example.
    """
    return write_model(
        folder,
        vocab_size=1 << 16,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def write_model(folder: Path, **config: Any) -> Path:
    """A random model and its tokenizer; it has CONTEXT tokens, 2 layers and a size of 128."""
    tokenizer = byte_level()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    usual = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    LlamaForCausalLM(LlamaConfig(**usual | config)).save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, *, seed: int = 0, r: int = 8, **options: Any) -> Path:
    config = LoraConfig(r=r, lora_alpha=16, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        # PEFT uses what transformers deprecates; that is between the two.
        warnings.simplefilter("ignore")
        adapted = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_" in name:
                    weight.normal_(0, 0.15)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def plain(root: Path, adapter: str | None) -> Any:
    """The same weights in transformers and PEFT alone: what the engine must agree with."""
    model: Any = LlamaForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, str(root / adapter))
    return model.eval()


def settings(root: Path, **values: Any) -> Settings:
    given: dict[str, Any] = {"worker_state_dir": root / "runs", **values}
    return Settings(
        worker_model=root / "model",
        worker_served_name="tiny",
        worker_threads=1,
        worker_port=0,
        **given,
    )


@pytest.fixture
def model(tiny: Path) -> CausalModel:
    return load_model(settings(tiny), tiny / "model")


@dataclass
class Room:
    """An engine that runs, and how to ask it."""

    engine: Engine
    root: Path

    async def load(self, name: str, folder: str | None = None) -> Adapter:
        adapter = Adapter(name, str(self.root / (folder or name)))
        await self.engine.load(adapter)
        return adapter

    def ask(
        self, prompts: list[list[int]], adapter: Adapter | None = None, **params: Any
    ) -> Ticket:
        return self.engine.submit(prompts, SamplingParams(**params), adapter)

    async def answer(
        self, prompts: list[list[int]], adapter: Adapter | None = None, **params: Any
    ) -> list[Delta]:
        """Everything, by index."""
        found = await collect(self.ask(prompts, adapter, **params))
        return sorted(found, key=lambda delta: delta.index)


async def collect(ticket: Ticket) -> list[Delta]:
    return [delta async for deltas in ticket.deltas() for delta in deltas]


@pytest.fixture
async def room(tiny: Path, model: CausalModel) -> AsyncGenerator[Room]:
    engine = Engine(model, settings(tiny))
    engine.start()
    yield Room(engine, tiny)
    await asyncio.to_thread(engine.stop)


Serve = Callable[..., str]


@pytest.fixture
def serve(tiny: Path) -> Iterator[Serve]:
    """Start servers on a free port, in a thread each; returns their URL."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(**values: Any) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(settings(tiny, **values)),
            log_config=None,
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        running.append((server, thread))
        host, port = listener.getsockname()
        asyncio.run(until(lambda: server.started, within_s=30))
        return f"http://{host}:{port}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
