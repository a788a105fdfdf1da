"""Minimal gateways: what people write in an afternoon, and the least that one could cost."""
