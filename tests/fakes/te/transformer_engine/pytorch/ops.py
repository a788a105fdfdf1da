"""Fused operations, of which there are none here."""


class Sequential:
    """What Bridge names in signatures: never made here."""
