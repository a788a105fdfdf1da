"""What the routes share: the engine, the base it serves, and the adapters by name."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request

from app.errors import ModelNotFound, NotFound
from app.settings import Settings
from app.worker.errors import AdapterRefused
from app.worker.samplers.adapters import Adapter
from app.worker.samplers.engine import Engine


@dataclass(slots=True)
class Served:
    """One base under one name; adapters come and go."""

    engine: Engine
    settings: Settings
    name: str
    path: Path
    adapters: dict[str, Adapter] = field(default_factory=dict)
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def find(self, model: str | None) -> Adapter | None:
        """The adapter of that name; None is the base, which is also what no name means."""
        if not model or model == self.name:
            return None
        if model not in self.adapters:
            raise ModelNotFound(f"The model `{model}` does not exist. Valid aliases: {self.name}.")
        return self.adapters[model]

    async def load(self, name: str, path: str, *, inplace: bool) -> str:
        """Register an adapter once it is in memory."""
        if not name or not path:
            raise AdapterRefused("Both 'lora_name' and 'lora_path' must be provided.")
        if name == self.name:
            raise AdapterRefused(f"The lora adapter '{name}' conflicts with a served base model.")
        async with self._changing:
            previous = self.adapters.get(name)
            if previous is not None and not inplace:
                raise AdapterRefused(
                    f"The lora adapter '{name}' has already been loaded. If you want to load "
                    "the adapter in place, set 'load_inplace' to True."
                )
            adapter = Adapter(name, path)
            try:
                await self.engine.load(adapter)
            except NotFound as exc:
                raise NotFound(f"Loading lora {name} failed: {exc}") from exc
            self.adapters[name] = adapter
            if previous is not None:
                await self.engine.retire(previous)
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, name: str) -> str:
        """Forget an adapter; requests that run on it finish."""
        if not name:
            raise AdapterRefused("'lora_name' needs to be provided to unload a LoRA adapter.")
        async with self._changing:
            adapter = self.adapters.pop(name, None)
            if adapter is None:
                raise NotFound(f"The lora adapter '{name}' cannot be found.")
            await self.engine.retire(adapter)
        return f"Success: LoRA adapter '{name}' removed successfully."


def served(request: Request) -> Served:
    found: Served = request.state.served
    return found
