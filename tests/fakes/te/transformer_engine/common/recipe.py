"""How numbers of eight bits are scaled: what Megatron derives from when it is imported."""


class DelayedScaling:
    """Never made here."""
