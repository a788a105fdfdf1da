"""vLLM's dialect: requests in, response bodies out. No sockets and no torch in here."""
