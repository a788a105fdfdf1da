"""The adapters a simulated server knows by name: loaded over HTTP, or on first use by a resolver.

What comes in: load and unload requests, names to resolve. What goes out: vLLM's texts and errors,
once the engine has done its part. Where an adapter's weights are is the engine's business.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from bench.sim.engine import Engine
from bench.sim.requests import Ask, Refusal

Then = Callable[[bool], None]


class Adapters:
    """Names and paths of one server. With `files`, an adapter's configuration is read as vLLM
    reads it; without, any path will do."""

    def __init__(self, engine: Engine, served: str, *, files: bool, max_lora_rank: int) -> None:
        self.engine = engine
        self.served = served
        self.files = files
        self.max_lora_rank = max_lora_rank
        self.paths: dict[str, str] = {}
        self._loading: dict[str, asyncio.Future[None]] = {}

    def known(self, name: str) -> bool:
        return name == self.served or name in self.paths

    def load(self, ask: Ask, answer: Callable[[bytes | None], None]) -> None:
        """Answers a text, or None if the engine died over it."""
        name, path = ask.lora_name, ask.lora_path
        if not name or not path:
            message = "Both 'lora_name' and 'lora_path' must be provided."
            raise Refusal(400, message, "InvalidUserInput")
        if name == self.served:
            message = f"The lora adapter '{name}' conflicts with a served base model."
            raise Refusal(400, message, "InvalidUserInput")
        if name in self.paths:
            message = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True."
            )
            raise Refusal(400, message, "InvalidUserInput")
        self._check(name, path)
        text = f"Success: LoRA adapter '{name}' added successfully.".encode()
        self.bring(name, path, lambda done: answer(text if done else None))

    def unload(self, ask: Ask) -> bytes:
        """The name is forgotten; slots and running requests keep what they have."""
        name = ask.lora_name or ""
        if name not in self.paths:
            message = f"The lora adapter '{name}' cannot be found."
            raise Refusal(404, message, "NotFoundError")
        del self.paths[name]
        return f"Success: LoRA adapter '{name}' removed successfully.".encode()

    def bring(self, name: str, path: str, then: Then) -> None:
        """Have the engine load it, once for all who ask meanwhile, as vLLM's lock does.

        `then(False)`: the engine died. It is not called at all if the server was killed.
        """
        future = self._loading.get(name)
        if future is None:
            future = self._loading[name] = self.engine.load(name)

        def finish(done: asyncio.Future[None]) -> None:
            if self._loading.get(name) is done:
                del self._loading[name]
            if done.cancelled():
                return
            failed = done.exception() is not None
            if not failed:
                self.paths.setdefault(name, path)
            then(not failed)

        future.add_done_callback(finish)

    def readable(self, name: str) -> bool:
        """Whether an adapter that was evicted can be read again."""
        path = self.paths.get(name)
        return not self.files or path is None or _config(path).is_file()

    def close(self) -> None:
        for future in list(self._loading.values()):
            future.cancel()

    def _check(self, name: str, path: str) -> None:
        if not self.files:
            return
        if not _config(path).is_file():
            message = f"Loading lora {name} failed: No adapter found for {path}"
            raise Refusal(404, message, "NotFoundError")
        rank = json.loads(_config(path).read_bytes())["r"]
        if rank > self.max_lora_rank:
            message = (
                f"Call to add_lora method failed: LoRA rank {rank} is greater than "
                f"max_lora_rank {self.max_lora_rank}."
            )
            raise Refusal(500, message, "InternalServerError")


def _config(path: str) -> Path:
    return Path(path, "adapter_config.json")
