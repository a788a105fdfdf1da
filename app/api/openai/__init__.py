"""The OpenAI routes that are not inference."""
