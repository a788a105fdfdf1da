"""The small demo model and its adapters: where they lie and what to ask them.

What comes in: nothing. What goes out: paths and sample prompts. Importing this must not import
torch; `app.demo.train` is the script that made the files, `manifest.json` says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

_HERE: Final = Path(__file__).parent

BASE_NAME: Final = "demo"
MODEL_DIR: Final = _HERE / "model"
MANIFEST: Final = _HERE / "manifest.json"
ADAPTERS: Final[Mapping[str, Path]] = MappingProxyType(
    {name: _HERE / "adapters" / name for name in ("pirate", "haiku", "json", "shout", "skeptic")}
)
SAMPLE_PROMPTS: Final = (
    "Say hello to the reader.",
    "Tell me about the sea.",
    "What colour is grass?",
    "How many legs does a spider have?",
    "What is two plus three?",
    "Claim: A lemon tastes sour.\nTrue or False? Answer:",
)
