"""Engines that turn prompts into tokens. No HTTP in here."""
