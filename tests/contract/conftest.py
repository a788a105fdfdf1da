"""Names the contract tests take from `tests.databases`, whose fixtures every test has."""

from tests.databases import POSTGRES, Server

__all__ = ["POSTGRES", "Server"]
