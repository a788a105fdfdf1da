"""The tensors of a model folder, one at a time.

What comes in: a folder of safetensors files. What goes out: a tensor by name. It must not know:
models, ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from app.errors import ConfigurationError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights:
    """Reads tensors when they are asked for, so that a rank never holds the whole model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            self._at: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
        elif (folder / SINGLE).is_file():
            self._at = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise ConfigurationError(
                f"{folder} has neither {SINGLE} nor {INDEX}; the Megatron trainer reads no other "
                "weights. Set LORAGATE_WORKER_MODEL."
            )

    def __getitem__(self, name: str) -> Tensor:
        """On the CPU, in the file's number format.

        Raises:
            ConfigurationError: the folder has no such tensor.
        """
        if name not in self._at:
            raise ConfigurationError(f"{self.folder} has no tensor {name!r}.")
        tensor: Tensor = self._open(self._at[name]).get_tensor(name)
        return tensor

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        return self._files[file]
