"""The worker's routes: bytes in, one call, bytes out."""
