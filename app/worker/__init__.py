"""The other program: the only room with torch. Speaks the vLLM dialect for sampling."""
