"""loragate: an OpenAI-compatible gateway for LoRA adapters, and the queue that trains them."""
