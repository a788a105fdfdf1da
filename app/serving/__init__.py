"""The data plane: requests in, replies out. No SQL, no web framework, no torch."""
