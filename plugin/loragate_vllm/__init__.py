"""The plugin's door: vLLM calls `register` in every process it starts.

What comes in: a vLLM that is about to start. What goes out: a hook where its workers load LoRA
models, and one route in its API server. Nothing here may raise: vLLM would not start.
"""

from __future__ import annotations

import logging

__version__ = "0.1.0"

#: Below "vllm", whose handlers vLLM has set up.
logger = logging.getLogger("vllm.plugins.loragate")


def register() -> None:
    """Hook into this process; say once why not, where vLLM is not the one known here."""
    try:
        from loragate_vllm import features, hook

        hook.install()
        features.install()
    except Exception:
        logger.exception("loragate-vllm does nothing here: vLLM is not as it knows it.")
