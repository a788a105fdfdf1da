"""loragate: an OpenAI-compatible gateway for LoRA adapters, and the queue that trains them."""

__version__ = "0.1.0"
