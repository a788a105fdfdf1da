"""The worker's tests need the worker's extra; without it there is one visible line, no error."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]

    def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line("tests/worker skipped: pip install 'loragate[worker]'")

else:
    from tests.worker.tiny import model, room, serve, tiny, wide

    __all__ = ["model", "room", "serve", "tiny", "wide"]
