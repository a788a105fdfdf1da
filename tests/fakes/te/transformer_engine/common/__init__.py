"""Number formats, of which there are none here."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
